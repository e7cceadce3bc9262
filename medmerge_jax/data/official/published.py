"""From a published layout to a data set: its split, the papers' or the one in a table."""

import collections
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medmerge_jax.data.dataset import DataSet, build
from medmerge_jax.data.official import (
    aptos2019,
    chexpert,
    cifar,
    eyepacs,
    ham10000,
    isic2019,
    medmnist,
    rsna_pneumonia,
)
from medmerge_jax.data.official.records import Layout, Records
from medmerge_jax.data.sheets import Row, claim, read_table
from medmerge_jax.data.splits import SPLITS
from medmerge_jax.errors import UserError, nearest

LAYOUTS: dict[str, Layout] = {
    one.name: one
    for one in (
        aptos2019.LAYOUT,
        chexpert.LAYOUT,
        cifar.CIFAR10,
        cifar.CIFAR100,
        eyepacs.LAYOUT,
        ham10000.LAYOUT,
        isic2019.LAYOUT,
        medmnist.LAYOUT,
        rsna_pneumonia.LAYOUT,
    )
}
"""All published layouts, by name."""

SPLIT_BY = ("group", "image")

_IMAGE_COLUMNS = ("filename", "image", "image_id", "id_code", "patientId", "Path")
"""Names of the image's column in split tables, of which the first that exists is used."""

_LISTED = 5
"""Images that an error lists."""


def official_data_set(
    name: str,
    root: str | os.PathLike[str],
    *,
    variant: str = "",
    split_by: str = "group",
    split_table: str | os.PathLike[str] = "",
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    uncertain: str = "",
    blank: str = "",
) -> DataSet:
    """One of the papers' data sets, as downloaded.

    The split is, in this order: that of `split_table`; the publisher's; one that is made,
    stratified. A validation or test split that the publisher does not give is taken from the
    training images.

    Args:
      name: One of `LAYOUTS`.
      root: The folder, as `LAYOUTS[name].instructions` describe it.
      variant: One of `LAYOUTS[name].variants`; the first by default.
      split_by: "group": no patient or lesion is in two of the splits that are made; "image":
        each image on its own, as the papers do.
      split_table: A CSV file with the columns filename (or image, image_id, id_code, patientId,
        Path), class (a name or its index; not used with several labels per image) and split.
        It must give each image one split, and nothing else. Other columns are ignored.
      fractions: Of train, val and test, where splits are made.
      seed: Of the splits that are made.
      uncertain: What an uncertain label counts as, "zero", "one" or "unknown"; by default as the
        variant says.
      blank: What an empty label counts as, likewise; by default as the authors read it.

    Raises:
      UserError: Anything that is not as published, with file and row.
    """
    chosen = layout(name, variant)
    said = {key: value for key, value in (("uncertain", uncertain), ("blank", blank)) if value}
    if said and not chosen.has_uncertain:
        raise UserError(f"the data set {name} has no labels that are uncertain or blank")
    if split_by not in SPLIT_BY:
        raise UserError(f"split_by is {split_by!r}; one of {', '.join(SPLIT_BY)} is wanted")
    if not Path(root).exists():
        raise UserError(f"{root}: there is no such folder.\n{chosen.instructions}")
    try:
        records = chosen.read(Path(root), variant, **said)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"{error}.\n{chosen.instructions}") from error
        raise
    by_group, splits = split_by == "group", None
    if split_table:
        splits = _from_table(Path(split_table), records)
        fractions = (1.0, 0.0, 0.0)  # No split that the table leaves empty is taken from train.
    elif records.splits is not None:
        splits = np.array([SPLITS.index(split) for split in records.splits])
    dataset = build(
        name,
        records.classes,
        records,
        splits,
        fractions,
        seed,
        split_by_group=by_group,
        strata=records.strata,
        notes=records.notes,
    )
    return dataclasses.replace(dataset, titles=chosen.titles)


def layout(name: str, variant: str = "") -> Layout:
    """The layout of a name.

    Raises:
      UserError: There is no such layout, or it has no such variant.
    """
    if name not in LAYOUTS:
        raise UserError(f"the data set {name!r} is unknown; {nearest(name, LAYOUTS)}")
    chosen = LAYOUTS[name]
    if variant and variant not in chosen.variants:
        others = [one for one in chosen.variants if one]
        hint = nearest(variant, others) if others else "it has none"
        raise UserError(f"the data set {name} has no variant {variant!r}; {hint}")
    return chosen


def _from_table(path: Path, records: Records) -> np.ndarray:
    """Int (n,), index into `SPLITS`, from an external split table."""
    rows = read_table(path, ["split"])
    column = next((name for name in _IMAGE_COLUMNS if name in rows[0]), None)
    if column is None:
        raise UserError(
            f"{path}: the columns are {list(rows[0])}; 'filename' (or {', '.join(_IMAGE_COLUMNS)}) "
            "is wanted, the image"
        )
    images = _images_by_name(records)
    assignment = np.full(len(records.ids), -1)
    owners: dict[int, Row] = {}
    for row in rows:
        image = _find(row, row[column], images)
        claim(owners, image, row, repr(row[column]))
        if records.labels.ndim == 1:
            _check_class(row, records, image)
        assignment[image] = row.split("split")
    without = np.flatnonzero(assignment < 0)
    if len(without):
        shown = ", ".join(records.ids[row] for row in without[:_LISTED])
        more = ", ..." if len(without) > _LISTED else ""
        raise UserError(
            f"{path}: gives no split to {len(without)} of the {len(assignment)} images ({shown}"
            f"{more}); add rows for them"
        )
    return assignment


def _images_by_name(records: Records) -> dict[str, list[int]]:
    """Indices by id, by file name and by file name without extension."""
    images = collections.defaultdict(list)
    for index, (example, path) in enumerate(zip(records.ids, records.paths, strict=True)):
        names = {example}
        if records.pixels is None:
            names |= {path.name, path.stem}
        for name in names:
            images[name].append(index)
    return images


def _find(row: Row, name: str, images: dict[str, list[int]]) -> int:
    """The index of the image of a row, whose name may begin with folders above the image's."""
    parts = name.replace("\\", "/").split("/")
    candidates = ("/".join(parts[start:]) for start in range(len(parts)))
    matches = images.get(next((one for one in candidates if one in images), name), [])
    if len(matches) != 1:
        what = f"{len(matches)} images of that name" if matches else "no such image"
        raise row.error(f"{name!r}: the data set has {what}; correct the row")
    return matches[0]


def _check_class(row: Row, records: Records, image: int) -> None:
    if "class" not in row:
        raise UserError(f"{row.table}: the columns are {list(row)}; 'class' is wanted")
    value, classes = row["class"], records.classes
    digits = value.removesuffix(".0")
    if value in classes:
        index = classes.index(value)
    elif len(digits) < 10 and digits.isascii() and digits.isdigit() and int(digits) < len(classes):
        index = int(digits)
    else:
        raise row.error(f"the class is {value!r}; one of {', '.join(classes)} is wanted")
    if index != records.labels[image]:
        raise row.error(
            f"the class of {records.ids[image]} is {value!r}, but the data set says "
            f"{classes[records.labels[image]]!r}"
        )
