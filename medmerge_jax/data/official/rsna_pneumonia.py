"""RSNA Pneumonia Detection Challenge: the papers' two classes of its chest X-rays."""

from pathlib import Path

import numpy as np

from medmerge_jax.data.official.records import Records, described
from medmerge_jax.data.sheets import Row, claim, read_table

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
    """
    table = root / _CLASSES
    patients = _patients(table)
    _check_boxes(root / _BOXES, table, patients)
    chosen = {name: patient for name, patient in patients.items() if patient["class"] != _OTHER}
    return Records(
        classes=CLASSES,
        ids=tuple(chosen),
        paths=tuple(
            row.image_file(*(root / _IMAGES / f"{name}{suffix}" for suffix in _SUFFIXES))
            for name, row in chosen.items()
        ),
        labels=np.array([CLASSES.index(row["class"]) for row in chosen.values()], np.int32),
        groups=tuple(chosen),
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
    owners: dict[tuple[str, ...], Row] = {}
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
        claim(owners, key, row, f"patient {name} with the box {key[1:]}")
    seen = {name for name, *_ in owners}
    for name, row in patients.items():
        if name not in seen:
            raise row.error(f"patient {name} is not in {table}")


LAYOUT = described("rsna_pneumonia", lambda root, variant: read_rsna_pneumonia(root), channels=1)
