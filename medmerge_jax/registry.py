"""Entries with names, added by a decorator and read by everybody else.

A registry is the one list of what there is of a kind: command-line choices, checks of the config,
tables and error messages are derived from it. Whoever imports a module that registers something,
be it a config file, has it under its name everywhere.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import TypeVar

from medmerge_jax.errors import UserError, nearest

T = TypeVar("T")


class Registry(Mapping[str, T]):
    """Entries by name, in the order in which they were added.

    Args:
      noun: What an entry is, for messages: "merger".
    """

    def __init__(self, noun: str):
        self.noun = noun
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Adds an entry and returns it.

        Raises:
          ValueError: The name is another entry's already.
        """
        if self._entries.setdefault(name, entry) is not entry:
            raise ValueError(f"there is a {self.noun} {name!r} already; choose another name")
        return entry

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            raise UserError(f"there is no {self.noun} {name!r}: {nearest(name, list(self))}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def summary(entry: object) -> str:
    """The first line of its docstring."""
    return (inspect.getdoc(entry) or "").partition("\n")[0]
