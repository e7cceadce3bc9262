"""Classification metrics over a whole split, on the host.

Never means of batch means: those are wrong on a short last batch, and F1 and AUC have none. The
metrics here take how often each image counts, so that those of a thousand resamples are a few
products of matrices, see `bootstrap`; each of them equals scikit-learn's, which the tests compare.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, log_expit, log_softmax, logsumexp, softmax

from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.registry import Decorator, Registry

Score = Callable[[Predictions], float]


class Counted:
    """A score of images that count any number of times.

    It decorates a function of predictions and counts, float64 (resamples, n), to the values
    (resamples,), NaN where one is undefined; called with predictions alone, each image counts once.
    """

    def __init__(self, function: Callable[[Predictions, np.ndarray], np.ndarray]):
        self._function = function
        functools.update_wrapper(self, function)

    def __call__(self, predictions: Predictions) -> float:
        """Its value where each image counts once; NaN where it is undefined."""
        return float(self.over(predictions, np.ones((1, len(predictions))))[0])

    def over(self, predictions: Predictions, counts: np.ndarray) -> np.ndarray:
        """The value (resamples,) for each row of counts."""
        with np.errstate(invalid="ignore", divide="ignore"):  # what has no value is 0 / 0
            return np.asarray(self._function(predictions, counts), np.float64)


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
        score = self._score(predictions)
        value = math.nan if score is None else float(score(predictions))
        return value if math.isfinite(value) else None

    def resampled(self, predictions: Predictions, counts: np.ndarray) -> np.ndarray:
        """Its values float64 (resamples,) where images count 0, 1 or several times.

        Args:
          predictions: Of n images.
          counts: Whole numbers (resamples, n).

        Returns:
          NaN where it is undefined. In one pass if its score is `Counted`.
        """
        score = self._score(predictions)
        if score is None:
            return np.full(len(counts), math.nan)
        if isinstance(score, Counted):
            values = score.over(predictions, counts.astype(np.float64, copy=False))
        else:
            rows = (np.repeat(np.arange(len(row)), row) for row in counts.astype(np.int64))
            values = np.array([float(score(predictions.take(one))) for one in rows])
        return np.where(np.isfinite(values), values, math.nan)

    def _score(self, predictions: Predictions) -> Score | None:
        if self.ordinal and not predictions.ordinal:
            return None
        return self.multilabel if predictions.multilabel else self.multiclass


METRICS: Registry[Metric] = Registry("metric")
"""All metrics, in the order of results and tables."""

metric = Decorator(METRICS, Metric)
"""Registers a function from `Predictions` with float64 logits to a number. Facts: see `Metric`."""


def titles() -> dict[str, str]:
    """The title of every metric, by name."""
    return {name: entry.title or name for name, entry in METRICS.items()}


def exact(predictions: Predictions) -> Predictions:
    """The predictions with logits in float64, as metrics want them.

    Raises:
      FloatingPointError: A logit is NaN or infinite.
    """
    logits = np.asarray(predictions.logits, np.float64)
    bad = int(np.sum(~np.isfinite(logits)))
    if bad:
        raise FloatingPointError(f"{bad} of {logits.size} logits are not finite")
    return dataclasses.replace(predictions, logits=logits)


def classification_metrics(predictions: Predictions) -> dict[str, Any]:
    """All of `METRICS`, and `num_examples`; None where a metric is undefined.

    With several labels per image, unknown labels are left out label by label, and a label is
    predicted where its probability is above 0.5.

    Raises:
      FloatingPointError: A logit is NaN or infinite.
    """
    predictions = exact(predictions)
    values = {name: entry(predictions) for name, entry in METRICS.items()}
    return {**values, "num_examples": len(predictions)}


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """Counts (classes, classes), int64: row the label, column the prediction."""
    classes = predictions.num_classes
    cells = predictions.labels.astype(np.int64) * classes + predictions.predicted
    return np.asarray(np.bincount(cells, minlength=classes**2).reshape(classes, classes))


def mean_std(values: Sequence[float]) -> dict[str, Any]:
    """Over repetitions (seeds): `{"mean", "std", "values"}`.

    The standard deviation is that of a sample (n - 1); None for a single value.
    """
    numbers = [float(value) for value in values]
    std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return {"mean": float(np.mean(numbers)), "std": std, "values": numbers}


def over_labels(score: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Counted:
    """The mean over labels, of those where it is defined, of a score of one label.

    Args:
      score: From logits (m,) of the images whose label is known, whether it is positive, bool
        (m,), and counts (resamples, m) to numbers (resamples,); NaN where it is undefined.
    """

    def mean(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
        scores = []
        for logits, labels in zip(predictions.logits.T, predictions.labels.T, strict=True):
            has_label = ~np.isnan(labels)
            scores.append(score(logits[has_label], labels[has_label] == 1, counts[:, has_label]))
        return _mean(scores)

    return Counted(mean)


@Counted
def _multilabel_loss(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    logits, labels = predictions.logits, predictions.labels.astype(np.float64)
    has_label = ~np.isnan(labels)
    targets = np.where(has_label, labels, 0.0)
    positive = targets * predictions.weights * log_expit(logits)
    losses = -(positive + (1.0 - targets) * log_expit(-logits)) * has_label
    return _ratio(counts @ losses.sum(axis=1), counts @ has_label.sum(axis=1))


@metric(multilabel=_multilabel_loss, higher_is_better=False, compared=False)
@Counted
def loss(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean cross-entropy; of several labels mean binary cross-entropy over the known labels."""
    labels = predictions.labels.astype(np.int64)
    logs = log_softmax(predictions.logits, axis=1)
    losses = -np.take_along_axis(logs, labels[:, None], axis=1)[:, 0]
    weights = predictions.weights[labels]
    return _ratio(counts @ (weights * losses), counts @ weights)


