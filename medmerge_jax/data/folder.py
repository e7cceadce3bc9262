"""Image folders: the name of an image's folder is its class."""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath
from typing import NamedTuple

import numpy as np

from medmerge_jax.data.dataset import EXAMPLES, DataSet, Split, build
from medmerge_jax.data.files import ImageFinder, count, is_image, refuse_no_folder
from medmerge_jax.data.splits import SPLITS, holds_validation, looks_like_split, split_of
from medmerge_jax.errors import UserError

_MASK = r"(?:masks?|segmentations?|segs?|gt|ground_?truths?|annotations?|contours?|overlays?)"
_MASK_FILE = re.compile(rf"(.+?)[_\-. ]+{_MASK}(?:[_\-. ]?\d+)?|{_MASK}[_\-. ]+(.+)")
_MASK_FOLDER = re.compile(rf"(?:.*[_\-. ])?{_MASK}")
"""Names in lower case of masks beside images: x_mask.png, x_mask_1.png, mask_x.png, masks/x.png."""


def image_folder(
    root: str | os.PathLike[str],
    classes: Sequence[str] | None = None,
    fractions: Sequence[float] = (0.8, 0.1, 0.1),
    seed: int = 0,
    exclude: Collection[str] = (),
) -> DataSet:
    """Reads `root/<split>/<class>/*`, `root/<class>/<split>/*`, or `root/<class>/*`.

    Splits are train, val and test, in any usual spelling (Training, valid, test_set, ...). A
    validation or test split that is missing is taken from the training images, stratified. Images
    may lie deeper inside a class folder, and all of it in one more folder. Hidden files and those
    that operating systems leave are ignored. What is inferred and left out stands in the `notes`.

    Args:
      root: The folder.
      classes: Names in the order wanted; by default all that occur, sorted (numbers by value). A
        folder of such a name is a class, whatever else its name looks like.
      fractions: Of train, val and test, where splits are made.
      seed: Of the splits that are made.
      exclude: Patterns of what is left out, see `files.find_images`.

    Raises:
      UserError: No such folder, no images in it, a class that is not in `classes`, the same split
        twice, or folders and files that may be something else than classes and their images.
    """
    root = Path(root)
    refuse_no_folder(root)
    finder = ImageFinder(root, exclude)
    homes, notes = _Layout(root, finder, classes or ()).homes()
    names = _class_names(root, homes, classes)
    images = [
        (path.relative_to(root).as_posix(), path, names.index(home.name), home.split or 0)
        for home in homes
        for path in _images(root, finder, home)
    ]
    if not images:
        raise UserError(
            f"{root}: no images found; {root.name}/train/<class>/*.jpg or .png (likewise val and "
            f"test) or {root.name}/<class>/*.jpg or .png is wanted"
        )
    ids, paths, labels, assignment = zip(*images, strict=True)
    notes += _masks(root, homes, paths, bool(exclude))
    if finder.has_links:
        _refuse_two_classes(paths, [names[label] for label in labels])
    splits = None if homes[0].split is None else np.array(assignment)
    together = Split(ids, paths, np.array(labels))
    notes += finder.notes()
    return build(root.resolve().name, names, together, splits, fractions, seed, notes=notes)


def sorted_names(names: Sequence[str]) -> list[str]:
    """Distinct names in order; the numbers in them by value.

    >>> sorted_names(["10", "9", "10"]), sorted_names(["Grade 10", "Grade 2", "a"])
    (['9', '10'], ['Grade 2', 'Grade 10', 'a'])
    """

    def key(name: str) -> tuple[list[tuple[str, int, str]], str]:
        # Text and digits take turns. Of any length; `int` refuses more than 4300 digits.
        parts = re.split(r"([0-9]+)", name)
        numbers = [digits.lstrip("0") for digits in parts[1::2]]
        padded = [*((len(number), number) for number in numbers), (0, "")]
        return [(text, *number) for text, number in zip(parts[::2], padded, strict=True)], name

    return sorted(set(names), key=key)


def refuse_same_spelling(where: object, names: Collection[str], field: str) -> None:
    """Refuses classes that differ by case or spaces alone.

    Raises:
      UserError: Names them, `where` they are, and how the `field` or a new spelling mends it.
    """
    alike: dict[str, list[str]] = defaultdict(list)
    for name in sorted(set(names)):
        alike["".join(name.split()).casefold()].append(name)
    several = [spellings for spellings in alike.values() if len(spellings) > 1]
    if several:
        shown = "; ".join(" and ".join(map(repr, spellings)) for spellings in several)
        raise UserError(
            f"{where}: classes differ by case or spaces alone: {shown}; spell each class one way, "
            f"or, if they are different classes, name all classes in {field}"
        )


class _Home(NamedTuple):
    """A folder whose images have a class and, unless splits are made, an index into `SPLITS`."""

    folder: Path
    name: str
    split: int | None


