"""A folder of images with a table of their labels."""

import collections
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from medmerge_jax.data.columns import choose_columns, holds_lists
from medmerge_jax.data.dataset import EXAMPLES, DataSet, Split, build
from medmerge_jax.data.files import count, find_images, refuse_no_folder
from medmerge_jax.data.folder import refuse_same_spelling, sorted_names
from medmerge_jax.data.sheets import MEANINGS, Row, Sheet, claim, read_any_sheet
from medmerge_jax.data.splits import plain, split_of
from medmerge_jax.errors import UserError
from medmerge_jax.images.formats import SUFFIXES

_WHOLE_NUMBER = re.compile(r"([0-9]+)(?:\.0*)?")
"""Also as "2.0", as programs write a column with gaps."""

_MISSING = (
    "", "nan", "n/a", "na", "#n/a", "<na>", "null", "unknown", "missing", "unlabeled", "unlabelled",
    "not available", "-1", "-1.0", "-", "?",
)  # fmt: skip
"""What tables write where a label is missing, in lower case."""

_ANY_SUFFIX = (*SUFFIXES, ".gif", ".jp2", ".ppm")
"""Of image files that a table may name where there is one of another type."""


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
    missing_labels: str = "error",
    exclude: Collection[str] = (),
    uncertain: str = "",
    blank: str = "",
) -> DataSet:
    """Reads a table of text (a header line, cells between commas or the like) with a row per image.

    An image is named with or without its extension, and by its path relative to `images` or, if
    that is unique, its bare name; in any case, and as a file of another type, if no other fits.
    Several rows of an image that say the same are one.

    Labels are one of:

    - one column of class names or numbers;
    - several columns, one per class, exactly one of them 1 in each row;
    - with `multilabel`, columns of 1, 0 or nothing (unknown);
    - with `multilabel`, one column of names with bars between them: "Edema|Effusion".

    A column name that is empty is found among the usual ones (filename, image, id_code, ...;
    label, class, diagnosis, ...; split; group, patient_id, lesion_id, ...). Without a split
    column, splits are made: stratified, and no group in two of them. What was inferred and left
    out stands in the `notes`.

    Args:
      table: The file.
      images: The folder of the images, searched to any depth once.
      image_column: Name of the image.
      label_columns: See above.
      split_column: Holds train, val and test, in usual spellings; "none": splits are made.
      group_column: Patient or lesion of the image; "none": it is not known.
      classes: Names in the order wanted; by default all that occur, sorted (numbers by value), or
        the label columns in their order.
      multilabel: See above.
      fractions: Of train, val and test, where splits are made.
      seed: Of the splits that are made.
      missing_labels: "error", or "drop": rows without a label are left out.
      exclude: Patterns of files that are left out, see `files.find_images`.
      uncertain: What -1 counts as in columns of 1 and 0: "zero", "one" or "unknown"; by default
        it is an error.
      blank: What nothing counts as there; by default unknown.

    Raises:
      UserError: Anything in the table that is not as above, with file, line and value.
    """
    sheet = read_any_sheet(Path(table))
    index = _Index(Path(images), exclude)
    columns = choose_columns(
        sheet,
        image_column,
        label_columns,
        split_column,
        group_column,
        multilabel,
        lambda cell: len(index.find(cell)[0]) == 1,
    )
    notes = [*sheet.notes, *columns.notes]
    rows = sheet.rows
    listed = multilabel and len(columns.labels) == 1
    listed = listed and holds_lists(sheet.values(columns.labels[0]))
    if listed or not multilabel:
        drop = missing_labels == "drop"
        rows, left_out = _without_missing(sheet, columns.labels, classes, drop)
        notes += left_out
    told = [columns.image, *columns.labels, columns.split, columns.group]
    rows, repeated = _without_repeats(rows, [name for name in told if name is not None])
    notes += repeated
    if listed:
        names, labels, read = _label_lists(rows, columns.labels[0], classes)
        notes += read
    elif multilabel or len(columns.labels) > 1:
        names, labels = _label_matrix(
            sheet, rows, columns.labels, classes, multilabel, uncertain, blank, notes
        )
    else:
        names, labels = _label_vector(sheet, rows, columns.labels[0], classes)
    notes += [f"{name!r} is read as a class" for name in names if name.lower() == "none"]
    split, group = columns.split, columns.group
    splits = None if split is None else np.array([row.split(split) for row in rows])
    if group is None:
        groups = None
    else:  # An image whose group is unknown is a group of its own.
        groups = tuple(row[group] or f"(no group, line {row.line})" for row in rows)
    ids = tuple(row[columns.image] for row in rows)
    paths, found = _find(sheet, rows, columns.image, index)
    files = Split(ids, paths, labels, groups)
    notes += [*index.notes, *found]
    return build(sheet.path.stem, names, files, splits, fractions, seed, notes=notes)


