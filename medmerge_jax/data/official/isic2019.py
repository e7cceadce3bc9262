"""ISIC 2019: dermoscopic images of eight kinds of skin lesions."""

from pathlib import Path

import numpy as np

from medmerge_jax.data.official.isic import image_files, need, read_lesions, read_one_hot
from medmerge_jax.data.official.records import Records, described

CLASSES = ("MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC")
"""Without UNK, "none of the others", which no training image has."""

_UNKNOWN = "UNK"
_IMAGES = "ISIC_2019_Training_Input"
_LABELS = "ISIC_2019_Training_GroundTruth.csv"
_METADATA = "ISIC_2019_Training_Metadata.csv"


def read_isic2019(root: Path) -> Records:
    """The 25,331 training images, whose lesions are the groups.

    The challenge published no other split with these classes. 2,084 images have no lesion in the
    metadata: each is a group of its own.
    """
    rows, labels = read_one_hot(need(root, _LABELS), (*CLASSES, _UNKNOWN))
    for label, (name, row) in zip(labels, rows.items(), strict=True):
        if label == len(CLASSES):
            raise row.error(f"image {name} is of the class {_UNKNOWN}, which no training image has")
    return Records(
        classes=CLASSES,
        ids=tuple(rows),
        paths=image_files(rows, [need(root, _IMAGES, folder=True)]),
        labels=np.array(labels, np.int32),
        groups=tuple(read_lesions(need(root, _METADATA), rows)),
    )


LAYOUT = described("isic2019", lambda root, variant: read_isic2019(root))
