"""The one error that a user of the program is meant to see."""


class UserError(ValueError):
    """Something that the user gave cannot be used.

    The message is complete: it names the file, the path in the tree or the config field, what
    was found, what was wanted and what to do. The program prints it without a traceback and
    exits with status 2.
    """
