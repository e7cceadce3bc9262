"""CheXpert: chest X-rays with labels that may be uncertain."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from medmerge_jax.data.official.records import Records, described
from medmerge_jax.data.sheets import MEANINGS, Row, claim, read_table
from medmerge_jax.errors import UserError

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

SUPPORT_DEVICES = "Support Devices"

VARIANTS = ("zeros", "ones", "ignore")
"""An uncertain label (-1) becomes 0, 1, or unknown."""

_UNCERTAIN = dict(zip(VARIANTS, MEANINGS, strict=True))

_TABLES = {"train.csv": "train", "valid.csv": "val", "test.csv": "test"}

_VIEW = "Frontal/Lateral"


def read_chexpert(root: Path, variant: str = "", uncertain: str = "", blank: str = "") -> Records:
    """The frontal images of CheXpert with 13 labels each.

    An uncertain label (-1) is what `uncertain` says, "zero", "one" or "unknown", or else what the
    variant does. An empty one is what `blank` says, or else 0, as in the authors' baseline; where
    there is "No Finding" it is 0, but for support devices. Whatever they are, the splits that are
    made are the same: those of zeros. `train.csv` is the training split,
    `valid.csv` the validation split and `test.csv`, if there is one, the test split; otherwise
    the test images are left to the caller. A patient is a group.
    Paths in the tables may begin with any folder ("CheXpert-v1.0-small/train/...").
    """
    if variant and uncertain and _UNCERTAIN[variant] != uncertain:
        raise UserError(
            f"data.variant = {variant!r} and data.uncertain = {uncertain!r} say different things; "
            "leave one of them empty"
        )
    uncertain = uncertain or _UNCERTAIN[variant or VARIANTS[0]]
    blank = blank or "zero"
    rows = [
        (split, row, image)
        for name, split in _TABLES.items()
        if split != "test" or (root / name).exists()
        for row, image in _frontal_rows(root / name, split)
    ]
    codes = np.array([[_code(row, column) for column in CLASSES] for _, row, _ in rows], np.float32)
    codes = codes.reshape(-1, len(CLASSES))
    is_uncertain, is_blank = codes == -1, np.isnan(codes)
    labels = np.where(is_uncertain, np.float32(MEANINGS[uncertain]), codes)
    labels = np.where(is_blank, np.float32(MEANINGS[blank]), labels)
    note = (
        f"{is_uncertain.sum()} uncertain labels count as {uncertain} and {is_blank.sum()} blank "
        f"ones as {blank}; data.uncertain and data.blank overrule it"
    )
    return Records(
        classes=CLASSES,
        ids=tuple(image for _, _, image in rows),
        paths=tuple(row.image_file(root / image) for _, row, image in rows),
        labels=labels,
        strata=np.where(is_uncertain | is_blank, np.float32(0), codes),
        notes=(note,),
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


def _code(row: Row, column: str) -> float:
    """0, 1, -1 where it is uncertain, NaN where it is blank."""
    if row[column]:
        return row.number(column, (0, 1, -1))
    nothing = row[NO_FINDING] in ("1", "1.0") and column != SUPPORT_DEVICES
    return 0.0 if nothing else np.nan


LAYOUT = described(
    "chexpert",
    read_chexpert,
    variants=VARIANTS,
    channels=1,
    multilabel=lambda variant: True,
    has_uncertain=True,
)
