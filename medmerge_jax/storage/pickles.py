"""What it takes to read a stranger's pickle without running the code in it.

A pickle is a program that may call any function it can import. The unpicklers of this project
import nothing: each knows the handful of globals that its files are made of, replaced by inert
stand-ins, and refuses every other or puts an inert placeholder there. Stand-ins refuse to be
modified, so that nothing outlives the reading of a file; and what their functions build must not
be larger than their arguments, or a short pickle could call one of them often on something large.
"""

import os
import pickle
import pickletools
import struct
from collections.abc import Callable, Iterable
from typing import IO, Any

MOST_OPCODES = 2**21
"""Of a pickle. An opcode of a byte may ask for a hundred bytes of memory; checkpoints have 50 for
each tensor, the largest file of CIFAR 300,000."""

_BLOCK = 2**16
_KEYS = (str, bytes, int, float, type(None), bool)
_LONGEST = 40
"""Characters that messages show of a value."""


class RefusedError(Exception):
    """What is wrong with the file, without its name."""


class ForbiddenError(RefusedError):
    """The pickle asks for more than the plain data that is expected in it."""


class StandIn:
    """In place of a global of the pickle: can be called if it has a function, nothing else."""

    __slots__ = ("function", "name")

    def __init__(self, name: str, function: Callable[..., Any] | None = None) -> None:
        self.name = name
        self.function = function

    def __call__(self, *args: Any) -> Any:
        """What the global's own function would build, as far as it matters here."""
        if self.function is None:
            raise ForbiddenError(f"the pickle calls {self.name}; refused")
        return self.function(*args)

    def __setstate__(self, state: Any) -> None:
        raise ForbiddenError(f"the pickle modifies {self.name}; refused")


class Placeholder:
    """In place of a global that is not known, and of whatever the pickle makes of it.

    It is made anew for each, takes what is given to it, and does nothing with it: nothing is
    imported, called or compared.

    Attributes:
      name: Of the global, "argparse.Namespace".
      state: Of the object that the pickle makes: mostly the dict of its attributes.
      items: What a dict of another type holds.
    """

    __slots__ = ("items", "name", "state")

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: Any = None
        self.items: dict[Any, Any] = {}

    def __call__(self, *_: Any) -> "Placeholder":
        """An object of this name; the arguments are dropped."""
        return Placeholder(self.name)

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, _: Any) -> None:
        """Of a list of another type, whose elements are dropped."""

    add = extend = append


def shown(value: Any) -> str:
    """A value for messages, short and harmless: `repr` of nested tuples may take for ever."""
    if isinstance(value, tuple) and len(value) <= 6:
        return f"({', '.join(_short(one) for one in value)})"
    return _short(value)


def _short(value: Any) -> str:
    if isinstance(value, str | bytes):
        return repr(value[:_LONGEST])
    plain = value is None or (isinstance(value, int | float) and abs(value) < 2**64)
    return repr(value) if plain else type(value).__name__


def check_keys(keys: Iterable[Any]) -> None:
    """A ForbiddenError for what cannot be hashed in a moment: nested tuples, enormous numbers."""
    for key in keys:
        if type(key) not in _KEYS or (type(key) is int and key.bit_length() > 60):
            raise ForbiddenError(f"its pickle has a dict with the key {shown(key)}; refused")


_NAMES = {opcode.code: opcode.name for opcode in pickletools.opcodes}


class _Opcodes(dict[int, Callable[[Any], None]]):
    """What each opcode does, for one pickle; those that are refused are left out."""

    left = MOST_OPCODES

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self.left -= 1
        if self.left < 0:
            raise RefusedError(f"its pickle has more than {MOST_OPCODES} opcodes; refused")
        if code not in self:
            if chr(code) not in _NAMES:
                raise pickle.UnpicklingError(f"no opcode is {bytes([code])!r}")
            raise RefusedError(f"its pickle uses the opcode {_NAMES[chr(code)]}, which is refused")
        return super().__getitem__(code)


class _Input:
    """A file that is never asked for more than it has: Python makes room before it reads."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.readline = file.readline
        here = file.tell()
        self._end = file.seek(0, os.SEEK_END)
        file.seek(here)

    def read(self, size: int) -> bytes:
        return self._file.read(size if size < _BLOCK else min(size, self._end - self._file.tell()))


# It derives from the unpickler that is written in Python: the one in C puts any key into a dict,
# makes a memo of any size, and cannot be stopped.
class PlainUnpickler(pickle._Unpickler):
    """Builds nothing but plain containers, numbers, strings and what `find_class` returns.

    Subclasses define `find_class`, and `persistent_load` if they want to. Objects are made of
    placeholders alone.
    """

    def __init__(self, file: IO[bytes], encoding: str) -> None:
        super().__init__(_Input(file), encoding=encoding)
        self.dispatch = _Opcodes(_ALLOWED)  # type: ignore[misc]

    def find_class(self, module: str, name: str) -> StandIn | Placeholder:
        """Refuses every global."""
        raise ForbiddenError(f"its pickle asks for {module}.{name}, which is refused")


_ORIGINAL: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch

# These make objects that `copyreg` has numbers for, and buffers from elsewhere.
_REFUSED = (
    pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip


def _new_object(number_of_arguments: int) -> Callable[[Any], None]:
    """An object without a call of its class: Python's own would call its `__new__`."""

    def load(self: Any) -> None:
        for _ in range(number_of_arguments):
            self.stack.pop()
        kind = self.stack.pop()
        if not isinstance(kind, Placeholder):
            raise RefusedError(f"its pickle makes an object of {shown(kind)}; refused")
        self.append(kind())

    return load


def _byte_array(self: Any) -> None:
    (size,) = struct.unpack("<Q", self.read(8))
    self.append(bytearray(self.read(size)))  # Python's own allocates `size` first.


_KEYS_ON_STACK: dict[bytes, slice] = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: slice(0, None, 2),  # The stack begins at the last mark.
    pickle.DICT: slice(0, None, 2),
    pickle.ADDITEMS: slice(None),
    pickle.FROZENSET: slice(None),
}
"""Of the opcodes that hash values: where these are."""


def _with_checked_keys(code: bytes) -> Callable[[Any], None]:
    def load(unpickler: Any) -> None:
        check_keys(unpickler.stack[_KEYS_ON_STACK[code]])
        _ORIGINAL[code[0]](unpickler)

    return load


_ALLOWED = {
    **{code: load for code, load in _ORIGINAL.items() if bytes([code]) not in _REFUSED},
    **{code[0]: _with_checked_keys(code) for code in _KEYS_ON_STACK},
    pickle.BYTEARRAY8[0]: _byte_array,
    pickle.NEWOBJ[0]: _new_object(1),
    pickle.NEWOBJ_EX[0]: _new_object(2),
}
