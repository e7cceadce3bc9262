"""CheXpert: chest X-rays with labels that may be uncertain."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from medmerge_jax.data.official.records import Records, described
from medmerge_jax.data.sheets import Row, claim, read_table

CLASSES = (
    "Enlarged Cardiomediastinum",
    "Cardiomegaly",
    "Lung Opacity",
    "Lung Lesion",
    "Edema",
    "Consolidation",
    "Pneumonia",
    "Atelectasis",
    "Pneumothorax",
    "Pleural Effusion",
    "Pleural Other",
    "Fracture",
    "Support Devices",
)
"""13 of the 14 columns, in their order. The papers train on 13 labels without naming them; the
one left out here is "No Finding", which is not an observation but says that none of the others
(support devices excepted) was made."""

NO_FINDING = "No Finding"

VARIANTS = ("zeros", "ones", "ignore")
"""An uncertain label (-1) becomes 0, 1, or unknown."""

_UNCERTAIN = {"zeros": 0.0, "ones": 1.0, "ignore": np.nan}

_TABLES = {"train.csv": "train", "valid.csv": "val", "test.csv": "test"}

_VIEW = "Frontal/Lateral"


def read_chexpert(root: Path, variant: str = "") -> Records:
    """The frontal images of CheXpert with 13 labels each.

    An empty label is 0, as in the authors' baseline. `train.csv` is the training split,
    `valid.csv` the validation split and `test.csv`, if there is one, the test split; otherwise
    the test images are left to the caller. A patient is a group.
    Paths in the tables may begin with any folder ("CheXpert-v1.0-small/train/...").
    """
    uncertain = _UNCERTAIN[variant or VARIANTS[0]]
    rows = [
        (split, row, image)
        for name, split in _TABLES.items()
        if split != "test" or (root / name).exists()
        for row, image in _frontal_rows(root / name, split)
    ]
    labels = [[_label(row, column, uncertain) for column in CLASSES] for _, row, _ in rows]
    return Records(
        classes=CLASSES,
        ids=tuple(image for _, _, image in rows),
        paths=tuple(row.image_file(root / image) for _, row, image in rows),
        labels=np.array(labels, np.float32).reshape(-1, len(CLASSES)),
        groups=tuple(image.split("/")[1] for _, _, image in rows),
        splits=tuple(split for split, _, _ in rows),
    )


def _frontal_rows(path: Path, split: str) -> Iterator[tuple[Row, str]]:
    """Each frontal row of a table, and the image's path from the folder `train` etc. on."""
    # The published test table has neither views nor ages.
    columns = ["Path", NO_FINDING, *CLASSES] + ([_VIEW] if split != "test" else [])
    owners: dict[str, Row] = {}
    for row in read_table(path, columns):
        image = _image_path(row)
        claim(owners, image, row, image)
        by_name = "Lateral" if "lateral" in PurePosixPath(image).name else "Frontal"
        view = row.get(_VIEW, by_name)
        if view not in ("Frontal", "Lateral"):
            raise row.error(f"column {_VIEW!r} holds {view!r}; Frontal or Lateral is wanted")
        if view == "Frontal":
            yield row, image


def _image_path(row: Row) -> str:
    parts = [part for part in row["Path"].replace("\\", "/").split("/") if part not in ("", ".")]
    folders = [index for index, part in enumerate(parts) if part in ("train", "valid", "test")]
    if not folders or len(parts) < folders[0] + 3 or ".." in parts:
        raise row.error(
            f"the Path is {row['Path']!r}; one like "
            "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg is wanted"
        )
    return "/".join(parts[folders[0] :])


def _label(row: Row, column: str, uncertain: float) -> float:
    if not row[column]:
        return 0.0
    value = row.number(column, (0, 1, -1))
    return uncertain if value == -1 else value


LAYOUT = described(
    "chexpert", read_chexpert, variants=VARIANTS, channels=1, multilabel=lambda variant: True
)
