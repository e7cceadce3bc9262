"""The help of commands, as wide as the terminal."""

import argparse
import re
import textwrap


class HelpFormatter(argparse.HelpFormatter):
    """Joins the lines of a paragraph and fills it, and the second column of rows.

    Other lines that are indented, as of examples, stay as they are.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent(filled(text, width), indent)


def filled(text: str, width: int) -> str:
    """What `HelpFormatter` makes of a text.

    Args:
      text: Paragraphs; rows of a name, two spaces or more, and what it means; other lines.
      width: In columns.
    """
    lines = re.sub(r"(?<=\S)\n(?=\S)", " ", text).splitlines()
    return "\n".join(_filled(line, width) for line in lines)


def _filled(line: str, width: int) -> str:
    begins = re.match(r" *\S+ {2,}", line)
    if line.startswith(" ") and not begins:
        return line
    hanging = " " * (begins.end() if begins else 0)
    return textwrap.fill(
        line, width, subsequent_indent=hanging, break_long_words=False, break_on_hyphens=False
    )
