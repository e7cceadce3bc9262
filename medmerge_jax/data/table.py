"""A folder of images with a table of their labels."""

import collections
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from medmerge_jax.data.dataset import DataSet, Split, build
from medmerge_jax.data.folder import find_images, sorted_names
from medmerge_jax.data.sheets import Row, Sheet, claim, read_sheet
from medmerge_jax.errors import UserError
from medmerge_jax.images.formats import SUFFIXES

_LOG = logging.getLogger(__name__)

_WHOLE_NUMBER = re.compile(r"([0-9]+)(?:\.0*)?")
"""Also as "2.0", as programs write a column with gaps."""

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
    rows = sheet.rows
    splits = None if split_name is None else np.array([row.split(split_name) for row in rows])
    if group_name is None:
        groups = None
    else:  # An image whose group is unknown is a group of its own.
        groups = tuple(row[group_name] or f"(no group, line {row.line})" for row in rows)
    ids = tuple(row[image_name] for row in rows)
    files = Split(ids, _find(sheet, image_name, Path(images)), labels, groups)
    return build(sheet.path.stem, names, files, splits, fractions, seed)


def _label_vector(
    sheet: Sheet, column: str, classes: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    values = [row[column] for row in sheet.rows]
    if "" in values:
        raise sheet.rows[values.index("")].error(f"the label in column {column!r} is empty")
    whole = [_WHOLE_NUMBER.fullmatch(value) for value in values]
    if all(whole):
        values = [number[1] for number in whole if number]
    names = list(classes) or sorted_names(values)
    index = {name: position for position, name in enumerate(names)}
    for row, value in zip(sheet.rows, values, strict=True):
        if value not in index:
            raise row.error(
                f"the label {value!r} in column {column!r} is none of the classes {names}; "
                "correct it, or add it to data.classes"
            )
    return names, np.array([index[value] for value in values], np.int32)


def _label_matrix(
    sheet: Sheet, columns: list[str], classes: Sequence[str], multilabel: bool
) -> tuple[list[str], np.ndarray]:
    names = list(classes) or columns
    if sorted(names) != sorted(columns):
        raise UserError(
            f"{sheet.path}: data.classes {names} and data.label_columns {columns} are not the "
            "same names; with a column per class they must be"
        )
    if not multilabel:
        hint = ", or set data.multilabel"
        return names, np.array([row.one_hot(names, hint) for row in sheet.rows], np.int32)
    empty = ", or nothing where it is unknown,"
    labels = [
        [
            np.nan if row[name].lower() in ("", "nan") else row.number(name, (0, 1), empty)
            for name in names
        ]
        for row in sheet.rows
    ]
    return names, np.array(labels, np.float32)


def _find(sheet: Sheet, column: str, root: Path) -> tuple[Path, ...]:
    """The file of each row."""
    index = _Index(root)
    owners: dict[Path, Row] = {}
    missing: list[Row] = []
    for row in sheet.rows:
        value = row[column]
        files = index.find(value) if value else []
        if len(files) > 1:
            shown = " and ".join(os.fspath(root / path) for path in files[:2])
            raise row.error(f"{value!r} could be {shown}; write the path relative to {root}")
        if not files:
            missing.append(row)
            continue
        claim(owners, root / files[0], row, f"the image {value!r}")
    if missing:
        raise _missing_error(sheet, column, missing, root, index)
    if index.number > len(owners):
        _LOG.info("%s: ignored %d images without a row", root, index.number - len(owners))
    return tuple(owners)


def _missing_error(
    sheet: Sheet, column: str, missing: list[Row], root: Path, index: "_Index"
) -> UserError:
    shown = ", ".join(f"line {row.line} {row[column]!r}" for row in missing[:_LISTED])
    more = ", ..." if len(missing) > _LISTED else ""
    value = missing[0][column]
    same_stem = index.find(_stem(value)) if value else []
    hint = f"; there is {same_stem[0]}, of another type" if same_stem else ""
    return UserError(
        f"{sheet.path}: {len(missing)} of {len(sheet.rows)} rows have no image file below {root} "
        f"(column {column!r}): {shown}{more}{hint}; {index.number} images ({', '.join(SUFFIXES)}) "
        "are there; correct data.root or data.image_column, or remove the rows"
    )


class _Index:
    """The images below a folder, by path and by bare name, with and without extension."""

    def __init__(self, root: Path):
        if not root.is_dir():
            what = "is a file" if root.exists() else "does not exist"
            raise UserError(f"{root}: {what}; the folder of the images is wanted")
        files = sorted(path.relative_to(root).as_posix() for path in find_images(root))
        self._root_name, self.number = root.resolve().name, len(files)
        self._by_name: dict[str, list[str]] = collections.defaultdict(list)
        for file in files:
            name = PurePosixPath(file).name
            for key in {file, _stem(file)} | {name, _stem(name)}:
                self._by_name[key].append(file)

    def find(self, value: str) -> list[str]:
        """Relative paths of the files that `value` may mean.

        An exact path is preferred to a bare name. Tables often name the root itself, so leading
        folders of `value` are skipped as long as a folder is left, or up to the root's name.
        """
        parts = [part for part in value.replace("\\", "/").split("/") if part not in ("", ".")]
        for start in range(len(parts)):
            name = "/".join(parts[start:])
            files = self._by_name.get(name, [])
            exact = [file for file in files if name in (file, _stem(file))]
            if len(parts) == 1:
                return exact if len(exact) == 1 else files
            if exact and (start == 0 or "/" in name or parts[start - 1] == self._root_name):
                return exact
        return []


def _stem(name: str) -> str:
    """`name` without the extension of an image; other dots are part of the name."""
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in SUFFIXES else name