class _Layout:
    """Which folders hold which classes and splits."""

    def __init__(self, root: Path, finder: ImageFinder, classes: Collection[str]):
        self._root, self._finder, self._classes = root, finder, classes

    def homes(self) -> tuple[list[_Home], list[str]]:
        """In order of split and class, and sentences for what was inferred."""
        base, notes = self._root, []
        splits = self._splits(base)
        if not splits and (inner := self._wrapped()):
            base = inner
            splits = self._splits(base)
            notes.append(f"the splits are looked for in the only folder, {base.name}")
        if splits:
            self._refuse_incomplete(base, splits)
            notes += self._spoken(base, splits)
            homes = [
                _Home(folder, folder.name, index)
                for index, home in sorted(splits.items())
                for folder in self._finder.folders(home)
            ]
            parents = [base, *splits.values()]
        else:
            homes, parents, notes = self._classes_first(base, notes)
        loose = [path for parent in parents for path in self._finder.loose(parent)]
        if loose and len({home.name for home in homes}) < 2:
            self._refuse_no_classes(loose, homes)
        return homes, notes

    def _splits(self, parent: Path) -> dict[int, Path]:
        """Index into `SPLITS` -> folder."""
        homes: dict[int, Path] = {}
        for path in self._finder.folders(parent):
            index = None if path.name in self._classes else split_of(path.name)
            if index is not None and index in homes:
                raise UserError(
                    f"{parent}: both {homes[index].name} and {path.name} are {SPLITS[index]} "
                    "splits; leave one of them"
                )
            if index is not None:
                homes[index] = path
        if 1 in homes and 0 in homes and holds_validation(homes[0].name):
            raise UserError(
                f"{parent}: both {homes[0].name} and {homes[1].name} hold validation images; "
                "leave one of them"
            )
        return homes

    def _wrapped(self) -> Path | None:
        folders = self._finder.folders(self._root)
        alone = len(folders) == 1 and folders[0].name not in self._classes
        return folders[0] if alone and self._splits(folders[0]) else None

    def _refuse_incomplete(self, base: Path, splits: dict[int, Path]) -> None:
        if 0 not in splits:
            names = [path.name for path in splits.values()]
            raise UserError(
                f"{base}: there are {names} but no train; add train/<class>/, or, if they are "
                "classes, name all classes in data.classes"
            )

    def _spoken(self, base: Path, splits: dict[int, Path]) -> list[str]:
        named = {path.name: SPLITS[index] for index, path in sorted(splits.items())}
        notes = [
            f"the folder {name} is read as the split {split}; another name overrules it"
            for name, split in named.items()
            if name != split
        ]
        others = [path.name for path in self._finder.folders(base) if path.name not in named]
        if others:
            many = count(len(others), "folder")
            notes.append(f"{many} left out beside the splits{EXAMPLES}{', '.join(others[:5])}")
        return notes

    def _classes_first(
        self, base: Path, notes: list[str]
    ) -> tuple[list[_Home], list[Path], list[str]]:
        """`<class>/<split>/*` or `<class>/*`."""
        folders = self._finder.folders(base)
        inner = {folder: self._splits(folder) for folder in folders}
        if not any(inner.values()):
            self._refuse_hidden_classes(folders)
            notes += self._alike(folders)
            return [_Home(folder, folder.name, None) for folder in folders], [base], notes
        without = [folder.name for folder, splits in inner.items() if not splits]
        if without:
            (example,) = [folder for folder, splits in inner.items() if splits][:1]
            names = ", ".join(path.name for path in inner[example].values())
            raise UserError(
                f"{base}: {example.name} has folders that look like splits ({names}), "
                f"{', '.join(without)} has none; give all classes the same splits, or rename "
                "these folders"
            )
        notes.append("the splits are folders inside the folder of each class")
        for splits in inner.values():
            notes += [note for note in self._spoken(base, splits) if "split " in note]
        homes = [
            _Home(home, folder.name, index)
            for folder, splits in inner.items()
            for index, home in splits.items()
        ]
        homes.sort(key=lambda home: (home.split or 0, home.name))
        return homes, [base, *folders], list(dict.fromkeys(notes))

    def _refuse_hidden_classes(self, folders: list[Path]) -> None:
        """One class is no data set; there may be several in its folder."""
        if len(folders) == 1 and folders[0].name not in self._classes:
            inner = self._finder.folders(folders[0])
            if len(inner) > 1 and not any(map(is_image, self._finder.files(folders[0]))):
                raise UserError(
                    f"{self._root}: the only folder is {folders[0].name!r}; if its folders are the "
                    f"classes ({inner[0].name}, ...), set data.root = {folders[0]}"
                )

    def _alike(self, folders: list[Path]) -> list[str]:
        """A sentence if all classes have the same folders, which may be the classes themselves."""
        inner = {tuple(path.name for path in self._finder.folders(one)) for one in folders}
        if len(folders) < 2 or len(inner) > 1 or len(min(inner)) < 2:
            return []
        return [
            f"each class has the same folders inside ({', '.join(min(inner)[:5])}): their names "
            "are not the classes, those of the folders above are"
        ]

    def _refuse_no_classes(self, loose: list[Path], homes: list[_Home]) -> None:
        in_root = all(path.parent == self._root for path in loose)
        hint = f"; perhaps data.root = {self._root.parent}" if in_root else ""
        others = f" beside the only class {homes[0].name!r}" if homes else ""
        raise UserError(
            f"{self._root}: holds {len(loose)} images{others} but no classes: the name of an "
            f"image's folder is its class, and data.root is the folder above the classes{hint}; "
            "images whose classes are in a table are read with data.kind = 'table'"
        )


