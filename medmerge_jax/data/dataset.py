"""What a data set is, before any pixel is read: ids, paths, labels and groups per split."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medmerge_jax.data.splits import (
    SPLITS,
    check_fractions,
    stratified_group_folds,
    stratified_group_split,
)
from medmerge_jax.errors import UserError

EXAMPLES = ", for instance "
"""Before the examples in a data set's notes, which come last: what is shared is cut off there."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """The examples of one split, in a fixed order.

    Attributes:
      ids: Names that are unique in the data set and do not depend on where it lies.
      paths: The image files.
      labels: int32 (n,) class indices, or float32 (n, classes) of 0, 1 and NaN (unknown) where
        an image has several labels.
      groups: Patient, lesion or the like of each example; None where unknown.
      pixels: uint8 (n, h, w) or (n, h, w, 3) of images that come decoded; `paths` are then the
        archives that they come from.
    """

    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: np.ndarray
    groups: tuple[str, ...] | None = None
    pixels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "Split":
        """Some of the examples; `rows`, int (m,), ascend."""
        chosen = rows.tolist()
        return Split(
            tuple(self.ids[row] for row in chosen),
            tuple(self.paths[row] for row in chosen),
            self.labels[rows],
            None if self.groups is None else tuple(self.groups[row] for row in chosen),
            None if self.pixels is None else _rows(self.pixels, chosen),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class DataSet:
    """A data set of images.

    Attributes:
      name: For messages and reports.
      classes: Names; a label is an index into them.
      multilabel: Whether an image has any number of the classes, instead of exactly one.
      splits: "train", "val" and "test".
      ordinal: Whether the order of the classes means something; None: as their names say.
      notes: What was inferred and left out when it was read, a sentence each.
      titles: What classes are whose names are but numbers, by name.
    """

    name: str
    classes: tuple[str, ...]
    multilabel: bool
    splits: dict[str, Split]
    ordinal: bool | None = None
    notes: tuple[str, ...] = ()
    titles: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def shown_classes(self) -> tuple[str, ...]:
        """What figures and reports call the classes."""
        return tuple(f"{one} {self.titles.get(one, '')}".strip() for one in self.classes)

    @property
    def ordered(self) -> bool:
        """Whether the order of the classes is known to mean something; ascending numbers' does."""
        if self.multilabel or self.ordinal is not None:
            return bool(self.ordinal) and not self.multilabel
        numbers = [int(name) for name in self.classes if name.isascii() and name.isdecimal()]
        return len(numbers) == len(self.classes) and numbers == sorted(numbers)

    @property
    def num_classes(self) -> int:
        """Length of `classes`."""
        return len(self.classes)

    def only(self, split: str) -> "DataSet":
        """The data set with nothing but the images to evaluate on, as its "test" split.

        Args:
          split: One of `splits.EVALUATED`.

        Raises:
          UserError: There are none.
        """
        chosen = [self.splits[name] for name in (SPLITS if split == "all" else (split,))]
        images = chosen[0] if len(chosen) == 1 else _joined(chosen)
        if not len(images):
            raise UserError(f"data set {self.name}: the split {split!r} is empty; choose another")
        return dataclasses.replace(self, splits={"test": images})

    def in_folds(self, folds: int, fold: int, seed: int) -> "DataSet":
        """The data set with its train and val images in so many folds, one of which is val.

        Folds are stratified, and no group is in two of them. Test images stay what they are.

        Raises:
          UserError: There are fewer groups than folds.
        """
        images = _joined([self.splits["train"], self.splits["val"]])
        parts = stratified_group_folds(images.labels, images.groups, folds, seed)
        if len(np.unique(parts)) < folds:
            raise UserError(
                f"data set {self.name}: its {len(images)} train and val images make no {folds} "
                "folds; a smaller data.folds is wanted"
            )
        splits = {
            **self.splits,
            "train": images.take(np.flatnonzero(parts != fold)),
            "val": images.take(np.flatnonzero(parts == fold)),
        }
        how = "stratified" if images.groups is None else "stratified, no group in two of them"
        note = (
            f"train and val are joined and parted into {folds} folds ({how}, seed {seed}), of "
            f"which number {fold} is val"
        )
        return dataclasses.replace(self, splits=splits, notes=(*self.notes, note))

    def fingerprint(self) -> str:
        """sha256 of classes, ids, labels and splits, wherever the files are."""
        digest = hashlib.sha256()
        digest.update(json.dumps([self.classes, self.multilabel]).encode())
        for name in (name for name in SPLITS if name in self.splits):
            split = self.splits[name]
            digest.update(json.dumps([name, split.ids]).encode())
            # A NaN has many bit patterns; -1 stands for all of them.
            labels = np.nan_to_num(split.labels, nan=-1.0) if self.multilabel else split.labels
            digest.update(labels.astype("<f4" if self.multilabel else "<i4").tobytes())
        return digest.hexdigest()

    def counts(self) -> dict[str, dict[str, int]]:
        """Images of each class (positive ones, with several labels per image) in each split."""
        counts = {}
        for name, split in self.splits.items():
            if self.multilabel:
                numbers = np.nansum(split.labels, axis=0).astype(int)
            else:
                numbers = np.bincount(split.labels, minlength=self.num_classes)
            counts[name] = dict(zip(self.classes, numbers.tolist(), strict=True))
        return counts

    def check(self) -> None:
        """Refuses what cannot be trained on; what makes results too good is for `audit`.

        Raises:
          UserError: A split is empty, a class has no training image, a label is none of the
            classes, or an id occurs twice.
        """
        if self.num_classes < (1 if self.multilabel else 2):
            raise UserError(
                f"data set {self.name}: the only class is {list(self.classes)}; "
                "two or more are wanted"
            )
        for name in SPLITS:
            if not len(self.splits[name]):
                raise UserError(
                    f"data set {self.name}: the split {name!r} is empty; give it images, or "
                    "leave all splits to the program with fractions above 0"
                )
        self.check_images()
        self._check_training_classes()

    def check_images(self) -> None:
        """Refuses what cannot be evaluated on, whatever splits there are.

        Raises:
          UserError: A label is none of the classes, or an id occurs twice.
        """
        for name in self.splits:
            self._check_labels(name)
        self._check_ids()

    def _check_labels(self, name: str) -> None:
        split = self.splits[name]
        labels = split.labels
        if self.multilabel:
            wrong = np.any((labels != 0) & (labels != 1) & ~np.isnan(labels), axis=1)
            allowed = "0, 1 or unknown for each class"
        else:
            wrong = (labels < 0) | (labels >= self.num_classes)
            allowed = f"an index into the {self.num_classes} classes {list(self.classes)}"
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(
                f"data set {self.name}, split {name!r}, image {split.ids[row]}: the label is "
                f"{labels[row]}; {allowed} is wanted"
            )

    def _check_ids(self) -> None:
        home: dict[str, str] = {}
        for name in self.splits:
            for example in self.splits[name].ids:
                if example in home:
                    raise UserError(
                        f"data set {self.name}: the image {example} occurs twice, in the splits "
                        f"{home[example]!r} and {name!r}; leave one of them"
                    )
                home[example] = name

    def _check_training_classes(self) -> None:
        counts = self.counts()
        missing = [name for name, count in counts["train"].items() if count == 0]
        if missing:
            elsewhere = {
                name: sum(counts[split][name] for split in ("val", "test")) for name in missing
            }
            raise UserError(
                f"data set {self.name}: no training image of {missing} (images of them in the "
                f"other splits: {elsewhere}); add some, or leave the class out"
            )


