"""Strict reading of tables: whatever is wrong is named with file and line."""

import codecs
import csv
import dataclasses
import difflib
import io
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from medmerge_jax.data.splits import SPLITS, plain, split_of
from medmerge_jax.errors import UserError

_USUAL_NAMES = {
    "image_column": ("filename", "file", "image", "image_id", "id", "id_code", "path"),
    "label_columns": ("label", "class", "diagnosis", "level", "target"),
    "split_column": ("split",),
    "group_column": ("group", "patient", "patient_id", "lesion_id"),
}
"""The first that is there is taken."""

_MORE_NAMES = {
    "image_column": (
        "imagename", "imageindex", "imagefile", "imagefilename", "imagepath", "filepath", "imgname",
        "imgid", "imgpath", "img", "imageno", "photo", "picture",
    ),
    "label_columns": (
        "labels", "dx", "findinglabels", "findinglabel", "finding", "findings", "category",
        "classname", "labelname", "classid", "labelid", "grade", "severity",
    ),
    "split_column": ("partition", "set", "subset", "fold", "phase", "dataset", "datasplit"),
    "group_column": (
        "patientcode", "patientnumber", "patientno", "patientname", "patientkey", "pid",
        "subject", "subjectid", "subjectcode", "subjectno", "participant", "participantid",
        "participantcode", "personid", "mrn", "case", "caseid", "caseno", "casenumber",
        "studyinstanceuid", "studyid", "study", "accessionnumber", "examid", "lesion", "lesioncode",
    ),
}  # fmt: skip
"""Taken where none of the usual names is there; as `splits.plain` makes them."""

MEANINGS = {"zero": 0.0, "one": 1.0, "unknown": math.nan}
"""What a label that is uncertain or blank may count as."""