def _without_missing(
    sheet: Sheet, columns: Sequence[str], classes: Collection[str], drop: bool
) -> tuple[list[Row], list[str]]:
    """The rows that have a label, and a sentence on the others."""

    def is_missing(row: Row) -> bool:
        cells = [row[column] for column in columns]
        return all(cell.lower() in _MISSING and cell not in classes for cell in cells)

    missing = [row for row in sheet.rows if is_missing(row)]
    if not missing:
        return sheet.rows, []
    lines = ", ".join(f"line {row.line} {row[columns[0]]!r}" for row in missing[:_LISTED])
    lines += ", ..." if len(missing) > _LISTED else ""
    if len(missing) == len(sheet.rows) or not drop:
        raise UserError(
            f"{sheet.path}: {len(missing)} of {len(sheet.rows)} rows have no label in column "
            f"{columns[0]!r}: {lines}; correct them, or data.missing_labels = 'drop' leaves them "
            "out; if that is a class, name all classes in data.classes"
        )
    without = {row.line for row in missing}
    rows = [row for row in sheet.rows if row.line not in without]
    return rows, [f"{count(len(missing), 'row')} left out for want of a label: {lines}"]


def _without_repeats(rows: Sequence[Row], told: Sequence[str]) -> tuple[list[Row], list[str]]:
    """The first row of each image, whose others say the same, and a sentence on these."""
    image = told[0]
    first: dict[str, Row] = {}
    repeats = []
    for row in rows:
        before = first.setdefault(row[image], row) if row[image] else row
        if before is row:
            continue
        other = next((name for name in told if row[name] != before[name]), None)
        if other is not None:
            raise row.error(
                f"the image {row[image]!r} has a row already, at line {before.line}, and that says "
                f"{before[other]!r} in column {other!r}, this one {row[other]!r}; leave one of them"
            )
        repeats.append(row)
    if not repeats:
        return list(rows), []
    again = {row.line for row in repeats}
    note = f"{count(len(repeats), 'row')} left out: the image has one before that says the same"
    return [row for row in rows if row.line not in again], [note]


def _label_lists(
    rows: Sequence[Row], column: str, classes: Sequence[str]
) -> tuple[list[str], np.ndarray, list[str]]:
    """Several names in a cell; "No Finding" is none of them, unless it is one of the classes."""
    cells = [[name.strip() for name in row[column].split("|") if name.strip()] for row in rows]
    found = sorted_names([name for cell in cells for name in cell])
    nothing = [name for name in found if plain(name) == "nofinding" and name not in classes]
    names = list(classes) or [name for name in found if name not in nothing]
    where = f"{rows[0].table}, column {column!r}"
    if not classes:
        refuse_same_spelling(where, names, "data.classes")
    labels = np.zeros((len(rows), len(names)), np.float32)
    for number, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        for name in cell:
            if name in names:
                labels[number, names.index(name)] = 1
            elif name not in nothing:
                raise _no_class(row, name, column, names)
    note = f"the cells of {column!r} are read as lists of labels with bars between them"
    empty = f"; {nothing[0]!r} is no label, data.classes makes it one" if nothing else ""
    return names, labels, [note + empty]


def _no_class(row: Row, value: str, column: str, names: Sequence[str]) -> UserError:
    return row.error(
        f"the label {value!r} in column {column!r} is none of the classes {list(names)}; "
        "correct it, or add it to data.classes"
    )


