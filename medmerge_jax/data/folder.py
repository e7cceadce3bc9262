"""Image folders: the name of an image's folder is its class."""

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from medmerge_jax.data.dataset import DataSet, Split, build
from medmerge_jax.data.splits import SPLIT_NAMES, SPLITS
from medmerge_jax.errors import UserError
from medmerge_jax.images.formats import SUFFIXES

_LOG = logging.getLogger(__name__)


def image_folder(
    root: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
) -> DataSet:
    """Reads `root/<split>/<class>/*.jpg|jpeg|png`, or `root/<class>/*` without splits.

    Splits are called train, val (valid, validation) and test. A validation or test split that is
    missing is taken from the training images, stratified. Images may lie deeper inside a class
    folder. Hidden files and those that operating systems leave are ignored.

    Args:
      root: The folder.
      classes: Names in the order wanted; by default all that occur, sorted (numbers by value).
      fractions: Of train, val and test, where splits are made.
      seed: Of the splits that are made.

    Raises:
      UserError: No such folder, no images in it, a class that is not in `classes`, or the same
        split twice.
    """
    root = Path(root)
    homes = _split_folders(root)
    parents = sorted((homes or {0: root}).items())
    folders = [(folder, index) for index, parent in parents for folder in _folders(parent)]
    names = _class_names(root, [folder for folder, _ in folders], classes)
    images = [
        (path.relative_to(root).as_posix(), path, names.index(folder.name), index)
        for folder, index in folders
        for path in sorted(find_images(folder), key=lambda path: path.relative_to(root).as_posix())
    ]
    if not images:
        raise UserError(
            f"{root}: no images found; {root.name}/train/<class>/*.jpg or .png (likewise val and "
            f"test) or {root.name}/<class>/*.jpg or .png is wanted"
        )
    ids, paths, labels, assignment = zip(*images, strict=True)
    splits = None if homes is None else np.array(assignment)
    together = Split(ids, paths, np.array(labels))
    return build(root.resolve().name, names, together, splits, fractions, seed)


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder. Other files are counted in a warning."""
    images: list[Path] = []
    others: list[Path] = []
    for directory, names, file_names in os.walk(folder):
        names[:] = sorted(name for name in names if not _is_litter(name))
        for name in file_names:
            if not _is_litter(name):
                chosen = images if name.lower().endswith(SUFFIXES) else others
                chosen.append(Path(directory, name))
    if others:
        _LOG.warning(
            "%s: ignored %d files that do not end in %s, for instance %s",
            folder,
            len(others),
            ", ".join(SUFFIXES),
            min(others).name,
        )
    return images


def sorted_names(names: Sequence[str]) -> list[str]:
    """Distinct names in order; numbers, if all are, by value.

    >>> sorted_names(["10", "9", "10"]), sorted_names(["10", "9", "a"])
    (['9', '10'], ['10', '9', 'a'])
    """
    distinct = sorted(set(names))
    if all(name.isascii() and name.isdigit() for name in distinct):
        # Of any length; `int` refuses more than 4300 digits.
        distinct.sort(key=lambda digits: (len(digits.lstrip("0")), digits.lstrip("0")))
    return distinct


def _split_folders(root: Path) -> dict[int, Path] | None:
    """Index into `SPLITS` -> folder; None where the classes are directly in the root."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{root}: {what}; the folder of the images is wanted")
    homes: dict[int, Path] = {}
    others = []
    for path in _folders(root):
        index = SPLIT_NAMES.get(path.name.lower())
        if index is None:
            others.append(path.name)
        elif index in homes:
            raise UserError(
                f"{root}: both {homes[index].name} and {path.name} are {SPLITS[index]} splits; "
                "leave one of them"
            )
        else:
            homes[index] = path
    if not homes:
        return None
    if 0 not in homes:
        names = [path.name for path in homes.values()]
        raise UserError(f"{root}: there are {names} but no train; add train/<class>/")
    if others:
        _LOG.warning("%s: ignored the folders %s, which are not splits", root, others)
    return homes


def _class_names(root: Path, folders: list[Path], classes: Sequence[str] | None) -> list[str]:
    if classes is None:
        return sorted_names([folder.name for folder in folders])
    for folder in folders:
        if folder.name not in classes:
            raise UserError(
                f"{folder}: the class {folder.name!r} is none of {list(classes)}; add it to "
                "data.classes, or remove the folder"
            )
    if len(set(classes)) < len(classes):
        raise UserError(f"{root}: a class occurs twice in {list(classes)}; name each once")
    return list(classes)


def _folders(parent: Path) -> Iterator[Path]:
    for path in sorted(parent.iterdir()):
        if path.is_dir() and not _is_litter(path.name):
            yield path


def _is_litter(name: str) -> bool:
    return name.startswith(".") or name in ("__MACOSX", "Thumbs.db", "desktop.ini")
