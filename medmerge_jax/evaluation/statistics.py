"""What a paper says of a model beside its metrics: by class, calibrated, at thresholds, by patient.

After "Metrics Reloaded" (Maier-Hein et al., 2024) and the checklist CLAIM (2024). Whatever is
chosen, a temperature or a threshold, is chosen on validation images and told of test images.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, logit, softmax

from medmerge_jax.evaluation.bootstrap import metric_interval
from medmerge_jax.evaluation.metrics import METRICS, exact, log_odds, scored_classes
from medmerge_jax.evaluation.predictions import Predictions, class_names

SPECIFICITY = 0.95
"""At which the sensitivity is told."""

_TEMPERATURES = (1e-2, 1e2)
"""Between which one is looked for."""


class Task(NamedTuple):
    """One class against the rest, or one label.

    Attributes:
      name: Of the class.
      scores: (m,) log-odds of the images whose label is known.
      positive: Bool (m,), whether they are of it.
    """

    name: str
    scores: np.ndarray
    positive: np.ndarray


def tasks(predictions: Predictions, *, every_class: bool = True) -> Iterator[Task]:
    """A task for each class; without `every_class`, of two classes for class 1 alone."""
    predictions = exact(predictions)
    names = class_names(predictions.classes, predictions.num_classes)
    if predictions.multilabel:
        for name, scores, labels in zip(
            names, predictions.logits.T, predictions.labels.T, strict=True
        ):
            known = ~np.isnan(labels)
            yield Task(name, scores[known], labels[known] == 1)
        return
    all_classes = range(predictions.num_classes)
    for label in all_classes if every_class else scored_classes(predictions):
        scores = log_odds(predictions.logits, label)
        yield Task(names[label], scores, predictions.labels == label)


def statistics(validation: Predictions, test: Predictions) -> dict[str, Any]:
    """All that is here, for results.json; None where something is undefined.

    Args:
      validation: Predictions of a model for the images on which something is chosen.
      test: Of the same model for those of which it is told.

    Returns:
      "intervals": of each compared metric `{"low", "high", "resamples", "undefined"}`, see
      `bootstrap.metric_interval`, "resampled": "images" or "groups"; "per_class", see `per_class`;
      "thresholds", see `at_thresholds`; "calibration": "temperature" and, before and after it,
      loss, Brier score and calibration error of the test images; "by_group": metrics of the mean
      probabilities of each group, where groups of several images are known.
    """
    validation, test = exact(validation), exact(test)
    compared = {name: entry for name, entry in METRICS.items() if entry.compared}
    found = {name: metric_interval(entry, test) for name, entry in compared.items()}
    heat = temperature(validation)
    together = by_group(test)
    return {
        "resampled": "images" if test.groups is None else "groups",
        "intervals": {
            name: one and {k: v for k, v in dataclasses.asdict(one).items() if k != "value"}
            for name, one in found.items()
        },
        "per_class": per_class(test),
        "thresholds": at_thresholds(validation, test),
        "calibration": {
            "temperature": heat,
            "before": _calibration(test),
            "after": None if heat is None else _calibration(cooled(test, heat)),
        },
        "by_group": None
        if together is None
        else {
            **{name: entry(together) for name, entry in METRICS.items()},
            "num_examples": len(together),
        },
    }


def per_class(predictions: Predictions) -> list[dict[str, Any]]:
    """Of each class, or label: positives, precision, recall, specificity, F1 and areas.

    Predicted is the class of the largest logit, or a label whose probability is above 0.5.

    Returns:
      A dict for each class: "class", "positives", "precision", "recall", "specificity", "f1",
      "auc", "average_precision"; None where a value is 0 / 0.
    """
    rows = []
    predicted = predictions.predicted if not predictions.multilabel else None
    for index, task in enumerate(tasks(predictions)):
        one = Predictions(task.scores[:, None], task.positive[:, None].astype(float), True)
        chosen = task.scores > 0 if predicted is None else predicted == index
        hits, found, positives = (
            int(np.sum(x)) for x in (chosen & task.positive, chosen, task.positive)
        )
        negatives = len(chosen) - positives
        rows.append(
            {
                "class": task.name,
                "positives": positives,
                "precision": _share(hits, found),
                "recall": _share(hits, positives),
                "specificity": _share(negatives - (found - hits), negatives),
                "f1": _share(2 * hits, found + positives),
                "auc": METRICS["macro_auc"](one),
                "average_precision": METRICS["average_precision"](one),
            }
        )
    return rows


def at_thresholds(validation: Predictions, test: Predictions) -> list[dict[str, Any]]:
    """Sensitivity and specificity of the test images at thresholds of the validation images.

    An image counts as positive where the class's probability is at least the threshold. "youden"
    is that with the largest sensitivity + specificity (Youden, 1950), "specificity_95" the lowest
    at which 95 % of the negatives are below it.

    Returns:
      For each class of more than two, each label, or class 1 of two: "class", and for each of the
      two rules `{"threshold", "sensitivity", "specificity"}`, None where it has no positives or no
      negatives, of the validation images, or, for a single value, of the test images.
    """
    rows = []
    pairs = zip(tasks(validation, every_class=False), tasks(test, every_class=False), strict=True)
    for chosen_on, told_of in pairs:
        row: dict[str, Any] = {"class": told_of.name}
        curve = roc(chosen_on)
        rules = ("youden", "specificity_95")
        if curve is None:
            row |= dict.fromkeys(rules)
        else:
            enough = np.flatnonzero(1 - curve.false_positives >= SPECIFICITY)
            best = int(np.argmax(curve.true_positives - curve.false_positives))
            for rule, place in zip(rules, (best, int(enough[-1])), strict=True):
                positive = told_of.scores >= curve.thresholds[place]
                hits = int(np.sum(positive & told_of.positive))
                misses = int(np.sum(~positive & ~told_of.positive))
                row[rule] = {
                    "threshold": float(expit(curve.thresholds[place])),
                    "sensitivity": _share(hits, int(told_of.positive.sum())),
                    "specificity": _share(misses, int(np.sum(~told_of.positive))),
                }
        rows.append(row)
    return rows


class Curve(NamedTuple):
    """At each threshold, the highest first; the first is above all scores.

    Attributes:
      thresholds: (k,) of log-odds.
      true_positives: (k,) share of the positives at or above it: sensitivity, recall.
      false_positives: (k,) share of the negatives: 1 - specificity.
      precision: (k,) share of positives among what is at or above it; 1 where that is nothing.
    """

    thresholds: np.ndarray
    true_positives: np.ndarray
    false_positives: np.ndarray
    precision: np.ndarray


def roc(task: Task) -> Curve | None:
    """The receiver operating characteristic; None without positives or without negatives."""
    if not 0 < task.positive.sum() < len(task.positive):
        return None
    thresholds = np.concatenate([[np.inf], np.unique(task.scores)[::-1]])
    above = np.sort(task.scores[task.positive]), np.sort(task.scores[~task.positive])
    hits, wrong = (len(x) - np.searchsorted(x, thresholds, side="left") for x in above)
    precision = np.where(hits + wrong, hits / np.maximum(hits + wrong, 1), 1.0)
    return Curve(thresholds, hits / len(above[0]), wrong / len(above[1]), precision)


def temperature(predictions: Predictions) -> float | None:
    """What logits are divided by for the lowest cross-entropy (Guo et al., 2017).

    Without class weights. None where the loss has no minimum between 0.01 and 100, as where every
    image is predicted rightly, or no label is known.
    """
    predictions = dataclasses.replace(exact(predictions), class_weights=None)
    low, high = np.log(_TEMPERATURES)

    def loss(log_temperature: float) -> float:
        value = METRICS["loss"](cooled(predictions, float(np.exp(log_temperature))))
        return np.inf if value is None else value

    if METRICS["accuracy"](predictions) == 1:  # The colder the better.
        return None
    found = minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
    inside = low + 1e-3 < found.x < high - 1e-3
    return float(np.exp(found.x)) if inside and np.isfinite(found.fun) else None


def cooled(predictions: Predictions, heat: float) -> Predictions:
    """With logits divided by a temperature: other probabilities, the same predictions."""
    return dataclasses.replace(predictions, logits=np.asarray(predictions.logits) / heat)


def by_group(predictions: Predictions) -> Predictions | None:
    """The mean probabilities of each group, such as a patient, as predictions.

    None where groups are not known, each has one image only, or images of one group have other
    labels than each other.
    """
    groups = predictions.groups
    if groups is None or len(np.unique(groups)) == len(groups):
        return None
    predictions = exact(predictions)
    numbers, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    labels = predictions.labels[first]
    if not np.array_equal(labels[inverse], predictions.labels, equal_nan=predictions.multilabel):
        return None
    kind = expit if predictions.multilabel else softmax
    options = {} if predictions.multilabel else {"axis": 1}
    probabilities = kind(predictions.logits, **options)
    sums = np.zeros((len(numbers), predictions.num_classes))
    np.add.at(sums, inverse, probabilities)
    means = np.clip(sums / np.bincount(inverse)[:, None], 1e-300, 1 - 1e-16)
    return dataclasses.replace(
        predictions,
        logits=logit(means) if predictions.multilabel else np.log(means),
        labels=labels,
        ids=(),
        groups=None,
    )


def _calibration(predictions: Predictions) -> dict[str, float | None]:
    return {name: METRICS[name](predictions) for name in ("loss", "brier", "calibration_error")}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
