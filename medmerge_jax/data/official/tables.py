"""Strict reading of the published tables: whatever is wrong is named with file and line."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from medmerge_jax.data.table import read_sheet
from medmerge_jax.errors import UserError


class Row(dict[str, str]):
    """The cells of a row by column, stripped of spaces.

    Attributes:
      line: Where the row ends in the file, from 1.
    """

    def __init__(self, cells: dict[str, str], line: int):
        super().__init__(cells)
        self.line = line


def read_table(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[Row]:
    """The rows of a CSV file (UTF-8 with or without a byte order mark, a header line).

    Args:
      path: The file.
      columns: That must be there, each once; others may be.
      delimiter: Between the cells: a comma or a tab.

    Raises:
      UserError: No such file, another dialect or encoding, a missing column, no rows, or a row of
        another length than the header.
    """
    sheet = read_sheet(path, delimiter)
    missing = [name for name in columns if sheet.header.count(name) != 1]
    if missing:
        raise UserError(
            f"{path}: the columns are {sheet.header}; {', '.join(map(repr, missing))} "
            f"{'is' if len(missing) == 1 else 'are'} wanted, once each{sheet.delimiter_hint()}"
        )
    return [
        Row(dict(zip(sheet.header, cells, strict=True)), line)
        for cells, line in zip(sheet.rows, sheet.lines, strict=True)
    ]


def by_id(path: Path, rows: Iterable[Row], column: str) -> dict[str, Row]:
    """The rows by the name in a column, in order.

    Raises:
      UserError: A name is empty, names a folder or occurs twice.
    """
    found: dict[str, Row] = {}
    for row in rows:
        name = row[column]
        if not name:
            raise row_error(path, row.line, f"column {column!r} is empty; a name is wanted")
        if not is_name(name):
            raise row_error(
                path,
                row.line,
                f"column {column!r} holds {name!r}; a name without folders is wanted",
            )
        first = found.setdefault(name, row)
        if first is not row:
            raise row_error(
                path,
                row.line,
                f"{column} {name!r} has a row already, at line {first.line}; leave one of them",
            )
    return found


def is_name(text: str) -> bool:
    """Whether it can be the name of a file in a folder, and nothing outside."""
    return "/" not in text and "\\" not in text and text not in (".", "..")


def one_hot(path: Path, row: Row, columns: Sequence[str]) -> int:
    """The index of the column that is 1, where the others are 0.

    Raises:
      UserError: Anything else is in them.
    """
    values = [number(path, row, column, (0, 1)) for column in columns]
    if sum(values) != 1:
        raise row_error(
            path,
            row.line,
            f"{sum(values):g} of the columns {', '.join(columns)} are 1; exactly one is wanted",
        )
    return values.index(1)


def row_error(path: Path, line: int, what: str) -> UserError:
    """The error for something in one line of a file."""
    return UserError(f"{path}, line {line}: {what}")


def number(path: Path, row: Row, column: str, allowed: Collection[float]) -> float:
    """The number in a cell.

    Raises:
      UserError: It is none of those allowed, or no number.
    """
    try:
        value = float(row[column])
    except ValueError:
        value = float("nan")
    if value not in allowed:
        wanted = ", ".join(f"{number:g}" for number in allowed)
        raise row_error(
            path, row.line, f"column {column!r} holds {row[column]!r}; one of {wanted} is wanted"
        )
    return value