NO_COLUMN = "none"
"""As the name of a split or group column: none is taken, whatever there is."""

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


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

    def number(self, column: str, allowed: Collection[float], otherwise: str = "") -> float:
        """The number in a cell; the error also says what else, `otherwise`, may be there.

        Where 0 and 1 are allowed and nothing else, False and True are these.

        Raises:
          UserError: It is none of those allowed, or no number.
        """
        cell = self[column]
        if set(allowed) == {0, 1}:
            cell = {"false": "0", "true": "1"}.get(cell.lower(), cell)
        try:
            value = float(cell)
        except ValueError:
            value = float("nan")
        if value not in allowed:
            choices = ", ".join(f"{number:g}" for number in allowed)
            raise self.error(
                f"column {column!r} holds {self[column]!r}; one of {choices}{otherwise} is wanted"
            )
        return value

    def split(self, column: str) -> int:
        """The index into `SPLITS` of the split that a cell names.

        Raises:
          UserError: It names none.
        """
        index = split_of(self[column])
        if index is None:
            raise self.error(
                f"the split in column {column!r} is {self[column]!r}; one of "
                f"{', '.join(SPLITS)} is wanted, or a usual spelling of these"
            )
        return index

    def one_hot(self, columns: Sequence[str], otherwise: str = "") -> int:
        """The index of the column that is 1, where the others are 0.

        Raises:
          UserError: Anything else is in them.
        """
        values = [self.number(column, (0, 1)) for column in columns]
        if sum(values) != 1:
            raise self.error(
                f"{sum(values):g} of the columns {', '.join(columns)} are 1; exactly one is "
                f"wanted{otherwise}"
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

    def image_file(self, *candidates: Path) -> Path:
        """The first of the candidates that is a file.

        Raises:
          UserError: There is none, or it is empty.
        """
        path = next(filter(_is_file, candidates), None)
        if path is None:
            others = "".join(f", nor {other}" for other in candidates[1:])
            raise self.error(
                f"there is no image {candidates[0]}{others}; add it, or remove the row"
            )
        if not path.stat().st_size:
            raise self.error(f"the image {path} is empty (0 bytes); replace it")
        return path


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
      path: The file.
      header: The names of the columns, as they stand there.
      rows: All rows below the header.
      delimiter: Between the cells.
      notes: What is unusual about the file, a sentence each.
    """

    path: Path
    header: list[str]
    rows: list[Row]
    delimiter: str = ","
    notes: tuple[str, ...] = ()

    def column(self, field: str, name: str) -> str | None:
        """The column `name`; if that is empty the first of the usual ones, None without."""
        if name == NO_COLUMN and name not in self.header:
            return None
        if name:
            return self.named(field, name)
        found = self.usual(field)
        return self.named(field, found[0]) if found else None

    def usual(self, field: str) -> list[str]:
        """All columns with a usual name for a field, the one that is preferred first."""
        lower = [column.lower() for column in self.header]
        keys = [plain(column) for column in self.header]
        names = [self.header[lower.index(one)] for one in _USUAL_NAMES[field] if one in lower]
        others = [*(plain(one) for one in _USUAL_NAMES[field]), *_MORE_NAMES[field]]
        names += [self.header[keys.index(one)] for one in others if one in keys]
        return list(dict.fromkeys(names))

    def strictly_usual(self, field: str, name: str) -> bool:
        """Whether a name is one of those that are taken whatever the cells are."""
        return name.lower() in _USUAL_NAMES[field]

    def values(self, column: str) -> list[str]:
        """The cells of a column."""
        return [row[column] for row in self.rows]

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

    def undetected(self, field: str, hint: str = "") -> UserError:
        """The error for a column that is needed and cannot be found."""
        return UserError(
            f"{self.path}: set data.{field} to one of the columns {self.header}; none of them has "
            f"a usual name ({', '.join(_USUAL_NAMES[field])}){self.delimiter_hint()}{hint}"
        )

    def delimiter_hint(self) -> str:
        """What to say of the delimiter where a column is missing; empty if it is as wanted."""
        if len(self.header) == 1:
            for delimiter, spoken in _DELIMITERS.items():
                if delimiter in self.header[0]:
                    other = _DELIMITERS[self.delimiter]
                    return f". It is separated by {spoken}; save it with {other}"
        return ""


def read_any_sheet(path: Path) -> Sheet:
    """Reads a table of unknown origin: the encoding and the delimiter are found.

    UTF-8, UTF-16, or else Windows' Latin-1; commas, semicolons, tabs or bars. What is not UTF-8
    with commas stands in the notes.

    Raises:
      UserError: See `read_sheet`.
    """
    content = _content(path)
    encoding, spoken = _encoding(content, path)
    text = content.decode(encoding)
    if text.startswith("sep=") and text[4:5] in _DELIMITERS:  # as Excel understands it
        delimiter, text = text[4], text[5:].lstrip(" ;,\t|")  # The rest is an empty line.
    else:
        delimiter = _delimiter(text)
    notes = [f"{path.name} is not UTF-8 but read as {spoken}"] if spoken else []
    if delimiter != ",":
        notes.append(f"{path.name} is separated by {_DELIMITERS[delimiter]}")
    return _sheet(path, text, delimiter, tuple(notes))


def read_sheet(path: Path, delimiter: str = ",") -> Sheet:
    """Reads a CSV file (UTF-8, a header line).

    Args:
      path: The file.
      delimiter: Between the cells.

    Raises:
      UserError: The file is missing, is no such file, has no rows, or has rows that are not as
        long as the header.
    """
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not a UTF-8 text file ({error}); save it as CSV UTF-8"
        ) from error
    return _sheet(path, text, delimiter)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: there is no such file; the table of labels is wanted") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error


def _encoding(content: bytes, path: Path) -> tuple[str, str]:
    """Python's name of an encoding, and what to call it if it is not UTF-8."""
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        candidates = [("utf-16", "UTF-16")]
    elif content[1:40:2].count(0) > 15:
        candidates = [("utf-16-le", "UTF-16")]
    elif content[0:40:2].count(0) > 15:
        candidates = [("utf-16-be", "UTF-16")]
    else:
        candidates = [("utf-8-sig", "")]
        if not any(byte < 32 and byte not in b"\t\n\f\r" for byte in set(content)):
            candidates += [("cp1252", "Latin-1"), ("latin-1", "Latin-1")]
    for encoding, spoken in candidates:
        try:
            content.decode(encoding)
        except UnicodeDecodeError:
            continue
        return encoding, spoken
    raise UserError(
        f"{path}: is not a text file in UTF-8, UTF-16 or Latin-1 (it begins with "
        f"{content[:8]!r}); save it as CSV UTF-8"
    )


def _delimiter(text: str) -> str:
    """A comma, unless another delimiter alone gives all rows as many cells as the header."""
    if _is_separated(text, ","):
        return ","
    fitting = [one for one in _DELIMITERS if _is_separated(text, one)]
    header = text.lstrip().partition("\n")[0]
    if not fitting and "," not in header:
        fitting = [one for one in _DELIMITERS if one in header]
    return fitting[0] if len(fitting) == 1 else ","


def _is_separated(text: str, delimiter: str) -> bool:
    try:
        lines = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        lengths = {len(cells) for cells in lines if any(cell.strip() for cell in cells)}
    except csv.Error:
        return False
    return len(lengths) == 1 and lengths != {1}


def _sheet(path: Path, text: str, delimiter: str, notes: tuple[str, ...] = ()) -> Sheet:
    lines: list[tuple[list[str], int]] = []
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        for cells in reader:
            stripped = [cell.strip() for cell in cells]
            if any(stripped):
                lines.append((stripped, reader.line_num))
    except csv.Error as error:
        line = lines[-1][1] + 1 if lines else 1
        raise UserError(f"{path}: is not a CSV file ({error}, at line {line})") from error
    if len(lines) < 2:
        what = "has a header but no rows" if lines else "is empty"
        raise UserError(f"{path}: {what}; a header line and a row per image are wanted")
    (header, _), *body = lines
    for cells, line in body:
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {line}: has {len(cells)} fields, the header has {len(header)}; a "
                f"field with {_DELIMITERS[delimiter]} must be in double quotes"
            )
    rows = [Row(dict(zip(header, cells, strict=True)), path, line) for cells, line in body]
    return Sheet(path, header, rows, delimiter, notes)


