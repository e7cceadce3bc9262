"""What a model says of the images of a split, beside what is true of them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medmerge_jax.data.dataset import DataSet
from medmerge_jax.errors import UserError
from medmerge_jax.storage.atomic import write_atomically
from medmerge_jax.storage.npz import read_npz


@dataclasses.dataclass(frozen=True, eq=False)
class Predictions:
    """A model's outputs for the images of a split, and their labels.

    Attributes:
      logits: (n, classes) float.
      labels: Class indices (n,); for `multilabel` (n, classes) of 0, 1 and NaN for unknown.
      multilabel: Whether an image has any number of the classes, instead of exactly one.
      ids: Of the images, where they are known.
      classes: Names, where they are known.
      ordinal: Whether the order of the classes is known to mean something.
      class_weights: (classes,) of the loss, as in `loss.weighted_loss`; None: all are 1.
      groups: Int (n,), the number of each image's patient, lesion or the like, see
        `number_groups`; None where they are not known.

    Raises:
      ValueError: There are no examples, the shapes do not fit, or a label is no class.
    """

    logits: np.ndarray
    labels: np.ndarray
    multilabel: bool = False
    ids: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    ordinal: bool = False
    class_weights: np.ndarray | None = None
    groups: np.ndarray | None = None

    def __post_init__(self) -> None:
        shape = self.logits.shape if self.multilabel else self.logits.shape[:1]
        if self.logits.ndim != 2 or self.labels.shape != shape or not len(self.logits):
            raise ValueError(
                f"logits of shape {self.logits.shape} and labels of shape {self.labels.shape}: "
                f"(n, classes) and {'(n, classes)' if self.multilabel else '(n,)'} with n > 0 "
                "are wanted"
            )
        if self.ids and len(self.ids) != len(self):
            raise ValueError(f"{len(self.ids)} ids of {len(self)} images")
        if self.groups is not None and self.groups.shape != (len(self),):
            raise ValueError(f"groups of shape {self.groups.shape} of {len(self)} images")
        if self.multilabel:
            return
        low, high = self.labels.min(), self.labels.max()
        if not np.isin(self.labels, np.arange(self.num_classes)).all():
            raise ValueError(f"labels are in [{low}, {high}], of {self.num_classes} classes")

    def __len__(self) -> int:
        return len(self.logits)

    @property
    def num_classes(self) -> int:
        """Number of logits of an image."""
        return int(self.logits.shape[1])

    @property
    def predicted(self) -> np.ndarray:
        """(n,) the class of the largest logit, the first of equal ones."""
        return np.asarray(np.argmax(self.logits, axis=1))

    @property
    def weights(self) -> np.ndarray:
        """(classes,) float64 of the loss."""
        weights = np.ones(self.num_classes) if self.class_weights is None else self.class_weights
        return np.asarray(weights, np.float64)

    def counts(self) -> dict[str, int]:
        """Images of each of `classes`; with several labels per image, positive ones."""
        if self.multilabel:
            numbers = np.nansum(self.labels, axis=0).astype(int)
        else:
            numbers = np.bincount(self.labels, minlength=self.num_classes)
        return dict(zip(self.classes, numbers.tolist(), strict=True))

    def take(self, rows: np.ndarray) -> "Predictions":
        """Of some of the images, int (m,); any of them any number of times."""
        return dataclasses.replace(
            self,
            logits=self.logits[rows],
            labels=self.labels[rows],
            ids=tuple(self.ids[row] for row in rows.tolist()) if self.ids else (),
            groups=None if self.groups is None else self.groups[rows],
        )

    def save(self, path: Path) -> None:
        """Writes an .npz file that `load` reads; atomic. Class weights are the loss's alone."""
        arrays: dict[str, Any] = {
            "ids": np.asarray(self.ids, str),
            "logits": self.logits,
            "labels": self.labels,
            "classes": np.asarray(self.classes, str),
            "ordinal": np.asarray(self.ordinal),
            **({} if self.groups is None else {"groups": self.groups}),
        }
        write_atomically(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: Path) -> "Predictions":
        """What `save` has written; a file of an earlier version knows no order and no groups.

        Raises:
          UserError: The file cannot be read, or is no such file.
        """
        arrays = read_npz(path)
        try:
            return cls(
                arrays["logits"],
                arrays["labels"],
                multilabel=arrays["labels"].ndim == 2,
                ids=tuple(arrays["ids"].tolist()),
                classes=tuple(arrays["classes"].tolist()),
                ordinal=bool(arrays.get("ordinal", False)),
                groups=arrays.get("groups"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{path}: holds no predictions of this program ({error}); run what wrote it again"
            ) from error


def predictions_of(logits: np.ndarray, dataset: DataSet, split: str) -> Predictions:
    """Logits (n, classes) for the images of a split beside what the data set says of them."""
    images = dataset.splits[split]
    return Predictions(
        logits,
        images.labels,
        dataset.multilabel,
        images.ids,
        dataset.classes,
        dataset.ordered,
        groups=number_groups(images.groups),
    )


def class_names(classes: Sequence[str], count: int) -> tuple[str, ...]:
    """Names of the classes; where they are not known, numbers."""
    return tuple(classes) or tuple(map(str, range(count)))


def number_groups(names: Sequence[str] | None) -> np.ndarray | None:
    """Int32 (n,): groups numbered in the order in which they come first, for names are patients'.

    >>> number_groups(["ann", "bob", "ann"])
    array([0, 1, 0], dtype=int32)
    """
    if names is None:
        return None
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int32)