def build(
    name: str,
    classes: Sequence[str],
    images: Split,
    assignment: np.ndarray | None,
    fractions: Sequence[float],
    seed: int,
    *,
    split_by_group: bool = True,
    strata: np.ndarray | None = None,
    notes: Sequence[str] = (),
) -> DataSet:
    """Puts a data set together, making the splits that are missing.

    Args:
      name: Of the data set.
      classes: Names.
      images: All images; labels of any int or float type.
      assignment: int (n,), index into `SPLITS`; None if the data comes without splits. A
        validation or test split that it leaves empty is taken from the training images.
      fractions: Of train, val, test.
      seed: Of the splits that are made.
      split_by_group: Whether the splits that are made keep groups together.
      strata: Labels by which the splits that are made are stratified; None: those of `images`.
      notes: See `DataSet`; which splits are made is added.
    """
    multilabel = images.labels.ndim == 2
    images = dataclasses.replace(
        images, labels=images.labels.astype(np.float32 if multilabel else np.int32)
    )
    groups = None if images.groups is None or not split_by_group else np.asarray(images.groups)
    strata = images.labels if strata is None else strata
    assignment, made = _complete_assignment(strata, groups, assignment, fractions, seed)
    splits = {
        split: images.take(np.flatnonzero(assignment == index))
        for index, split in enumerate(SPLITS)
    }
    return DataSet(name, tuple(classes), multilabel, splits, notes=(*notes, *made))


def _joined(splits: Sequence[Split]) -> Split:
    """The images of several splits, in this order."""
    filled = [split for split in splits if len(split)]
    grouped = all(split.groups is not None for split in filled)
    decoded = [split.pixels for split in filled if split.pixels is not None]
    return Split(
        tuple(one for split in filled for one in split.ids),
        tuple(path for split in filled for path in split.paths),
        np.concatenate([split.labels for split in filled or splits]),
        tuple(g for split in filled for g in split.groups or ()) if grouped else None,
        np.concatenate(decoded) if decoded else None,
    )


def _rows(pixels: np.ndarray, rows: list[int]) -> np.ndarray:
    """Those of the rows, ascending; without a copy where they are neighbours: some have 16 GB."""
    if rows and rows[-1] - rows[0] + 1 == len(rows):
        return pixels[rows[0] : rows[-1] + 1]
    return pixels[rows]


def _complete_assignment(
    labels: np.ndarray,
    groups: np.ndarray | None,
    assignment: np.ndarray | None,
    fractions: Sequence[float],
    seed: int,
) -> tuple[np.ndarray, list[str]]:
    """The index into `SPLITS` of each image, and a sentence if splits were made."""
    shares = np.asarray(check_fractions(fractions))
    how = "stratified" if groups is None else "stratified, no group in two of them"
    if assignment is None:
        made = ", ".join(f"{n} {share:g}" for n, share in zip(SPLITS, shares, strict=True))
        note = f"no splits are given; they are made ({how}, seed {seed}): {made}"
        return stratified_group_split(labels, groups, shares, seed), [note]
    missing = [index for index in (1, 2) if not np.any(assignment == index)]
    missing = [index for index in missing if shares[index] > 0]
    if not missing or not np.any(assignment == 0):
        return assignment, []
    names = " and ".join(SPLITS[index] for index in missing)
    shares[[index for index in (1, 2) if index not in missing]] = 0.0
    train = np.flatnonzero(assignment == 0)
    parts = stratified_group_split(
        labels[train], None if groups is None else groups[train], shares / shares.sum(), seed
    )
    assignment = assignment.copy()
    assignment[train] = parts
    return assignment, [f"no {names} split is given; taken from train ({how}, seed {seed})"]
