"""Lines of CSV files, in which no spreadsheet finds a formula."""

import csv
import io
import re
from collections.abc import Iterable

_STARTS_FORMULA = re.compile(r"[=+\-@\t\r]")
"""With which a spreadsheet begins to compute."""

_NUMBER = re.compile(r"{0}( (to|±) {0})?".format(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?"))
"""Or an interval."""


def csv_line(cells: Iterable[str]) -> str:
    """A line with its end; cells are made inert."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(map(inert, cells))
    return text.getvalue()


def inert(cell: str) -> str:
    """A cell that no spreadsheet computes: a quotation mark stands before a formula.

    >>> inert("=1+1"), inert("-0.5"), inert("scan.png")
    ("'=1+1", '-0.5', 'scan.png')
    """
    return f"'{cell}" if _STARTS_FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def csv_table(records: Iterable[dict[str, object]]) -> str:
    r"""A line of titles and one for each record; what a record lacks, or is None, is empty.

    >>> csv_table([{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": None, "auc": 0.75}])
    'epoch,loss,auc\n1,0.5,\n2,,0.75\n'
    """
    rows = list(records)
    titles = list(dict.fromkeys(title for row in rows for title in row))
    lines = [[_text(row.get(title)) for title in titles] for row in rows]
    return "".join(map(csv_line, [titles, *lines]))


def _text(value: object) -> str:
    return "" if value is None else str(value)