def _label_vector(
    sheet: Sheet, rows: Sequence[Row], column: str, classes: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    values = [row[column] for row in rows]
    whole = [_WHOLE_NUMBER.fullmatch(value) for value in values]
    if all(whole):
        values = [number[1] for number in whole if number]
    names = list(classes) or sorted_names(values)
    if not classes:
        refuse_same_spelling(f"{sheet.path}, column {column!r}", names, "data.classes")
        lists = [name for name in names if "|" in name]
        if lists:
            raise UserError(
                f"{sheet.path}: {sum('|' in value for value in values)} cells of column "
                f"{column!r} hold several labels, for instance {lists[0]!r}; set data.multilabel, "
                "or, if that is the name of a class, name all classes in data.classes"
            )
    index = {name: position for position, name in enumerate(names)}
    for row, value in zip(rows, values, strict=True):
        if value not in index:
            raise _no_class(row, value, column, names)
    return names, np.array([index[value] for value in values], np.int32)


def _label_matrix(
    sheet: Sheet,
    rows: Sequence[Row],
    columns: list[str],
    classes: Sequence[str],
    multilabel: bool,
    uncertain: str,
    blank: str,
    notes: list[str],
) -> tuple[list[str], np.ndarray]:
    """A column per class; adds to the notes what blank labels count as."""
    names = list(classes) or columns
    if sorted(names) != sorted(columns):
        raise UserError(
            f"{sheet.path}: data.classes {names} and data.label_columns {columns} are not the "
            "same names; with a column per class they must be"
        )
    if not multilabel:
        hint = ", or set data.multilabel"
        return names, np.array([row.one_hot(names, hint) for row in rows], np.int32)
    empty = ", or nothing where it is unknown,"
    known = (0, 1, -1) if uncertain else (0, 1)
    labels = [
        [
            np.nan if row[name].lower() in ("", "nan") else row.number(name, known, empty)
            for name in names
        ]
        for row in rows
    ]
    codes = np.array(labels, np.float32)
    if blanks := int(np.isnan(codes).sum()):
        many = "1 blank label counts" if blanks == 1 else f"{blanks} blank labels count"
        notes.append(f"{many} as {blank or 'unknown'}; data.blank overrules it")
    read = np.where(np.isnan(codes), np.float32(MEANINGS[blank or "unknown"]), codes)
    return names, np.where(codes == -1, np.float32(MEANINGS[uncertain or "unknown"]), read)


def find_in_folder(sheet: Sheet, column: str, root: Path) -> tuple[list[Path | None], list[str]]:
    """The file below a folder that each row names, None where there is none, and sentences.

    Raises:
      UserError: A row names several files, or no row one that is there.
    """
    index = _Index(root, ())
    files, notes = _files(sheet.rows, column, index)
    if not any(files):
        raise _missing_error(sheet, column, sheet.rows, len(sheet.rows), index)
    return [None if file is None else root / file for file in files], [*index.notes, *notes]


def _find(
    sheet: Sheet, rows: Sequence[Row], column: str, index: "_Index"
) -> tuple[tuple[Path, ...], list[str]]:
    """The file of each row, and sentences on those that are not spelled as in the table."""
    files, notes = _files(rows, column, index)
    owners: dict[Path, Row] = {}
    missing: list[Row] = []
    for row, file in zip(rows, files, strict=True):
        if not file:
            missing.append(row)
            continue
        claim(owners, index.root / file, row, f"the image {row[column]!r}")
    if missing:
        raise _missing_error(sheet, column, missing, len(rows), index)
    if index.number > len(owners):
        notes.append(f"{count(index.number - len(owners), 'image')} left out: without a row")
    return tuple(owners), notes


def _files(rows: Sequence[Row], column: str, index: "_Index") -> tuple[list[str | None], list[str]]:
    """The file of each row, None where there is none; sentences on those spelled otherwise."""
    found = [index.find(row[column]) for row in rows]
    # Where no row at all has its file, their folders are those of another machine.
    if not any(files for files, _ in found):
        found = [index.find_elsewhere(row[column]) for row in rows]
    spelled: dict[str, list[str]] = collections.defaultdict(list)
    for row, (files, how) in zip(rows, found, strict=True):
        value = row[column]
        if len(files) > 1:
            shown = " and ".join(os.fspath(index.root / path) for path in files[:2])
            raise row.error(f"{value!r} could be {shown}; write the path relative to {index.root}")
        if files and how:
            spelled[how].append(f"{value} as {files[0]}")
    notes = [
        f"{count(len(names), 'image')} found {how}{EXAMPLES}{names[0]}"
        for how, names in spelled.items()
    ]
    return [next(iter(files), None) for files, _ in found], notes


def _missing_error(
    sheet: Sheet, column: str, missing: Sequence[Row], number: int, index: "_Index"
) -> UserError:
    shown = ", ".join(f"line {row.line} {row[column]!r}" for row in missing[:_LISTED])
    more = ", ..." if len(missing) > _LISTED else ""
    others = [
        name
        for name in sheet.header
        if name != column
        and all(index.find(cell)[0] for cell in sheet.values(name)[:_LISTED] if cell)
        and any(sheet.values(name)[:_LISTED])
    ]
    hint = f"; the column {others[0]!r} names images that are there" if others else ""
    return UserError(
        f"{sheet.path}: {len(missing)} of {number} rows have no image file below {index.root} "
        f"(column {column!r}): {shown}{more}{hint}; {index.number} images ({', '.join(SUFFIXES)}) "
        "are there; correct data.root or data.image_column, or remove the rows"
    )


class _Names:
    """Files by path and by bare name, each as some function spells them."""

    def __init__(self, files: Iterable[str], spellings: Callable[[str], set[str]]):
        self.spellings = spellings
        self.by_path: dict[str, list[str]] = collections.defaultdict(list)
        self.by_name: dict[str, list[str]] = collections.defaultdict(list)
        for file in files:
            for key in spellings(file):
                self.by_path[key].append(file)
            for key in spellings(PurePosixPath(file).name):
                self.by_name[key].append(file)

    def find(self, parts: Sequence[str], root_name: str) -> list[str]:
        """See `_Index.find`."""
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            exact = self.by_path.get(name, [])
            if len(parts) == 1:
                return exact if len(exact) == 1 else self.by_name.get(name, [])
            if exact and (start == 0 or "/" in name or parts[start - 1] == root_name):
                return exact
        return []


class _Index:
    """The images below a folder, by path and by bare name, with and without extension.

    Attributes:
      root: The folder.
      number: Of images.
      notes: What was left out, a sentence each.
    """

    def __init__(self, root: Path, exclude: Collection[str]):
        refuse_no_folder(root)
        self.root = root
        paths, self.notes = find_images(root, exclude)
        files = [path.relative_to(root).as_posix() for path in paths]
        self._root_name, self.number = root.resolve().name, len(files)
        self._exact = _Names(files, lambda name: {name, _stem(name)})
        self._folded = _Names(files, lambda name: {name.casefold(), _stem(name).casefold()})
        self._stems = _Names(files, lambda name: {_stem(name, _ANY_SUFFIX).casefold()})

    def find(self, value: str) -> tuple[list[str], str]:
        """Relative paths of the files that `value` may mean, and how they differ from it.

        An exact path is preferred to a bare name. Tables often name the root itself, so leading
        folders of `value` are skipped as long as a folder is left, or up to the root's name. If
        there is no such file, upper and lower case are the same; then files of all types are.
        """
        parts = _parts(value)
        if exact := self._exact.find(parts, self._root_name):
            return exact, ""
        folded = _parts(value.casefold())
        root_name = self._root_name.casefold()
        if found := self._folded.find(folded, root_name):
            return found, "in another spelling of upper and lower case"
        stem = _parts(_stem(value, _ANY_SUFFIX).casefold())
        return self._stems.find(stem, root_name), "as a file of another type"

    def find_elsewhere(self, value: str) -> tuple[list[str], str]:
        """As `find`, by bare name, whatever the folders; not in those of another split."""
        parts = _parts(value)
        files, _ = self.find(parts[-1]) if parts else ([], "")
        splits = _splits(parts[:-1])
        files = [file for file in files if not splits or _splits(_parts(file)[:-1]) in ([], splits)]
        return files, "by name alone: their folders are not there"


def _parts(value: str) -> list[str]:
    return [part for part in value.replace("\\", "/").split("/") if part not in ("", ".")]


def _splits(folders: Sequence[str]) -> list[int]:
    named = (split_of(folder) for folder in folders)
    return sorted({index for index in named if index is not None})


def _stem(name: str, suffixes: Sequence[str] = SUFFIXES) -> str:
    """`name` without the extension of an image; other dots are part of the name."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in suffixes else name