def _accuracy(logits: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return _ratio(counts @ ((logits > 0) == positive), counts.sum(axis=1))


@metric(multilabel=over_labels(_accuracy))
@Counted
def accuracy(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Share of right predictions; of several labels the mean of each label's."""
    right = predictions.predicted == predictions.labels
    return _ratio(counts @ right, counts.sum(axis=1))


def _f1(logits: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    predicted = logits > 0
    return _ratio(2 * (counts @ (predicted & positive)), counts @ predicted + counts @ positive)


@metric(title="macro F1", multilabel=over_labels(_f1))
@Counted
def macro_f1(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean F1 over the classes that occur among labels or predictions, scikit-learn's default.

    A class that is only predicted, or never hit, counts as 0. Of several labels it is the mean
    over those that are positive or predicted positive somewhere.
    """
    hits, labelled, predicted = _tallies(predictions, counts)
    return _mean(_ratio(2 * hits, labelled + predicted).T)


def _balanced_accuracy(logits: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    predicted, negative = logits > 0, ~positive
    of_positives = _ratio(counts @ (predicted & positive), counts @ positive)
    of_negatives = _ratio(counts @ (~predicted & negative), counts @ negative)
    return np.asarray((of_positives + of_negatives) / 2)


@metric(title="balanced accuracy", multilabel=over_labels(_balanced_accuracy))
@Counted
def balanced_accuracy(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean recall over the classes that occur among the labels.

    Of several labels it is the mean over those that have positives and negatives.
    """
    hits, labelled, _ = _tallies(predictions, counts)
    return _mean(_ratio(hits, labelled).T)


def _auc(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The share of pairs of a positive and a negative that are in order; a tie counts a half."""
    order = np.argsort(scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=-math.inf))  # of those of equal score
    if not len(first):
        return np.full(len(counts), math.nan)
    ordered, is_positive = counts[:, order], positive[order]
    positives = np.add.reduceat(ordered * is_positive, first, axis=1)
    negatives = np.add.reduceat(ordered * ~is_positive, first, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return _ratio(np.sum(positives * below, axis=1), pairs)


@metric(title="macro AUC", multilabel=over_labels(_auc))
@Counted
def macro_auc(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean area under the ROC curve, each class against the rest.

    Over the classes, or labels, that have positives and negatives; for two classes that of class 1.
    """
    return _mean([_auc(*one, counts) for one in _one_against_rest(predictions)])


@metric(title="quadratic weighted kappa", ordinal=True)
@Counted
def kappa(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Cohen's, with quadratic weights and the classes in order, in [-1, 1].

    Undefined where all labels and predictions are of one class: agreement by chance is then
    certain.
    """
    observed = counts @ ((predictions.labels - predictions.predicted) ** 2)
    classes = np.arange(predictions.num_classes)
    _, labelled, predicted = _tallies(predictions, counts)
    distances = np.subtract.outer(classes, classes) ** 2
    by_chance = np.sum((labelled @ distances) * predicted, axis=1) / counts.sum(axis=1)
    return 1.0 - _ratio(observed, by_chance)


def _matthews(logits: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    predicted = logits > 0
    both, of_one = counts @ (predicted & positive), counts @ positive
    of_other, total = counts @ predicted, counts.sum(axis=1)
    spread = of_one * (total - of_one) * of_other * (total - of_other)
    return _ratio(total * both - of_one * of_other, np.sqrt(spread))


@metric(title="Matthews correlation", multilabel=over_labels(_matthews), compared=False)
@Counted
def matthews(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Correlation of labels and predictions, in [-1, 1] (Gorodkin, 2004, for several classes).

    Undefined where all labels or all predictions are of one class. Of several labels per image
    it is the mean over labels.
    """
    hits, labelled, predicted = _tallies(predictions, counts)
    total = counts.sum(axis=1)
    by_chance = np.sum(labelled * predicted, axis=1)
    spread = (total**2 - np.sum(labelled**2, axis=1)) * (total**2 - np.sum(predicted**2, axis=1))
    return _ratio(total * hits.sum(axis=1) - by_chance, np.sqrt(spread))


def _average_precision(scores: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The mean, over positives, of the precision at each one's score, ties being one score."""
    order = np.argsort(-scores, kind="stable")
    first = np.flatnonzero(np.diff(scores[order], prepend=math.inf))  # of those of equal score
    if not len(first):
        return np.full(len(counts), math.nan)
    ordered = counts[:, order]
    positives = np.add.reduceat(ordered * positive[order], first, axis=1)
    together = np.cumsum(np.add.reduceat(ordered, first, axis=1), axis=1)
    precision = np.cumsum(positives, axis=1) / np.maximum(together, 1)
    return _ratio(np.sum(positives * precision, axis=1), positives.sum(axis=1))


@metric(title="macro average precision", multilabel=over_labels(_average_precision), compared=False)
@Counted
def average_precision(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean area under the curve of precision over recall, each class against the rest.

    Without interpolation. Over the classes, or labels, that have positives; for two classes that
    of class 1.
    """
    return _mean([_average_precision(*one, counts) for one in _one_against_rest(predictions)])


def _sensitivity(logits: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return _ratio(counts @ ((logits > 0) & positive), counts @ positive)


def _specificity(logits: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return _sensitivity(-logits, ~positive, counts)


@metric(multilabel=over_labels(_sensitivity), compared=False)
@Counted
def sensitivity(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Share of the positives that are predicted: for two classes that of class 1.

    Of more classes, or labels, the mean over those that occur.
    """
    hits, labelled, _ = _tallies(predictions, counts)
    return _mean(_ratio(hits, labelled).T[scored_classes(predictions)])


@metric(multilabel=over_labels(_specificity), compared=False)
@Counted
def specificity(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Share of the negatives that are not predicted: for two classes those of class 0.

    Of more classes, each against the rest, or labels, the mean over those with negatives.
    """
    hits, labelled, predicted = _tallies(predictions, counts)
    negatives = counts.sum(axis=1)[:, None] - labelled
    return _mean(_ratio(negatives - (predicted - hits), negatives).T[scored_classes(predictions)])


def _brier(logits: np.ndarray, positive: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return _ratio(counts @ (expit(logits) - positive) ** 2, counts.sum(axis=1))


@metric(title="Brier score", multilabel=over_labels(_brier), higher_is_better=False, compared=False)
@Counted
def brier(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Mean over images of Σ_c (p_c − y_c)², in [0, 2] (Brier, 1950).

    For two classes twice the square of one class's error alone. Of several labels per image the
    mean of (p − y)², in [0, 1], over labels.
    """
    errors = (
        softmax(predictions.logits, axis=1) - np.eye(predictions.num_classes)[predictions.labels]
    )
    return _ratio(counts @ np.sum(errors**2, axis=1), counts.sum(axis=1))


CALIBRATION_BINS = 15
"""Of equal width."""


def _calibration_error(
    probabilities: np.ndarray, right: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Σ over bins of the share of images in it times |mean probability − share that is right|."""
    bins = calibration_bins(probabilities)
    gaps = counts @ (bins * (probabilities - right)[:, None])
    return _ratio(np.abs(gaps).sum(axis=1), counts.sum(axis=1))


def calibration_bins(probabilities: np.ndarray) -> np.ndarray:
    """(n, `CALIBRATION_BINS`) of 0 and 1: the bin, open below, in which each probability is."""
    numbers = np.ceil(probabilities * CALIBRATION_BINS).astype(int) - 1
    return np.asarray(np.eye(CALIBRATION_BINS)[np.clip(numbers, 0, CALIBRATION_BINS - 1)])


@metric(
    title="calibration error",
    multilabel=over_labels(
        lambda logits, positive, counts: _calibration_error(expit(logits), positive, counts)
    ),
    higher_is_better=False,
    compared=False,
)
@Counted
def calibration_error(predictions: Predictions, counts: np.ndarray) -> np.ndarray:
    """Expected calibration error of the predicted class's probability (Guo et al., 2017).

    Over 15 bins of equal width; of several labels per image the mean over labels, of the label's
    own probability.
    """
    confidence = softmax(predictions.logits, axis=1).max(axis=1)
    return _calibration_error(confidence, predictions.predicted == predictions.labels, counts)


def scored_classes(predictions: Predictions) -> list[int]:
    """The classes of which each is compared with the rest: of two class 1, of more all."""
    return [1] if predictions.num_classes == 2 else list(range(predictions.num_classes))


def _one_against_rest(predictions: Predictions) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each scored class: log-odds of the images, and whether they are of it."""
    for label in scored_classes(predictions):
        yield log_odds(predictions.logits, label), predictions.labels == label


def _tallies(predictions: Predictions, counts: np.ndarray) -> tuple[np.ndarray, ...]:
    """Of each class (resamples, classes): right predictions, labels, and predictions."""
    classes = np.eye(predictions.num_classes)
    labels, predicted = classes[predictions.labels], classes[predictions.predicted]
    return counts @ (labels * predicted), counts @ labels, counts @ predicted


def log_odds(logits: np.ndarray, label: int) -> np.ndarray:
    """log(p / (1 - p)) of a class: ranks as its probability, but confident ones never tie."""
    others = logsumexp(np.delete(logits, label, axis=1), axis=1)
    return np.asarray(logits[:, label] - others)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN where there is nothing."""
    return np.asarray(part / whole)


def _mean(values: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Of (parts, resamples), over the parts that are defined; NaN where none is."""
    parts = np.asarray(values)
    defined = ~np.isnan(parts)
    return _ratio(np.sum(parts, axis=0, where=defined), np.sum(defined, axis=0))
