"""EyePACS, Kaggle's Diabetic Retinopathy Detection: fundus photographs of both eyes."""

import re
from pathlib import Path

import numpy as np

from medmerge_jax.data.official.aptos2019 import CLASSES, TITLES
from medmerge_jax.data.official.records import Records, described
from medmerge_jax.data.sheets import Row, by_id, check_disjoint, read_table

VARIANTS = ("pooled", "kaggle")
"""All labelled images without a split, as the papers do; or Kaggle's own training and test set,
which wants the test labels."""

_TRAIN, _TEST = "trainLabels.csv", "retinopathy_solution.csv"

_NAME = re.compile(r"(\d+)_(?:left|right)", re.ASCII)


def read_eyepacs(root: Path, variant: str = "") -> Records:
    """The 35,126 training images and, where their labels are there, the 53,576 test images.

    The patient, who is the group, is the number in an image's name.
    """
    tables = {"train": _read_table(root / _TRAIN)}
    if (root / _TEST).exists() or variant == "kaggle":
        tables["test"] = _read_table(root / _TEST)
        check_disjoint(*tables.values())
    grades = range(len(CLASSES))
    rows = [(split, name, row) for split, table in tables.items() for name, row in table.items()]
    return Records(
        classes=CLASSES,
        ids=tuple(name for _, name, _ in rows),
        paths=tuple(row.image_file(root / split / f"{name}.jpeg") for split, name, row in rows),
        labels=np.array([row.number("level", grades) for _, _, row in rows], np.int32),
        groups=tuple(name.split("_")[0] for _, name, _ in rows),
        splits=tuple(split for split, _, _ in rows) if variant == "kaggle" else None,
    )


def _read_table(path: Path) -> dict[str, Row]:
    """The rows of one of the two tables by image."""
    rows = by_id(read_table(path, ["image", "level"]), "image")
    for name, row in rows.items():
        if not _NAME.fullmatch(name):
            raise row.error(f"the image is {name!r}; a name like 10_left is wanted")
    return rows


LAYOUT = described("eyepacs", read_eyepacs, variants=VARIANTS, titles=TITLES)
