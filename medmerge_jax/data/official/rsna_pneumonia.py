"""RSNA Pneumonia Detection Challenge: the papers' two classes of its chest X-rays."""

from pathlib import Path

import numpy as np

from medmerge_jax.data.official.records import Layout, Records
from medmerge_jax.data.sheets import Row, read_table

CLASSES = ("Normal", "Lung Opacity")

_OTHER = "No Lung Opacity / Not Normal"
"""11,821 patients whom the papers leave out."""

_BOXES = "stage_2_train_labels.csv"
_CLASSES = "stage_2_detailed_class_info.csv"
_IMAGES = "stage_2_train_images"

_SUFFIXES = (".dcm", ".png", ".jpg", ".jpeg")
"""As published, or converted; the first that exists is read."""


def read_rsna_pneumonia(root: Path) -> Records:
    """The patients who are normal or have a lung opacity; one image each.

    Both tables have a row per box of an opacity, or one row for a patient without. They are
    checked against each other. The challenge published no split with labels.

    Args:
      root: Holds the two tables and the folder `stage_2_train_images`, of `.dcm` files or of
        `.png` or `.jpg` files with the same names.

    Raises:
      UserError: Anything that is not as above, with file and line.
    """
    root = Path(root)
    table = root / _CLASSES
    patients = _patients(table)
    _check_boxes(root / _BOXES, table, patients)
    chosen = {name: patient for name, patient in patients.items() if patient["class"] != _OTHER}
    return Records(
        classes=CLASSES,
        ids=tuple(chosen),
        paths=tuple(
            row.image_file(root / _IMAGES / name, _SUFFIXES) for name, row in chosen.items()
        ),
        labels=np.array([CLASSES.index(row["class"]) for row in chosen.values()], np.int32),
        groups=tuple(chosen),
        splits=None,
    )


def _patients(table: Path) -> dict[str, Row]:
    """The first row of each patient, by id."""
    patients: dict[str, Row] = {}
    for row in read_table(table, ["patientId", "class"]):
        name, kind = row.name("patientId"), row["class"]
        if kind not in (*CLASSES, _OTHER):
            raise row.error(f"the class is {kind!r}; one of {(*CLASSES, _OTHER)} is wanted")
        first = patients.setdefault(name, row)
        if first["class"] != kind:
            raise row.error(
                f"patient {name} is {kind!r} here and {first['class']!r} at line {first.line}"
            )
        if first is not row and kind != CLASSES[1]:
            raise row.error(
                f"patient {name} has a row already, at line {first.line}; only those with a lung "
                "opacity have several"
            )
    return patients


def _check_boxes(table: Path, class_table: Path, patients: dict[str, Row]) -> None:
    """Refuses a table of boxes that does not say the same as the table of classes."""
    box = ["x", "y", "width", "height"]
    first: dict[tuple[str, ...], int] = {}
    seen: set[str] = set()
    for row in read_table(table, ["patientId", *box, "Target"]):
        name = row["patientId"]
        if name not in patients:
            raise row.error(f"patient {name!r} is not in {class_table}")
        kind = patients[name]["class"]
        target = row.number("Target", (0, 1))
        if target != (kind == CLASSES[1]):
            raise row.error(
                f"the Target of patient {name} is {row['Target']}, but the class is {kind!r} in "
                f"{class_table}, line {patients[name].line}"
            )
        # A patient without an opacity has an empty box, and only one.
        key = (name, *(row[column] for column in box))
        if key in first:
            raise row.error(f"patient {name} has this row already, at line {first[key]}; leave one")
        first[key] = row.line
        seen.add(name)
    for name, row in patients.items():
        if name not in seen:
            raise row.error(f"patient {name} is not in {table}")


LAYOUT = Layout(
    name="rsna_pneumonia",
    read=lambda root, variant: read_rsna_pneumonia(root),
    description=(
        "RSNA Pneumonia Detection Challenge (2018): chest X-rays of 26,684 patients. Here: the "
        "14,863 who are normal (8,851) or have a lung opacity (6,012), without those who are "
        "neither."
    ),
    citation="""\
@article{shih2019augmenting,
  title = {Augmenting the National Institutes of Health Chest Radiograph Dataset with Expert
           Annotations of Possible Pneumonia},
  author = {Shih, George and Wu, Carol C. and Halabi, Safwan S. and Kohli, Marc D. and
            Prevedello, Luciano M. and Cook, Tessa S. and Sharma, Arjun and Amorosa, Judith K. and
            Arteaga, Veronica and Galperin-Aizenberg, Maya and others},
  journal = {Radiology: Artificial Intelligence},
  volume = {1},
  number = {1},
  pages = {e180041},
  year = {2019},
  doi = {10.1148/ryai.2019180041},
}
""",
    licence=(
        "Terms of use of the RSNA (research, education and other purposes, with attribution to the "
        "RSNA, the STR and the NIH); on Kaggle, the rules of the competition"
    ),
    homepage=(
        "https://www.rsna.org/education/ai-resources-and-training/ai-image-challenge/"
        "rsna-pneumonia-detection-challenge-2018"
    ),
    instructions="""\
Accept the rules at https://www.kaggle.com/competitions/rsna-pneumonia-detection-challenge,
download the data and unpack it, so that the folder holds:

    stage_2_train_labels.csv
    stage_2_detailed_class_info.csv
    stage_2_train_images/0004cfab-14fd-4e49-80ba-63a80b6bddd6.dcm, ...

The images may also have been converted to .png or .jpg files of the same names. Reading .dcm
files needs the extra `dicom`: pip install 'medmerge-jax[dicom]'
""",
    channels=1,
)
