"""Strict reading of tables: whatever is wrong is named with file and line."""

import csv
import dataclasses
import difflib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from medmerge_jax.errors import UserError

_USUAL_NAMES = {
    "image_column": ("filename", "file", "image", "image_id", "id", "id_code", "path"),
    "label_columns": ("label", "class", "diagnosis", "level", "target"),
    "split_column": ("split",),
    "group_column": ("group", "patient", "patient_id", "lesion_id"),
}

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_A_DELIMITER = {",": "a comma", "\t": "a tab"}


class Row(dict[str, str]):
    """The cells of a row by column, stripped of spaces.

    Attributes:
      table: The file.
      line: Where the row ends in the file, from 1.
    """

    def __init__(self, cells: dict[str, str], table: Path, line: int):
        super().__init__(cells)
        self.table, self.line = table, line

    def error(self, what: str) -> UserError:
        """The error for something in this row, with file and line."""
        return UserError(f"{self.table}, line {self.line}: {what}")

    def number(self, column: str, allowed: Collection[float]) -> float:
        """The number in a cell.

        Raises:
          UserError: It is none of those allowed, or no number.
        """
        try:
            value = float(self[column])
        except ValueError:
            value = float("nan")
        if value not in allowed:
            choices = ", ".join(f"{number:g}" for number in allowed)
            raise self.error(
                f"column {column!r} holds {self[column]!r}; one of {choices} is wanted"
            )
        return value

    def one_hot(self, columns: Sequence[str]) -> int:
        """The index of the column that is 1, where the others are 0.

        Raises:
          UserError: Anything else is in them.
        """
        values = [self.number(column, (0, 1)) for column in columns]
        if sum(values) != 1:
            raise self.error(
                f"{sum(values):g} of the columns {', '.join(columns)} are 1; exactly one is wanted"
            )
        return values.index(1)

    def name(self, column: str) -> str:
        """A cell that can be the name of a file in a folder, and of nothing outside.

        Raises:
          UserError: It is empty or names a folder.
        """
        name = self[column]
        if not name:
            raise self.error(f"column {column!r} is empty; a name is wanted")
        if "/" in name or "\\" in name or name in (".", ".."):
            raise self.error(f"column {column!r} holds {name!r}; a name without folders is wanted")
        return name

    def image_file(self, path: Path, suffixes: Sequence[str] = ("",)) -> Path:
        """`path` with the first of the suffixes for which a file exists.

        Args:
          path: The image, without its extension if there are suffixes.
          suffixes: Extensions that it may have.

        Raises:
          UserError: There is none, or it is empty.
        """
        for suffix in suffixes:
            # Not `with_suffix`: a dot may be part of the name.
            candidate = path.with_name(path.name + suffix)
            if not exists(candidate):
                continue
            if not candidate.stat().st_size:
                raise self.error(f"the image {candidate} is empty (0 bytes); replace it")
            return candidate
        shown = path.with_name(f"{path.name}{suffixes[0]}")
        others = f" (nor one with {', '.join(suffixes[1:])})" if len(suffixes) > 1 else ""
        raise self.error(f"there is no image {shown}{others}; add it, or remove the row")


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
      path: The file.
      header: The names of the columns, as they stand there.
      rows: All rows below the header.
      delimiter: Between the cells.
    """

    path: Path
    header: list[str]
    rows: list[Row]
    delimiter: str = ","

    def column(self, field: str, name: str) -> str | None:
        """The column `name`; if that is empty the first of the usual ones, None without."""
        if name:
            return self.named(field, name)
        lower = [column.lower() for column in self.header]
        for usual in _USUAL_NAMES[field]:
            if usual in lower:
                return self.named(field, self.header[lower.index(usual)])
        return None

    def named(self, field: str, name: str) -> str:
        """`name`, if there is exactly one such column."""
        count = self.header.count(name)
        if count == 1:
            return name
        if count > 1:
            raise UserError(f"{self.path}: {count} columns are called {name!r}; rename the others")
        near = difflib.get_close_matches(name, self.header, 1, cutoff=0.5)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise UserError(
            f"{self.path}: data.{field} names {name!r}, but the columns are {self.header}{hint}"
            f"{self.delimiter_hint()}"
        )

    def undetected(self, field: str) -> UserError:
        """The error for a column that is needed and cannot be found."""
        return UserError(
            f"{self.path}: set data.{field} to one of the columns {self.header}; none of them has "
            f"a usual name ({', '.join(_USUAL_NAMES[field])}){self.delimiter_hint()}"
        )

    def values(self, name: str) -> list[str]:
        """The cells of a column."""
        return [row[name] for row in self.rows]

    def delimiter_hint(self) -> str:
        """What to say of the delimiter where a column is missing; empty if it is as wanted."""
        if len(self.header) == 1:
            for delimiter, spoken in _DELIMITERS.items():
                if delimiter in self.header[0]:
                    other = _DELIMITERS[self.delimiter]
                    return f". It is separated by {spoken}; save it with {other}"
        return ""


def read_sheet(path: Path, delimiter: str = ",") -> Sheet:
    """Reads a CSV file (UTF-8, a header line).

    Args:
      path: The file.
      delimiter: Between the cells.

    Raises:
      UserError: The file is missing, is no such file, has no rows, or has rows that are not as
        long as the header.
    """
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True, delimiter=delimiter)
            for cells in reader:
                if any(cell.strip() for cell in cells):
                    rows.append([cell.strip() for cell in cells])
                    lines.append(reader.line_num)
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; the table of labels is wanted") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not a UTF-8 text file ({error}); save it as CSV UTF-8"
        ) from error
    except csv.Error as error:
        line = lines[-1] + 1 if lines else 1
        raise UserError(f"{path}: is not a CSV file ({error}, at line {line})") from error
    if len(rows) < 2:
        what = "has a header but no rows" if rows else "is empty"
        raise UserError(f"{path}: {what}; a header line and a row per image are wanted")
    header, *rows = rows
    for cells, line in zip(rows, lines[1:], strict=True):
        if len(cells) != len(header):
            raise Row({}, path, line).error(
                f"has {len(cells)} fields, the header has {len(header)}; a field with "
                f"{_A_DELIMITER[delimiter]} must be in double quotes"
            )
    named = (dict(zip(header, cells, strict=True)) for cells in rows)
    lined = zip(named, lines[1:], strict=True)
    return Sheet(path, header, [Row(cells, path, line) for cells, line in lined], delimiter)


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
    return sheet.rows


def by_id(rows: Iterable[Row], column: str) -> dict[str, Row]:
    """The rows by the name in a column, in order.

    Raises:
      UserError: A name is empty, names a folder or occurs twice.
    """
    named: dict[str, Row] = {}
    for row in rows:
        name = row.name(column)
        first = named.setdefault(name, row)
        if first is not row:
            raise row.error(
                f"{column} {name!r} has a row already, at line {first.line}; leave one of them"
            )
    return named


def check_disjoint(*tables: dict[str, Row]) -> None:
    """Refuses a name that two tables have.

    Raises:
      UserError: It names both rows.
    """
    seen: dict[str, Row] = {}
    for table in tables:
        for name, row in table.items():
            first = seen.setdefault(name, row)
            if first is not row:
                raise row.error(
                    f"image {name!r} is in {first.table} too, at line {first.line}; leave one of "
                    "them"
                )


def exists(path: Path) -> bool:
    """Whether a file exists; one whose name is too long or holds a zero byte does not."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
