"""Entries with names, added by a decorator and read by everybody else.

A registry is the one list of what there is of a kind: command-line choices, checks of the config,
tables and error messages are derived from it. Whoever imports a module that registers something,
be it a config file, has it under its name everywhere.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, overload

from medmerge_jax.errors import UserError, nearest

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Mapping[str, T]):
    """Entries by name, in the order in which they were added; messages name them by the noun."""

    def __init__(self, noun: str):
        self.noun = noun
        self._entries: dict[str, T] = {}
        self._origins: dict[str, str] = {}

    def add(self, name: str, entry: T, origin: str = "") -> T:
        """Adds an entry and returns it.

        One from the same origin is replaced, as when a cell of a notebook runs again.

        Raises:
          ValueError: The name is another entry's already.
        """
        if name in self._entries and not (origin and self._origins.get(name) == origin):
            raise ValueError(f"there is a {self.noun} {name!r} already; choose another name")
        self._entries[name], self._origins[name] = entry, origin
        return entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UserError(f"there is no {self.noun} {name!r}; {nearest(name, list(self))}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Decorator:
    """`@thing`, or `@thing(fact=...)`: registers a function under its name, and leaves it as it is.

    The entry is made from the function and the facts.
    """

    def __init__(self, registry: Registry[Any], entry: Callable[..., Any]):
        self._registry, self._entry = registry, entry

    @overload
    def __call__(self, function: F, /) -> F: ...

    @overload
    def __call__(self, /, **facts: Any) -> Callable[[F], F]: ...

    def __call__(self, function: Any = None, /, **facts: Any) -> Any:
        """Registers the function, or returns what does so with these facts."""

        def register(one: F) -> F:
            origin = f"{one.__module__}.{one.__qualname__}"
            self._registry.add(one.__name__, self._entry(one, **facts), origin)
            return one

        return register if function is None else register(function)


def summary(entry: object) -> str:
    """The first line of its docstring."""
    return (inspect.getdoc(entry) or "").partition("\n")[0]
