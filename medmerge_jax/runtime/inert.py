"""Texts of strangers, such as names of classes and files, that nothing reads as more than text."""

import re
import unicodedata

_MARKDOWN = re.compile(
    r"[\\|<>`{}*~&#$]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|(?:(?<=http)|(?<=https)|(?<=ftp)):|(?<=www)\.",
    re.IGNORECASE,
)
"""With which Markdown, HTML, TeX or a link begins; an underscore inside of a word is one, and the
brackets of an interval begin nothing."""

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""With which a text looks as if it said something else; those that join letters are no danger."""


_LATEX = {
    **{one: f"\\{one}" for one in "{}$&#%_"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}", "[": "{[}", "]": "{]}", "*": "{*}",  # the last after a line's end
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$",
}  # fmt: skip


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


def latex(text: str) -> str:
    r"""What LaTeX prints as this text.

    >>> latex(r"\input{x} 5 % of a_b"), latex("-0.010 to +0.050")
    ('\\textbackslash{}input\\{x\\} 5 \\% of a\\_b', '$-$0.010 to +0.050')
    """
    escaped = "".join(_LATEX.get(one, one) for one in visible(text))
    return re.sub(r"(?<!\S)-(?=\d)", "$-$", escaped)


def _spelt(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cs") or character in _DIRECTIONS:
        return character.encode("unicode_escape").decode()
    return character
