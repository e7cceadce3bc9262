"""APTOS 2019 Blindness Detection: fundus photographs with a grade each."""

from pathlib import Path

import numpy as np

from medmerge_jax.data.official.records import Records, described
from medmerge_jax.data.sheets import by_id, read_table

CLASSES = ("0", "1", "2", "3", "4")
"""Grades of diabetic retinopathy."""

_MEANINGS = ("none", "mild", "moderate", "severe", "proliferative")

TITLES = dict(zip(CLASSES, _MEANINGS, strict=True))
"""What they mean."""


def read_aptos2019(root: Path) -> Records:
    """The 3,662 labelled images; those of the competition's test set have no published labels."""
    rows = by_id(read_table(root / "train.csv", ["id_code", "diagnosis"]), "id_code")
    images = root / "train_images"
    grades = range(len(CLASSES))
    return Records(
        classes=CLASSES,
        ids=tuple(rows),
        paths=tuple(row.image_file(images / f"{name}.png") for name, row in rows.items()),
        labels=np.array([row.number("diagnosis", grades) for row in rows.values()], np.int32),
    )


LAYOUT = described("aptos2019", lambda root, variant: read_aptos2019(root), titles=TITLES)
