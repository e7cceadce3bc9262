"""EyePACS, Kaggle's Diabetic Retinopathy Detection: fundus photographs of both eyes."""

import re
from pathlib import Path

import numpy as np

from medmerge_jax.data.official.files import image_file
from medmerge_jax.data.official.records import Layout, Records, checked_variant
from medmerge_jax.data.official.tables import Row, by_id, number, read_table, row_error

CLASSES = ("0", "1", "2", "3", "4")
"""Grades of diabetic retinopathy: none, mild, moderate, severe, proliferative."""

VARIANTS = ("pooled", "kaggle")
"""All labelled images without a split, as the papers do; or Kaggle's own training and test set."""

_TRAIN, _TEST = "trainLabels.csv", "retinopathy_solution.csv"

_NAME = re.compile(r"(\d+)_(?:left|right)", re.ASCII)


def read_eyepacs(root: Path, variant: str = "") -> Records:
    """The 35,126 training images and, where their labels are there, the 53,576 test images.

    The patient, who is the group, is the number in an image's name.

    Args:
      root: Holds `trainLabels.csv` (image, level) and `train/*.jpeg`; and, if you have it,
        `retinopathy_solution.csv` (image, level, Usage) and `test/*.jpeg`.
      variant: "pooled" (default) or "kaggle", which wants the test labels.

    Raises:
      UserError: Anything that is not as above, with file and line.
    """
    root, variant = Path(root), checked_variant("eyepacs", variant, VARIANTS)
    train = _Table(root / _TRAIN, root / "train")
    tables = {"train": train}
    if (root / _TEST).exists() or variant == "kaggle":
        tables["test"] = _Table(root / _TEST, root / "test")
        for name, row in tables["test"].rows.items():
            if name in train.rows:
                raise row_error(
                    tables["test"].path,
                    row.line,
                    f"image {name!r} is in {train.path} too, at line {train.rows[name].line}; "
                    "leave one of them",
                )
    ids = [name for table in tables.values() for name in table.rows]
    return Records(
        classes=CLASSES,
        ids=tuple(ids),
        paths=tuple(path for table in tables.values() for path in table.paths()),
        labels=np.concatenate([table.labels() for table in tables.values()]),
        groups=tuple(name.split("_")[0] for name in ids),
        splits=None
        if variant == "pooled"
        else tuple(split for split, table in tables.items() for _ in table.rows),
    )


class _Table:
    """One of the two tables, and the folder of its images."""

    def __init__(self, path: Path, images: Path):
        self.path, self.images = path, images
        rows = read_table(path, ["image", "level"])
        self.rows: dict[str, Row] = by_id(path, rows, "image")
        for name, row in self.rows.items():
            if not _NAME.fullmatch(name):
                raise row_error(
                    path, row.line, f"the image is {name!r}; a name like 10_left is wanted"
                )

    def paths(self) -> list[Path]:
        return [
            image_file(self.path, row.line, self.images / name, (".jpeg",))
            for name, row in self.rows.items()
        ]

    def labels(self) -> np.ndarray:
        allowed = range(len(CLASSES))
        return np.array(
            [number(self.path, row, "level", allowed) for row in self.rows.values()], np.int32
        )


LAYOUT = Layout(
    name="eyepacs",
    read=read_eyepacs,
    description=(
        "EyePACS, as in Kaggle's Diabetic Retinopathy Detection: 88,702 fundus photographs, left "
        "and right eye of 44,351 patients, with the grade of diabetic retinopathy from 0 (none) "
        "to 4 (proliferative). 'pooled' is all of them without a split, 'kaggle' the "
        "competition's 35,126 training and 53,576 test images."
    ),
    citation="""\
@misc{eyepacs2015,
  title = {Diabetic Retinopathy Detection},
  author = {Dugas, Emma and {Jared} and Jorge and Cukierski, Will},
  year = {2015},
  howpublished = {Kaggle competition, California Healthcare Foundation and EyePACS},
  url = {https://www.kaggle.com/competitions/diabetic-retinopathy-detection},
}
""",
    licence="Rules of the Kaggle competition (accepted there before the download)",
    homepage="https://www.kaggle.com/competitions/diabetic-retinopathy-detection",
    instructions="""\
Accept the rules at https://www.kaggle.com/competitions/diabetic-retinopathy-detection, download
the data, join the parts of the archives and unpack them, so that the folder holds:

    trainLabels.csv
    train/10_left.jpeg, train/10_right.jpeg, ...

The labels of the test images, which make 88,702 images of 35,126, were posted in the
competition's forum as retinopathy_solution.csv. With them the folder also holds:

    retinopathy_solution.csv
    test/1_left.jpeg, test/1_right.jpeg, ...
""",
    variants=VARIANTS,
)