def _class_names(root: Path, homes: list[_Home], classes: Sequence[str] | None) -> list[str]:
    if classes is None:
        found = sorted_names([home.name for home in homes])
        _refuse_other_meanings(root, found)
        refuse_same_spelling(root, found, "data.classes")
        return found
    for home in homes:
        if home.name not in classes:
            raise UserError(
                f"{home.folder}: the class {home.name!r} is none of {list(classes)}; add it to "
                "data.classes, or remove the folder"
            )
    if len(set(classes)) < len(classes):
        raise UserError(f"{root}: a class occurs twice in {list(classes)}; name each once")
    return list(classes)


def _refuse_other_meanings(root: Path, names: list[str]) -> None:
    """Asks where classes may be splits, parts of a download, or masks."""
    strange = [name for name in names if looks_like_split(name)]
    what = "a split, a fold or a part of a download"
    if not strange and any(_is_called(name, "images", "image", "imgs", "img") for name in names):
        strange = [
            name
            for name in names
            if _MASK_FOLDER.fullmatch(name.lower()) or _is_called(name, "labels", "label")
        ]
        what = "what belongs to the images beside it, as masks do"
    if strange:
        raise UserError(
            f"{root}: is {', '.join(map(repr, strange))} a class, or {what}? The folders that "
            f"would be classes are {', '.join(map(repr, names))}. If they are, name them all in "
            "data.classes; if not, put the images into <split>/<class>/ or <class>/, or leave the "
            "folder out with data.exclude"
        )


def _is_called(name: str, *words: str) -> bool:
    return name.lower() in words


def _images(root: Path, finder: ImageFinder, home: _Home) -> list[Path]:
    """The images of a class folder; a folder in it that is called as a split is refused."""
    images = finder.images(home.folder)
    parents = {path.parent for path in images}
    parts = {part for one in parents for part in one.relative_to(home.folder).parts}
    splits = sorted(part for part in parts if split_of(part) is not None)
    if splits:
        raise UserError(
            f"{home.folder.relative_to(root)}: is the folder {splits[0]!r} inside of it a split? "
            "If it is, it belongs directly below data.root or below each class; if not, rename it"
        )
    return images


def _masks(root: Path, homes: list[_Home], paths: Sequence[Path], answered: bool) -> list[str]:
    """Refuses masks beside images; where `data.exclude` is set, a sentence if there still are."""
    folders = {home.folder for home in homes}
    stems = {path.stem.lower() for path in paths}
    masks = [path for path in paths if _is_mask(path, stems, folders)]
    if not masks or len(masks) == len(paths):
        return []
    example = masks[0].relative_to(root).as_posix()
    if answered:
        looks = f"{count(len(masks), 'image')} named like the mask of another; "
        return [f"{looks}data.exclude leaves what is like its patterns out{EXAMPLES}{example}"]
    raise UserError(
        f"{root}: {len(masks)} of {len(paths)} images are named like masks of others, for instance "
        f"{example}; data.exclude = ('*_mask*',), or other patterns, leaves them out (a pattern "
        "that fits none keeps them)"
    )


def _is_mask(path: Path, stems: Collection[str], folders: Collection[Path]) -> bool:
    match = _MASK_FILE.fullmatch(path.stem.lower())
    if match and (match[1] or match[2]) in stems:
        return True
    parents: list[PurePath] = []
    for parent in path.parents:
        if parent in folders:
            break
        parents.append(parent)
    return any(_MASK_FOLDER.fullmatch(parent.name.lower()) for parent in parents)


def _refuse_two_classes(paths: Sequence[Path], names: Sequence[str]) -> None:
    """A file that links lead to must have one class."""
    owners: dict[str, tuple[str, Path]] = {}
    for path, name in zip(paths, names, strict=True):
        first, other = owners.setdefault(os.path.realpath(path), (name, path))
        if first != name:
            raise UserError(
                f"{path}: is the same file as {other}, which is in the class {first!r}; a link "
                "may not give an image a second class"
            )
