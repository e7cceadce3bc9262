"""ISIC 2019: dermoscopic images of eight kinds of skin lesions."""

from pathlib import Path

import numpy as np

from medmerge_jax.data.official.isic import (
    HAM10000_CITATION,
    image_files,
    need,
    read_lesions,
    read_one_hot,
)
from medmerge_jax.data.official.records import Layout, Records

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

    Args:
      root: Holds the two tables and the folder of the images.

    Raises:
      UserError: Anything that is not as above, with file and line.
    """
    root = Path(root)
    rows, labels = read_one_hot(need(root, _LABELS), (*CLASSES, _UNKNOWN))
    for label, (name, row) in zip(labels, rows.items(), strict=True):
        if label == len(CLASSES):
            raise row.error(f"image {name} is of the class {_UNKNOWN}, which no training image has")
    return Records(
        classes=CLASSES,
        ids=tuple(rows),
        paths=tuple(image_files(rows, [need(root, _IMAGES)])),
        labels=np.array(labels, np.int32),
        groups=tuple(read_lesions(need(root, _METADATA), rows)),
    )


LAYOUT = Layout(
    name="isic2019",
    read=lambda root, variant: read_isic2019(root),
    description=(
        "ISIC 2019 challenge: 25,331 dermoscopic images of eight kinds of skin lesions, from "
        "HAM10000, BCN_20000 and MSK. It contains the 10,015 images of HAM10000."
    ),
    citation=HAM10000_CITATION
    + """\
@inproceedings{codella2018skin,
  title = {Skin Lesion Analysis Toward Melanoma Detection: A Challenge at the 2017 International
           Symposium on Biomedical Imaging ({ISBI}), Hosted by the International Skin Imaging
           Collaboration ({ISIC})},
  author = {Codella, Noel C. F. and Gutman, David and Celebi, M. Emre and Helba, Brian and
            Marchetti, Michael A. and Dusza, Stephen W. and Kalloo, Aadi and
            Liopyris, Konstantinos and Mishra, Nabin and Kittler, Harald and Halpern, Allan},
  booktitle = {IEEE International Symposium on Biomedical Imaging},
  pages = {168--172},
  year = {2018},
  doi = {10.1109/ISBI.2018.8363547},
}
@article{hernandezperez2024bcn20000,
  title = {{BCN20000}: Dermoscopic Lesions in the Wild},
  author = {Hern{\\'a}ndez-P{\\'e}rez, Carlos and Combalia, Marc and Podlipnik, Sebastian and
            Codella, Noel C. F. and Rotemberg, Veronica and Halpern, Allan C. and others},
  journal = {Scientific Data},
  volume = {11},
  pages = {641},
  year = {2024},
  doi = {10.1038/s41597-024-03387-w},
}
""",
    licence="CC BY-NC 4.0",
    homepage="https://challenge.isic-archive.com/data/#2019",
    instructions="""\
Download the training data of 2019 (images, metadata and ground truth) from
https://challenge.isic-archive.com/data/#2019 and unpack it, so that the folder holds:

    ISIC_2019_Training_GroundTruth.csv
    ISIC_2019_Training_Metadata.csv
    ISIC_2019_Training_Input/ISIC_0000000.jpg, ...
""",
)
