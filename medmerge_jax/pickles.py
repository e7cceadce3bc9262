"""What it takes to read a stranger's pickle without running the code in it.

A pickle is a program that may call any function it can import. The unpicklers of this project
import nothing: each knows the handful of globals that its files are made of, replaced by inert
stand-ins, and refuses every other. Stand-ins refuse to be modified, so that nothing outlives the
reading of a file.
"""

import pickletools
from collections.abc import Callable
from typing import IO, Any

# Objects registered with `copyreg` by number: they may bypass `find_class`.
FORBIDDEN_OPCODES = ("EXT1", "EXT2", "EXT4")


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


def check_opcodes(file: IO[bytes]) -> None:
    """Reads one pickle without running it, and leaves the file where it was.

    Raises:
      RefusedError: Opcodes that could get around an unpickler's `find_class`, or ask it for any
        amount of memory.
    """
    start = file.tell()
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in FORBIDDEN_OPCODES:
            raise RefusedError(f"its pickle uses the opcode {opcode.name}, which is refused")
        # An invented index would make the unpickler allocate a memo of that size.
        if opcode.name.endswith("PUT") and isinstance(argument, int) and argument > count:
            raise RefusedError(f"its pickle is malformed: memo index {argument}")
    file.seek(start)
