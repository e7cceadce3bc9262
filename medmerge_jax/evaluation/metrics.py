"""Classification metrics over a whole split, on the host, with scikit-learn.

Never means of batch means: those are wrong on a short last batch, and F1 and AUC have none.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import log_expit, log_softmax, logsumexp

from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.registry import Decorator, Registry

# scikit-learn takes a second to import, so the functions that need it import it.

Score = Callable[[Predictions], float]


@dataclasses.dataclass(frozen=True)
class Metric:
    """An entry of `METRICS`.

    Attributes:
      multiclass: Its value where an image has one class; NaN where it is undefined.
      title: In tables; by default its name.
      multilabel: Its value where an image has several labels; None: it is undefined there.
      higher_is_better: Whether more of it is better.
      ordinal: Whether it depends on the order of the classes, so that it says nothing where that
        is arbitrary.
      compared: Whether it has a column in the tables of comparisons.
    """

    multiclass: Score
    title: str = ""
    multilabel: Score | None = None
    higher_is_better: bool = True
    ordinal: bool = False
    compared: bool = True

    def __call__(self, predictions: Predictions) -> float | None:
        """Its value, None where it is undefined."""
        score = self.multilabel if predictions.multilabel else self.multiclass
        if score is None or (self.ordinal and not predictions.ordinal):
            return None
        value = float(score(predictions))
        return value if math.isfinite(value) else None


METRICS: Registry[Metric] = Registry("metric")
"""All metrics, in the order of results and tables."""

metric = Decorator(METRICS, Metric)
"""Registers a function from `Predictions` with float64 logits to a number. Facts: see `Metric`."""


def titles() -> dict[str, str]:
    """The title of every metric, by name."""
    return {name: entry.title or name for name, entry in METRICS.items()}


def classification_metrics(predictions: Predictions) -> dict[str, Any]:
    """All of `METRICS`, and `num_examples`; None where a metric is undefined.

    With several labels per image, unknown labels are left out label by label, and a label is
    predicted where its probability is above 0.5.

    Raises:
      FloatingPointError: A logit is NaN or infinite.
    """
    logits = np.asarray(predictions.logits, np.float64)
    bad = int(np.sum(~np.isfinite(logits)))
    if bad:
        raise FloatingPointError(f"{bad} of {logits.size} logits are not finite")
    exact = dataclasses.replace(predictions, logits=logits)
    values = {name: entry(exact) for name, entry in METRICS.items()}
    return {**values, "num_examples": len(predictions)}


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Counts (classes, classes), int64: row the label, column the prediction."""
    from sklearn.metrics import confusion_matrix as count

    classes = np.arange(predictions.num_classes)
    return np.asarray(count(predictions.labels, predictions.predicted, labels=classes))


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Over repetitions (seeds): `{"mean", "std", "values"}`.

    The standard deviation is that of a sample (n - 1); None for a single value.
    """
    numbers = [float(value) for value in values]
    std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return {"mean": float(np.mean(numbers)), "std": std, "values": numbers}


def over_labels(score: Callable[[np.ndarray, np.ndarray], float]) -> Score:
    """The mean over labels, of those where it is defined, of a score of one label.

    Args:
      score: From logits (m,) of the images whose label is known and whether it is positive,
        bool (m,), to a number; NaN where it is undefined.
    """

    def mean(predictions: Predictions) -> float:
        columns = zip(predictions.logits.T, predictions.labels.T, strict=True)
        scores = []
        for logits, labels in columns:
            has_label = ~np.isnan(labels)
            scores.append(score(logits[has_label], labels[has_label] == 1))
        return _mean(scores)

    return mean


def _multilabel_loss(predictions: Predictions) -> float:
    logits, labels = predictions.logits, predictions.labels.astype(np.float64)
    has_label = ~np.isnan(labels)
    targets = np.where(has_label, labels, 0.0)
    positive = targets * predictions.weights * log_expit(logits)
    losses = -(positive + (1.0 - targets) * log_expit(-logits))
    return _mean(losses[has_label])


@metric(multilabel=_multilabel_loss, higher_is_better=False, compared=False)
def loss(predictions: Predictions) -> float:
    """Mean cross-entropy; of several labels mean binary cross-entropy over the known labels."""
    labels = predictions.labels.astype(np.int64)
    logs = log_softmax(predictions.logits, axis=1)
    losses = -np.take_along_axis(logs, labels[:, None], axis=1)[:, 0]
    weights = predictions.weights[labels]
    return float(np.sum(weights * losses) / np.sum(weights))


def _accuracy(logits: np.ndarray, positive: np.ndarray) -> float:
    return float(np.mean((logits > 0) == positive)) if len(positive) else math.nan


@metric(multilabel=over_labels(_accuracy))
def accuracy(predictions: Predictions) -> float:
    """Share of right predictions; of several labels the mean of each label's."""
    return float(np.mean(predictions.predicted == predictions.labels))


