"""The errors that a user of the program is meant to see, and words for them."""

import difflib
from collections.abc import Collection
from typing import Any

_LONGEST = 1000
"""Characters of a line."""


class UserError(ValueError):
    """Something that the user gave cannot be used.

    The message is complete: it names the file, the path in the tree or the config field, what
    was found, what was wanted and what to do. The program prints it without a traceback and
    exits with status 2. Lines of more than 1000 characters, which quote a damaged file, lose
    their middle.
    """

    def __init__(self, message: str):
        half = _LONGEST // 2
        lines = message.split("\n")
        short = [x if len(x) <= _LONGEST else f"{x[:half]} ... {x[-half:]}" for x in lines]
        super().__init__("\n".join(short))


class DivergedError(UserError):
    """A loss or the weights are no longer finite: the learning rate is to blame, not a path."""


class OutOfMemoryError(UserError):
    """The memory does not suffice for the batch."""


def nearest(value: Any, choices: Collection[str]) -> str:
    """The sentence that says what is wanted instead of `value`: "one of b, c is wanted"."""
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}one of {', '.join(choices)} is wanted"
