"""The most confident mistakes of a model."""

from typing import NamedTuple

import numpy as np
from scipy.special import expit, softmax

from medmerge_jax.evaluation.predictions import Predictions, class_names


class Mistake(NamedTuple):
    """An image of which the model is wrong; of several labels per image, one label of it.

    Attributes:
      row: Of the image in the predictions.
      true: What it is: a class, or "no CLASS" of a label that it has not.
      predicted: What the model says, likewise.
      probability: Of what it says, in (0, 1).
      of_true: Of what it is.
    """

    row: int
    true: str
    predicted: str
    probability: float
    of_true: float


def mistakes(predictions: Predictions, count: int) -> tuple[list[Mistake], int]:
    """The mistakes that the model is surest of, and how many there are in all.

    Of several labels per image each known one that is on the other side of ½ counts.

    Args:
      predictions: Of the images.
      count: The most that are wanted.

    Returns:
      Descending by probability; of equal ones the first image first.
    """
    names = class_names(predictions.classes, predictions.num_classes)
    find = _of_labels if predictions.multilabel else _of_classes
    found = find(predictions, names)
    found.sort(key=lambda one: (-one.probability, one.row))
    return found[:count], len(found)


def _of_classes(predictions: Predictions, names: tuple[str, ...]) -> list[Mistake]:
    probabilities = softmax(predictions.logits.astype(np.float64), axis=1)
    labels, said = predictions.labels, predictions.predicted
    return [
        Mistake(
            row,
            names[labels[row]],
            names[said[row]],
            float(probabilities[row, said[row]]),
            float(probabilities[row, labels[row]]),
        )
        for row in np.flatnonzero(said != labels).tolist()
    ]


def _of_labels(predictions: Predictions, names: tuple[str, ...]) -> list[Mistake]:
    probabilities = expit(predictions.logits.astype(np.float64))
    wrong = ~np.isnan(predictions.labels) & ((predictions.labels == 1) != (probabilities > 0.5))
    found = []
    for row, label in zip(*np.nonzero(wrong), strict=True):
        of_true = float(probabilities[row, label])
        true, said = names[label], f"no {names[label]}"
        if predictions.labels[row, label] != 1:
            true, said, of_true = said, true, 1 - of_true
        found.append(Mistake(int(row), true, said, 1 - of_true, of_true))
    return found
