"""What `mm.run` returns: the content of results.json, which shows itself."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medmerge_jax.analysis.headline import headline
from medmerge_jax.analysis.tables import Cells, results_text
from medmerge_jax.analysis.terminal import sections, terminal_text

_WIDTH = 100
"""Of the text in columns, where no terminal says how wide it is."""


class Results(dict[str, Any]):
    """The content of results.json as a dict, with the workdir, shown as a table.

    Attributes:
      workdir: The run directory.

    >>> results = Results({"recipe": "ft", "start": "b", "seed": 0, "test": {"accuracy": 0.5}}, "r")
    >>> results["test"]["accuracy"], results.workdir.name
    (0.5, 'r')
    >>> print(results)
    ft, b, seed 0
    <BLANKLINE>
    metric      test
    ────────  ──────
    accuracy  0.5000
    <BLANKLINE>
    report: r/report.html
    """

    def __init__(self, results: Mapping[str, Any], workdir: str | Path):
        super().__init__(results)
        self.workdir = Path(workdir)

    @property
    def results(self) -> dict[str, Any]:
        """All of it as a plain dict."""
        return dict(self)

    def text(self, width: int | None = None) -> str:
        """The results as tables of so many columns; as Markdown without a width."""
        return results_text(self) if width is None else terminal_text(self, width)

    def __str__(self) -> str:
        if not self:
            return f"no results yet; workdir: {self.workdir}"
        return f"{self.text(_WIDTH)}\n\nreport: {self.workdir / 'report.html'}"

    __repr__ = __str__

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.results, self.workdir))

    def _repr_html_(self) -> str:
        """What a notebook shows: a sentence and the tables, in which every text is escaped."""
        if not self:
            return _paragraph(str(self))
        parts = [_table(title, cells) for title, cells, _ in sections(self)]
        above, below = headline(self), f"report: {self.workdir / 'report.html'}"
        return "\n".join([_paragraph(above), *parts, _paragraph(below)])


def _paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _table(title: str, cells: Cells) -> str:
    head, rows = cells
    lines = [_row("th", head), *(_row("td", row) for row in rows)]
    return "\n".join(["<table>", f"<caption>{html.escape(title)}</caption>", *lines, "</table>"])


def _row(tag: str, row: list[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"
