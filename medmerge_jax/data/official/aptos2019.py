"""APTOS 2019 Blindness Detection: fundus photographs with a grade each."""

from pathlib import Path

import numpy as np

from medmerge_jax.data.official.records import Layout, Records
from medmerge_jax.data.sheets import by_id, read_table

CLASSES = ("0", "1", "2", "3", "4")
"""Grades of diabetic retinopathy: none, mild, moderate, severe, proliferative."""

_TABLE = "train.csv"
_IMAGES = "train_images"


def read_aptos2019(root: Path) -> Records:
    """The 3,662 labelled images; those of the competition's test set have no published labels.

    Args:
      root: Holds `train.csv` (id_code, diagnosis) and `train_images/*.png`.

    Raises:
      UserError: Anything that is not as above, with file and line.
    """
    rows = by_id(read_table(Path(root) / _TABLE, ["id_code", "diagnosis"]), "id_code")
    images = Path(root) / _IMAGES
    grades = range(len(CLASSES))
    return Records(
        classes=CLASSES,
        ids=tuple(rows),
        paths=tuple(row.image_file(images / name, (".png",)) for name, row in rows.items()),
        labels=np.array([row.number("diagnosis", grades) for row in rows.values()], np.int32),
    )


LAYOUT = Layout(
    name="aptos2019",
    read=lambda root, variant: read_aptos2019(root),
    description=(
        "APTOS 2019 Blindness Detection: 3,662 fundus photographs, taken in rural India, with the "
        "grade of diabetic retinopathy from 0 (none) to 4 (proliferative)."
    ),
    citation="""\
@misc{aptos2019,
  title = {{APTOS} 2019 Blindness Detection},
  author = {Karthik and Maggie and Dane, Sohier},
  year = {2019},
  howpublished = {Kaggle competition, Asia Pacific Tele-Ophthalmology Society},
  url = {https://www.kaggle.com/competitions/aptos2019-blindness-detection},
}
""",
    licence="Rules of the Kaggle competition (accepted there before the download)",
    homepage="https://www.kaggle.com/competitions/aptos2019-blindness-detection",
    instructions="""\
Accept the rules at https://www.kaggle.com/competitions/aptos2019-blindness-detection, download
the data and unpack it, so that the folder holds:

    train.csv
    train_images/000c1434d8d7.png, ...
""",
)
