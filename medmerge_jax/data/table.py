"""A folder of images with a table of their labels."""

import collections
import csv
import dataclasses
import difflib
import logging
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from medmerge_jax.data.dataset import DataSet, build
from medmerge_jax.data.folder import find_images, sorted_names
from medmerge_jax.data.splits import SPLIT_NAMES
from medmerge_jax.errors import UserError
from medmerge_jax.images.formats import SUFFIXES

_LOG = logging.getLogger(__name__)

_USUAL_NAMES = {
    "image_column": ("filename", "file", "image", "image_id", "id", "id_code", "path"),
    "label_columns": ("label", "class", "diagnosis", "level", "target"),
    "split_column": ("split",),
    "group_column": ("group", "patient", "patient_id", "lesion_id"),
}

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_A_DELIMITER = {",": "a comma", "\t": "a tab"}

_LISTED = 5
"""Rows that an error lists."""


def image_table(
    table: str | os.PathLike[str],
    images: str | os.PathLike[str],
    *,
    image_column: str = "",
    label_columns: Sequence[str] = (),
    split_column: str = "",
    group_column: str = "",
    classes: Sequence[str] = (),
    multilabel: bool = False,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> DataSet:
    """Reads a CSV file (UTF-8, commas, a header line) with a row per image.

    An image is named with or without its extension, and by its path relative to `images` or, if
    that is unique, its bare name.

    Labels are one of:

    - one column of class names or numbers;
    - several columns, one per class, exactly one of them 1 in each row;
    - with `multilabel`, columns of 1, 0 or nothing (unknown).

    A column name that is empty is found among the usual ones (filename, image, id_code, ...;
    label, class, diagnosis, ...; split; group, patient_id, lesion_id, ...). Without a split
    column, splits are made: stratified, and no group in two of them.

    Args:
      table: The CSV file.
      images: The folder of the images, searched to any depth once.
      image_column: Name of the image.
      label_columns: See above.
      split_column: Holds train, val (valid, validation) or test.
      group_column: Patient or lesion of the image.
      classes: Names in the order wanted; by default all that occur, sorted (numbers by value), or
        the label columns in their order.
      multilabel: See above.
      fractions: Of train, val and test, where splits are made.
      seed: Of the splits that are made.

    Raises:
      UserError: Anything in the table that is not as above, with file, line and value.
    """
    sheet = read_sheet(Path(table))
    image_name = sheet.column("image_column", image_column)
    if image_name is None:
        raise sheet.undetected("image_column")
    split_name = sheet.column("split_column", split_column)
    group_name = sheet.column("group_column", group_column)
    label_names = [sheet.named("label_columns", name) for name in label_columns]
    if not label_names:
        detected = sheet.column("label_columns", "")
        if detected is None or multilabel:
            raise sheet.undetected("label_columns")
        label_names = [detected]

    if multilabel or len(label_names) > 1:
        names, labels = _label_matrix(sheet, label_names, classes, multilabel)
    else:
        names, labels = _label_vector(sheet, label_names[0], classes)
    ids = sheet.values(image_name)
    return build(
        sheet.path.stem,
        names,
        ids,
        _find(sheet, image_name, Path(images)),
        labels,
        None if group_name is None else _groups(sheet, group_name),
        None if split_name is None else _assignment(sheet, split_name),
        fractions,
        seed,
    )


@dataclasses.dataclass(frozen=True)
class Sheet:
    """The cells of a table, stripped of spaces, and the line where each row ends."""

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
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
        index = self.header.index(name)
        return [row[index] for row in self.rows]

    def at(self, row: int) -> str:
        """Where a row is, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def delimiter_hint(self) -> str:
        """What to say of the delimiter where a column is missing; empty if it is as wanted."""
        if len(self.header) == 1:
            for delimiter, spoken in _DELIMITERS.items():
                if delimiter in self.header[0]:
                    wanted = _DELIMITERS[self.delimiter]
                    return f". It is separated by {spoken}; save it with {wanted}"
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
    sheet = Sheet(path, header, rows, lines[1:], delimiter)
    for row, cells in enumerate(rows):
        if len(cells) != len(header):
            raise UserError(
                f"{sheet.at(row)}: has {len(cells)} fields, the header has {len(header)}; a field "
                f"with {_A_DELIMITER[delimiter]} must be in double quotes"
            )
    return sheet


def _label_vector(
    sheet: Sheet, column: str, classes: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    values = sheet.values(column)
    for row, value in enumerate(values):
        if not value:
            raise UserError(f"{sheet.at(row)}: the label in column {column!r} is empty")
    whole = [_whole_number(value) for value in values]
    if all(number is not None for number in whole):  # "2.0", as programs write a column with gaps
        values = [number for number in whole if number is not None]
    names = list(classes) or sorted_names(values)
    index = {name: position for position, name in enumerate(names)}
    for row, value in enumerate(values):
        if value not in index:
            raise UserError(
                f"{sheet.at(row)}: the label {value!r} in column {column!r} is none of the "
                f"classes {names}; correct it, or add it to data.classes"
            )
    return names, np.array([index[value] for value in values], np.int32)


def _whole_number(value: str) -> str | None:
    digits, _, zeros = value.partition(".")
    return digits if digits.isascii() and digits.isdigit() and not zeros.strip("0") else None


def _label_matrix(
    sheet: Sheet, columns: list[str], classes: Sequence[str], multilabel: bool
) -> tuple[list[str], np.ndarray]:
    names = list(classes) or columns
    if sorted(names) != sorted(columns):
        raise UserError(
            f"{sheet.path}: data.classes {names} and data.label_columns {columns} are not the "
            "same names; with a column per class they must be"
        )
    labels = np.empty((len(sheet.rows), len(names)), np.float32)
    for position, name in enumerate(names):
        for row, value in enumerate(sheet.values(name)):
            labels[row, position] = _binary(sheet, row, name, value, multilabel)
    if multilabel:
        return names, labels
    sums = labels.sum(axis=1)
    if np.any(sums != 1):
        row = int(np.argmax(sums != 1))
        raise UserError(
            f"{sheet.at(row)}: {int(sums[row])} of the columns {names} are 1; exactly one is "
            "wanted, or set data.multilabel"
        )
    return names, labels.argmax(axis=1).astype(np.int32)


def _binary(sheet: Sheet, row: int, column: str, value: str, multilabel: bool) -> float:
    if multilabel and value.lower() in ("", "nan"):
        return np.nan
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if number not in (0.0, 1.0):
        empty = ", or nothing where it is unknown," if multilabel else ""
        raise UserError(
            f"{sheet.at(row)}: column {column!r} holds {value!r}; 0 or 1{empty} is wanted"
        )
    return number


def _assignment(sheet: Sheet, column: str) -> np.ndarray:
    values = sheet.values(column)
    for row, value in enumerate(values):
        if value.lower() not in SPLIT_NAMES:
            raise UserError(
                f"{sheet.at(row)}: the split in column {column!r} is {value!r}; one of "
                f"{', '.join(SPLIT_NAMES)} is wanted"
            )
    return np.array([SPLIT_NAMES[value.lower()] for value in values])


def _groups(sheet: Sheet, column: str) -> list[str]:
    # An image whose group is unknown is a group of its own.
    return [
        value or f"(no group, line {line})"
        for value, line in zip(sheet.values(column), sheet.lines, strict=True)
    ]


def _find(sheet: Sheet, column: str, root: Path) -> list[Path]:
    """The file of each row."""
    index = _Index(root)
    paths: list[Path] = []
    first: dict[Path, int] = {}
    missing: list[int] = []
    for row, value in enumerate(sheet.values(column)):
        found = index.find(value) if value else []
        if len(found) > 1:
            shown = " and ".join(os.fspath(root / path) for path in found[:2])
            raise UserError(
                f"{sheet.at(row)}: {value!r} could be {shown}; write the path relative to {root}"
            )
        if not found:
            missing.append(row)
            continue
        path = root / found[0]
        if path in first:
            raise UserError(
                f"{sheet.at(row)}: the image {value!r} has a row already, at line "
                f"{sheet.lines[first[path]]}; leave one of them"
            )
        first[path] = row
        paths.append(path)
    if missing:
        raise _missing_error(sheet, column, missing, root, index)
    if len(index) > len(paths):
        _LOG.info("%s: ignored %d images without a row", root, len(index) - len(paths))
    return paths


def _missing_error(
    sheet: Sheet, column: str, missing: list[int], root: Path, index: "_Index"
) -> UserError:
    values = sheet.values(column)
    shown = ", ".join(f"line {sheet.lines[row]} {values[row]!r}" for row in missing[:_LISTED])
    more = ", ..." if len(missing) > _LISTED else ""
    same_stem = index.find(_stem(values[missing[0]])) if values[missing[0]] else []
    hint = f"; there is {same_stem[0]}, of another type" if same_stem else ""
    return UserError(
        f"{sheet.path}: {len(missing)} of {len(values)} rows have no image file below {root} "
        f"(column {column!r}): {shown}{more}{hint}; {len(index)} images ({', '.join(SUFFIXES)}) "
        "are there; correct data.root or data.image_column, or remove the rows"
    )


class _Index:
    """The images below a folder, by path and by bare name, with and without extension."""

    def __init__(self, root: Path):
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise UserError(f"{root}: {what}; the folder of the images is wanted")
        files = sorted(path.relative_to(root).as_posix() for path in find_images(root))
        self._root_name = root.resolve().name
        self._number = len(files)
        self._by_name: dict[str, list[str]] = collections.defaultdict(list)
        for file in files:
            name = PurePosixPath(file).name
            for key in {file, _stem(file)} | {name, _stem(name)}:
                self._by_name[key].append(file)

    def __len__(self) -> int:
        return self._number

    def find(self, value: str) -> list[str]:
        """Relative paths of the files that `value` may mean.

        An exact path is preferred to a bare name. Tables often name the root itself, so leading
        folders of `value` are skipped as long as a folder is left, or up to the root's name.
        """
        parts = [part for part in value.replace("\\", "/").split("/") if part not in ("", ".")]
        for start in range(len(parts)):
            wanted = "/".join(parts[start:])
            found = self._by_name.get(wanted, [])
            exact = [file for file in found if wanted in (file, _stem(file))]
            if len(parts) == 1:
                return exact if len(exact) == 1 else found
            if exact and (start == 0 or "/" in wanted or parts[start - 1] == self._root_name):
                return exact
        return []


def _stem(name: str) -> str:
    """`name` without the extension of an image; other dots are part of the name."""
    for suffix in SUFFIXES:
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name
