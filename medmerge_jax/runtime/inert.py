"""Texts of strangers, such as names of classes and files, that nothing reads as more than text."""

import re
import unicodedata

_MARKDOWN = re.compile(r"[\\|<>`\[\]{}*~&#$]|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.")
"""With which Markdown, HTML or TeX begins something; an underscore inside of a word is one."""

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""With which a text looks as if it said something else; those that join letters are no danger."""


def on_terminal(text: str) -> str:
    r"""Lines for a terminal, in which control characters, as of its colours, are spelt out.

    >>> on_terminal("two\nlines, \x1b[31mred")
    'two\nlines, \\x1b[31mred'
    """
    if text.isprintable():
        return text
    return "".join(one if one in "\n\t" else _spelt(one) for one in text)


def visible(text: str) -> str:
    r"""As `on_terminal`, on one line.

    >>> visible("\x1b[31mred\n\u202etxt")
    '\\x1b[31mred \\u202etxt'
    """
    return on_terminal(" ".join(text.split()))


def markdown(text: str) -> str:
    r"""What Markdown shows as this text, on one line.

    >>> markdown("lp_ft"), markdown("<b>|_x_")
    ('lp_ft', '\\<b\\>\\|\\_x\\_')
    """
    return _MARKDOWN.sub(lambda found: f"\\{found[0]}", visible(text))


def _spelt(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS:
        return character.encode("unicode_escape").decode()
    return character
