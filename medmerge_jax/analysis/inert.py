"""Texts of strangers, such as names of classes, that nothing reads as more than text."""

import re
import unicodedata

_LATEX = {
    **{one: f"\\{one}" for one in "{}$&#%_"},
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}", "[": "{[}", "]": "{]}", "*": "{*}",  # the last after a line's end
    "±": r"$\pm$", "−": "$-$", "×": r"$\times$",
}  # fmt: skip

_MARKDOWN = re.compile(r"[\\|<>`*~&]|\](?=[(\[:])|(?<!\w)_|_(?!\w)")
"""With which Markdown or HTML begins something; brackets of an interval begin nothing."""


def visible(text: str) -> str:
    r"""On one line, with control characters, such as those that colour a terminal, spelt out.

    >>> visible("\x1b[31mred\n\u202etxt")
    '\\x1b[31mred \\u202etxt'
    """
    line = " ".join(text.split())
    return "".join(_spelt(one) if unicodedata.category(one)[0] == "C" else one for one in line)


def markdown(text: str) -> str:
    r"""What Markdown shows as this text.

    >>> markdown("lp_ft"), markdown("<b>|_x_")
    ('lp_ft', '\\<b\\>\\|\\_x\\_')
    >>> markdown("0.5 [0.4, 0.6]"), markdown("[a](b)")
    ('0.5 [0.4, 0.6]', '[a\\](b)')
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
    return character.encode("unicode_escape", "replace").decode()
