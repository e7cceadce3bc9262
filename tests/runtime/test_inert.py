"""Hostile names are shown as the text that they are, wherever it is."""

import csv
import io
import re
import unicodedata

import pytest
from helpers.reports import HOSTILE
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from medmerge_jax.analysis import results_text
from medmerge_jax.analysis.exports import csv_text, latex_text, numeric
from medmerge_jax.runtime.inert import latex, markdown, visible

ESCAPES = re.compile(
    r"\\([{}$&#%_])|\\(text[a-z]+)\{\}|\$(-|\\pm|\\times)\$|\{([\[\]*])\}", re.DOTALL
)
MEANT = {
    "textbackslash": "\\", "textasciitilde": "~", "textasciicircum": "^", "textless": "<",
    "textgreater": ">", "textbar": "|", "textquotedbl": '"', "textasciigrave": "`",
    "-": "-", r"\pm": "±", r"\times": "×",
}  # fmt: skip


def printed(text):
    """What LaTeX prints; fails if anything in it is active."""
    rest = ESCAPES.sub("", text)
    assert not set(rest) & set('\\{}$&#%_^~<>|"`[]*\n'), rest
    return ESCAPES.sub(lambda x: next(MEANT.get(one, one) for one in x.groups() if one), text)


@given(st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(exclude_characters="−"))))
def test_latex_prints_the_text(text):
    assert printed(latex(text)) == visible(text)


@given(st.one_of(st.sampled_from(HOSTILE), st.text()))
def test_markdown_shows_the_text(text):
    (paragraph,) = MarkdownIt().parse(f"| {markdown(text)} |")[1:2]
    shown = "".join(token.content for token in paragraph.children)
    assert {token.type for token in paragraph.children} <= {"text", "text_special"}
    assert shown == f"| {visible(text)} |"


@given(st.text())
def test_nothing_that_is_visible_moves_the_cursor(text):
    assert not {unicodedata.category(one) for one in visible(text)} & {"Cc", "Cs", "Zl", "Zp"}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_spreadsheet_computes_no_cell(name):
    text = csv_text(([name, "F1"], [[name, "-0.010 to +0.050"], ["-", "+0.021"]]))
    (head, _), (cell, interval), (undefined, number) = csv.reader(io.StringIO(text))
    assert head == cell
    assert cell.removeprefix("'") == visible(name)
    assert not re.match(r"[=+\-@\t\r]", cell)
    assert (interval, undefined, number) == ("-0.010 to +0.050", "", "+0.021")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_table_for_latex_has_the_cells_that_it_should(name):
    comment, begin, top, head, middle, row, *end = latex_text(
        name, (["class", "F1"], [[name, "0.5 ± 0.1"]])
    ).splitlines()
    assert comment.startswith("% ")
    assert (begin, top, middle) == (r"\begin{tabular}{lr}", r"\toprule", r"\midrule")
    assert head == r"class & F1 \\"
    assert end == [r"\bottomrule", r"\end{tabular}"]
    first, second = row.removesuffix(r" \\").split(" & ")
    assert (printed(first), second) == (visible(name), r"0.5 $\pm$ 0.1")


@pytest.mark.parametrize("name", HOSTILE)
def test_the_table_of_a_terminal_is_plain(name):
    value = {"mean": 0.5, "std": None, "values": [0.5]}
    rows = [{"recipe": name, "start": name, "accuracy": value}]
    difference = {"recipe": name, "start": name, "macro_f1": None}
    found = {"reference": name, "metric": "macro_f1", "rows": [difference]}
    study = {"seeds": [0], "table": rows, "differences": found, "evaluate_on": {name: rows}}
    run = {"recipe": name, "start": name, "seed": 0, "test": {name: 0.5}}
    for results in (study, run):
        text = results_text(results)
        assert all(line.isprintable() for line in text.split("\n"))
        for line in text.split("\n"):
            if line.startswith("|"):
                assert re.search(r"(?<!\\)([<`*]|\]\()", line) is None


def test_columns_of_numbers_are_known():
    rows = [["ft", "0.569 ± 0.033", "12", "-", "1 of 8", "x", "-1e-05 to +2", "3 (75%)", "0.10.2"]]
    wanted = [False, True, True, True, True, False, True, True, False]
    assert numeric(list("abcdefghi"), rows) == wanted
