"""The help of commands fits into the terminal."""

import argparse

import pytest

from medmerge_jax.commands.help import HelpFormatter

EPILOG = """\
One sentence that goes on
in the next line.

names:
  one    a thing of which there is much to say
  two    another

example:
  program merge-them --out FILE \\
      a b"""


@pytest.mark.parametrize(
    ("columns", "lines"),
    [
        (
            "40",
            [
                "One sentence that goes on in the next",
                "line.",
                "",
                "names:",
                "  one    a thing of which there is",
                "         much to say",
                "  two    another",
                "",
                "example:",
                "  program merge-them --out FILE \\",
                "      a b",
            ],
        ),
        ("80", ["One sentence that goes on in the next line.", *EPILOG.splitlines()[2:]]),
    ],
)
def test_paragraphs_are_filled_and_indented_lines_stay(columns, lines, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    parser = argparse.ArgumentParser(epilog=EPILOG, formatter_class=HelpFormatter)
    assert parser.format_help().splitlines()[-len(lines) :] == lines
