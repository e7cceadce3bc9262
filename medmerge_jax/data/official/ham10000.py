"""HAM10000: dermoscopic images of seven kinds of skin lesions, in the two layouts it comes in."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medmerge_jax.data.official.isic import (
    find,
    image_files,
    lesion,
    need,
    read_lesions,
    read_one_hot,
)
from medmerge_jax.data.official.records import Records, described
from medmerge_jax.data.sheets import Row, by_id, check_disjoint, read_table
from medmerge_jax.errors import UserError

CLASSES = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")
"""In the order of the challenge; the Dataverse writes them in lower case."""

VARIANTS = ("published", "training")
"""With the challenge's validation and test images as splits, if the folder holds them; or only the
10,015 training images, to be split as in the papers."""

_METADATA = tuple(f"HAM10000_metadata{suffix}" for suffix in (".csv", ".tab", ""))
_DATAVERSE_IMAGES = ("HAM10000_images_part_1", "HAM10000_images_part_2", "HAM10000_images")
_DATAVERSE_TEST = tuple(f"ISIC2018_Task3_Test_GroundTruth{suffix}" for suffix in (".csv", ".tab"))
_LESIONS = "ISIC2018_Task3_Training_LesionGroupings.csv"


@dataclasses.dataclass(frozen=True)
class _Part:
    """The images of one split, in the order of its table."""

    split: str
    rows: dict[str, Row]
    paths: tuple[Path, ...]
    labels: list[int]
    groups: list[str]


def read_ham10000(root: Path, variant: str = "") -> Records:
    """HAM10000 as of the ISIC 2018 challenge (task 3) or as of the Harvard Dataverse.

    The lesion is the group. The challenge gives the lesions of the training images in an extra
    file; without it, and for its validation and test images, each image is a group of its own.
    """
    parts = list(_parts(root, only_training=variant == "training"))
    check_disjoint(*(part.rows for part in parts))
    return Records(
        classes=CLASSES,
        ids=tuple(name for part in parts for name in part.rows),
        paths=tuple(path for part in parts for path in part.paths),
        labels=np.array([label for part in parts for label in part.labels], np.int32),
        groups=tuple(group for part in parts for group in part.groups),
        splits=None if len(parts) == 1 else tuple(part.split for part in parts for _ in part.rows),
    )


def _parts(root: Path, only_training: bool) -> Iterator[_Part]:
    """Training and, where there are more, validation and test images."""
    if find(root, _ground_truth("Training")) is not None:
        yield _challenge("train", root, "Training", _LESIONS)
        for split, part in (("val", "Validation"), ("test", "Test")):
            if not only_training and find(root, _ground_truth(part)) is not None:
                yield _challenge(split, root, part)
        return
    metadata = find(root, *_METADATA)
    if metadata is None:
        raise UserError(
            f"{root}: holds neither {_ground_truth('Training')} (ISIC 2018) nor {_METADATA[0]} "
            "(Harvard Dataverse)"
        ) from FileNotFoundError()
    found = [find(root, name, folder=True) for name in _DATAVERSE_IMAGES]
    folders = [path for path in found if path is not None]
    yield _dataverse("train", metadata, folders or [need(root, *_DATAVERSE_IMAGES, folder=True)])
    test = None if only_training else find(root, *_DATAVERSE_TEST)
    if test is not None:
        # The Dataverse's table of test images has the columns of its metadata, the challenge's
        # has one for each class.
        if "image_id" in _header(test):
            yield _dataverse("test", test, [_images(root, "Test")])
        else:
            yield _challenge("test", root, "Test")


def _ground_truth(part: str) -> str:
    return f"ISIC2018_Task3_{part}_GroundTruth.csv"


def _images(root: Path, part: str) -> Path:
    return need(
        root,
        *(f"ISIC2018_Task3_{part}_{kind}" for kind in ("Input", "Images")),
        folder=True,
        hint=f"; add it, or remove {_ground_truth(part)}" if part != "Training" else "",
    )


def _challenge(split: str, root: Path, part: str, lesions: str = "") -> _Part:
    rows, labels = read_one_hot(need(root, _ground_truth(part)), CLASSES)
    groupings = find(root, lesions) if lesions else None
    if groupings is None:
        groups = [lesion("", name) for name in rows]
    else:
        groups = read_lesions(groupings, rows)
    paths = image_files(rows, [_images(root, part)])
    return _Part(split, rows, paths, labels, groups)


def _dataverse(split: str, table: Path, folders: list[Path]) -> _Part:
    columns = ["lesion_id", "image_id", "dx"]
    rows = by_id(read_table(table, columns, _delimiter(table)), "image_id")
    return _Part(
        split,
        rows,
        image_files(rows, folders),
        [_diagnosis(row) for row in rows.values()],
        [lesion(row["lesion_id"], name) for name, row in rows.items()],
    )


def _delimiter(table: Path) -> str:
    """The Dataverse serves its tables with tabs, as `.tab`, or as they were given, with commas."""
    if table.suffix == ".csv":
        return ","
    return "\t" if table.suffix == ".tab" or "\t" in _header(table) else ","


def _header(table: Path) -> str:
    with table.open(encoding="utf-8-sig", errors="replace") as file:
        return file.readline()


def _diagnosis(row: Row) -> int:
    try:
        return CLASSES.index(row["dx"].upper())
    except ValueError:
        names = ", ".join(CLASSES).lower()
        raise row.error(f"column 'dx' holds {row['dx']!r}; one of {names} is wanted") from None


LAYOUT = described("ham10000", read_ham10000, variants=VARIANTS)