def _f1(logits: np.ndarray, positive: np.ndarray) -> float:
    predicted = logits > 0
    counted = np.sum(predicted) + np.sum(positive)
    return float(2 * np.sum(predicted & positive) / counted) if counted else math.nan


@metric(title="macro F1", multilabel=over_labels(_f1))
def macro_f1(predictions: Predictions) -> float:
    """Mean F1 over the classes that occur among labels or predictions, scikit-learn's default.

    A class that is only predicted, or never hit, counts as 0. Of several labels it is the mean
    over those that are positive or predicted positive somewhere.
    """
    from sklearn.metrics import f1_score

    labels, predicted = predictions.labels, predictions.predicted
    return float(f1_score(labels, predicted, average="macro", zero_division=0))


def _balanced_accuracy(logits: np.ndarray, positive: np.ndarray) -> float:
    predicted = logits > 0
    if not _both(positive):
        return math.nan
    return _mean([float(np.mean(predicted[positive])), float(np.mean(~predicted[~positive]))])


@metric(title="balanced accuracy", multilabel=over_labels(_balanced_accuracy))
def balanced_accuracy(predictions: Predictions) -> float:
    """Mean recall over the classes that occur among the labels.

    Of several labels it is the mean over those that have positives and negatives.
    """
    from sklearn.metrics import recall_score

    labels, predicted = predictions.labels, predictions.predicted
    occurring = np.unique(labels)
    return float(
        recall_score(labels, predicted, labels=occurring, average="macro", zero_division=0)
    )


def _auc(logits: np.ndarray, positive: np.ndarray) -> float:
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(positive, logits)) if _both(positive) else math.nan


@metric(title="macro AUC", multilabel=over_labels(_auc))
def macro_auc(predictions: Predictions) -> float:
    """Mean area under the ROC curve, each class against the rest.

    Over the classes, or labels, that have positives and negatives; for two classes that of class 1.
    """
    labels, logits = predictions.labels, predictions.logits
    scored = [1] if predictions.num_classes == 2 else range(predictions.num_classes)
    return _mean([_auc(_log_odds(logits, c), labels == c) for c in scored])


@metric(title="quadratic weighted kappa", ordinal=True)
def kappa(predictions: Predictions) -> float:
    """Cohen's, with quadratic weights and the classes in order, in [-1, 1]."""
    from sklearn.metrics import cohen_kappa_score

    labels, predicted = predictions.labels, predictions.predicted
    if len(np.union1d(labels, predicted)) == 1:  # Agreement by chance is then certain.
        return math.nan
    classes = np.arange(predictions.num_classes)
    return float(cohen_kappa_score(labels, predicted, labels=classes, weights="quadratic"))


def _log_odds(logits: np.ndarray, label: int) -> np.ndarray:
    """log(p / (1 - p)) of a class: ranks as its probability, but confident ones never tie."""
    others = logsumexp(np.delete(logits, label, axis=1), axis=1)
    return np.asarray(logits[:, label] - others)


def _both(positive: np.ndarray) -> bool:
    return bool(np.any(positive) and not np.all(positive))


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Of those that are defined; NaN if none is."""
    defined = [value for value in values if not math.isnan(value)]
    return float(np.mean(defined)) if defined else math.nan
