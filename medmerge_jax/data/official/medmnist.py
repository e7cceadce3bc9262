"""MedMNIST: any of its `.npz` files of 2-D images."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from medmerge_jax.data.official.records import ABOUT, Records, described
from medmerge_jax.data.splits import SPLITS
from medmerge_jax.errors import UserError
from medmerge_jax.storage.npz import fill, open_member, open_npz

CLASSES: dict[str, list[str]] = ABOUT["medmnist_classes"]
"""Names that the authors give the classes, by file name without size."""

_SIZES = ("", "_64", "_128", "_224")


def read_medmnist(root: Path, variant: str = "") -> Records:
    """A file of MedMNIST, with its own split.

    Classes have the authors' names where the file does (`pneumoniamnist.npz`,
    `bloodmnist_64.npz`), otherwise "0", "1", ... Several columns of labels (ChestMNIST) are
    several labels per image; grades (RetinaMNIST) are classes.
    `root` may be the file itself; `variant` is its name, with or without `.npz`.
    """
    path = _find(root, variant)
    with open_npz(path) as archive:
        return _read(path, archive)


def _find(root: Path, variant: str) -> Path:
    if root.is_file():
        return root
    if not root.is_dir():
        raise UserError(f"{root}: does not exist; the folder of a MedMNIST file is wanted")
    archives = sorted(root.glob("*.npz"))
    names = ", ".join(path.name for path in archives) or "no .npz file"
    if variant:
        path = root / f"{variant.removesuffix('.npz')}.npz"
        if path not in archives:
            raise UserError(f"{path}: there is no such file; {root} holds {names}")
        return path
    if len(archives) != 1:
        raise UserError(
            f"{root}: holds {names}; "
            + ("name one of them in data.variant" if archives else "put one of MedMNIST there")
        )
    return archives[0]


def _read(path: Path, archive: zipfile.ZipFile) -> Records:
    missing = [
        f"{split}_{kind}"
        for split in SPLITS
        for kind in ("images", "labels")
        if f"{split}_{kind}.npy" not in archive.namelist()
    ]
    if missing:
        raise UserError(f"{path}: lacks {', '.join(missing)}; is it a file of MedMNIST?")
    parts = [_labels(path, archive, f"{split}_labels") for split in SPLITS]
    widths = {part.shape[1] for part in parts}
    if len(widths) > 1:
        raise UserError(
            f"{path}: the splits have {sorted(widths)} labels per image; the same number is wanted"
        )
    width, names = widths.pop(), CLASSES.get(path.stem.split("_")[0].lower())
    if width == 1:
        most = min(max(int(part.max()) for part in parts), 9999)
        classes = tuple(names or map(str, range(most + 1)))
        allowed = len(classes), f"a number from 0 to {len(classes) - 1}"
    else:
        classes, allowed = tuple(names or map(str, range(width))), (2, "0 or 1")
        if len(classes) != width:
            raise UserError(f"{path}: has {width} labels per image; {len(classes)} are wanted")
    _check(path, parts, *allowed)
    labels = np.concatenate(parts)
    counts = [len(part) for part in parts]
    # The images are checked first: names for labels without images could fill the memory.
    pixels = _images(path, archive, counts)
    return Records(
        classes=classes,
        ids=tuple(
            f"{split}_{row:06d}"
            for split, count in zip(SPLITS, counts, strict=True)
            for row in range(count)
        ),
        paths=(path,) * sum(counts),
        labels=labels[:, 0] if width == 1 else labels.astype(np.float32),
        splits=tuple(np.repeat(SPLITS, counts).tolist()),
        pixels=pixels,
    )


def _labels(path: Path, archive: zipfile.ZipFile, key: str) -> np.ndarray:
    """Integers (n, columns)."""
    with _open(path, archive, key) as (file, shape, dtype):
        if dtype.kind not in "iub" or len(shape) not in (1, 2) or 0 in shape:
            raise UserError(
                f"{path}: {key} is {dtype} {shape}; whole numbers (n, 1) or (n, classes) are wanted"
            )
        labels = np.empty(shape, dtype)
        fill(labels, file)
    return labels.reshape(shape[0], -1).astype(np.int64)


def _check(path: Path, parts: list[np.ndarray], limit: int, allowed: str) -> None:
    for split, part in zip(SPLITS, parts, strict=True):
        wrong = np.any((part < 0) | (part >= limit), axis=1)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(
                f"{path}: {split}_labels, row {row}: the label is {part[row].tolist()}; {allowed} "
                "is wanted"
            )


def _images(path: Path, archive: zipfile.ZipFile, counts: list[int]) -> np.ndarray:
    """All splits in one array, read in place: PathMNIST of 224 px has 16 GB."""
    first: tuple[int, ...] | None = None
    for split, count in zip(SPLITS, counts, strict=True):
        key = f"{split}_images"
        with _open(path, archive, key) as (_, shape, dtype):
            if dtype != np.uint8:
                raise UserError(f"{path}: {key} is {dtype}; uint8 is wanted")
            if len(shape) < 3 or shape[3:] not in ((), (3,)) or 0 in shape:
                volumes = ": volumes, which are not read" if len(shape) > 3 else ""
                raise UserError(
                    f"{path}: {key} has the shape {shape}{volumes}; (n, height, width) or "
                    "(n, height, width, 3) is wanted"
                )
            first = first or shape[1:]
            if shape != (count, *first):
                raise UserError(
                    f"{path}: {key} has {shape[0]} images of the shape {shape[1:]}, but there are "
                    f"{count} labels, and train_images are of {first}"
                )
    images = np.empty((sum(counts), *(first or ())), np.uint8)
    start = 0
    for split, count in zip(SPLITS, counts, strict=True):
        with _open(path, archive, f"{split}_images") as (file, _, _):
            fill(images[start : start + count], file)
        start += count
    return images


@contextlib.contextmanager
def _open(
    path: Path, archive: zipfile.ZipFile, key: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """A member at the beginning of its data, its shape and its type."""
    with open_member(path, archive, key) as (file, shape, dtype, fortran):
        if fortran and sum(size > 1 for size in shape) > 1:
            raise UserError(f"{path}: {key} is stored column by column; save it in C order")
        yield file, shape, dtype


LAYOUT = described(
    "medmnist",
    read_medmnist,
    variants=("", *(name + size for name in CLASSES for size in _SIZES)),
    multilabel=lambda variant: variant.startswith("chestmnist"),
)
