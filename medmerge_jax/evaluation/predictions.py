"""What a model says of the images of a split, beside what is true of them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from medmerge_jax.storage.atomic import write_atomically


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

    def __post_init__(self) -> None:
        shape = self.logits.shape if self.multilabel else self.logits.shape[:1]
        if self.logits.ndim != 2 or self.labels.shape != shape or not len(self.logits):
            raise ValueError(
                f"logits of shape {self.logits.shape} and labels of shape {self.labels.shape}: "
                f"(n, classes) and {'(n, classes)' if self.multilabel else '(n,)'} with n > 0 "
                "are wanted"
            )
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

    def save(self, path: Path) -> None:
        """Writes an .npz file with ids, logits, labels and classes; atomic."""
        arrays: dict[str, Any] = {
            "ids": np.asarray(self.ids, str),
            "logits": self.logits,
            "labels": self.labels,
            "classes": np.asarray(self.classes, str),
        }
        write_atomically(path, lambda file: np.savez(file, **arrays))
