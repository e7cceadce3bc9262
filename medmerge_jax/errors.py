"""The one error that a user of the program is meant to see."""

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
        super().__init__("\n".join(map(_shortened, message.split("\n"))))


def _shortened(line: str) -> str:
    if len(line) <= _LONGEST:
        return line
    return f"{line[: _LONGEST // 2]} ... {line[-_LONGEST // 2 :]}"