def read_table(path: Path, columns: Sequence[str], delimiter: str = ",") -> list[Row]:
    """The rows of a CSV file (UTF-8 with or without a byte order mark, a header line).

    Args:
      path: The file.
      columns: That must be there, each once; others may be.
      delimiter: Between the cells: a comma or a tab.

    Raises:
      UserError: A column is missing, or see `read_sheet`.
    """
    sheet = read_sheet(path, delimiter)
    missing = [name for name in columns if sheet.header.count(name) != 1]
    if missing:
        raise UserError(
            f"{path}: the columns are {sheet.header}; {', '.join(map(repr, missing))} "
            f"{'is' if len(missing) == 1 else 'are'} wanted, once each{sheet.delimiter_hint()}"
        )
    return sheet.rows


def claim(owners: dict[Any, Row], key: Any, row: Row, image: str) -> None:
    """Makes a row the only one of a key, which the error calls `image`.

    Raises:
      UserError: The key has a row already; it names both.
    """
    first = owners.setdefault(key, row)
    if first is not row:
        place = "" if first.table == row.table else f" in {first.table}"
        raise row.error(
            f"{image} has a row already{place}, at line {first.line}; leave one of them"
        )


def by_id(rows: Iterable[Row], column: str) -> dict[str, Row]:
    """The rows by the name in a column, in order.

    Raises:
      UserError: A name is empty, names a folder or occurs twice.
    """
    named: dict[str, Row] = {}
    for row in rows:
        name = row.name(column)
        claim(named, name, row, f"{column} {name!r}")
    return named


def check_disjoint(*tables: dict[str, Row]) -> None:
    """Refuses a name that two tables have.

    Raises:
      UserError: It names both rows.
    """
    owners: dict[str, Row] = {}
    for name, row in itertools.chain.from_iterable(table.items() for table in tables):
        claim(owners, name, row, f"image {name!r}")


def _is_file(path: Path) -> bool:
    """A file whose name is too long or holds a zero byte does not exist."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
