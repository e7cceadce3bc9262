"""Metrics that guidelines of medical classification ask for, against scikit-learn or by hand."""

import numpy as np
import pytest
import sklearn.metrics as sk
from helpers.drawn_predictions import drawn, drawn_labels
from scipy.special import expit, logsumexp, softmax

from medmerge_jax.evaluation.metrics import METRICS, calibration_bins
from medmerge_jax.evaluation.predictions import Predictions


def of_labels(predictions, score):
    """The mean over labels of a score of the known ones."""
    values = []
    for logits, labels in zip(predictions.logits.T, predictions.labels.T, strict=True):
        known = ~np.isnan(labels)
        values.append(score(labels[known], logits[known]))
    return np.mean(values)


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("ties", [False, True])
def test_of_one_class_per_image(classes, ties):
    said = drawn(classes, ties=ties)
    labels, predicted = said.labels, said.predicted
    probabilities = softmax(said.logits, axis=1)
    assert METRICS["matthews"](said) == pytest.approx(sk.matthews_corrcoef(labels, predicted))
    of_each = sk.recall_score(labels, predicted, average=None)
    negative = [np.mean(predicted[labels != c] != c) for c in range(classes)]
    scored = [1] if classes == 2 else range(classes)
    assert METRICS["sensitivity"](said) == pytest.approx(np.mean(of_each[list(scored)]))
    assert METRICS["specificity"](said) == pytest.approx(np.mean([negative[c] for c in scored]))
    precisions = [
        # Odds, not probabilities, which are tied or not by their last bit.
        sk.average_precision_score(labels == c, odds(said.logits, c))
        for c in scored
    ]
    assert METRICS["average_precision"](said) == pytest.approx(np.mean(precisions))
    errors = np.sum((probabilities - np.eye(classes)[labels]) ** 2, axis=1)
    assert METRICS["brier"](said) == pytest.approx(np.mean(errors))
    if classes == 2:
        assert METRICS["brier"](said) == pytest.approx(
            2 * sk.brier_score_loss(labels, probabilities[:, 1])
        )


def odds(logits, label):
    return logits[:, label] - logsumexp(np.delete(logits, label, axis=1), axis=1)


def test_of_several_labels_per_image():
    said = drawn_labels()
    for name, score in {
        "matthews": lambda y, x: sk.matthews_corrcoef(y, x > 0),
        "average_precision": sk.average_precision_score,
        "sensitivity": lambda y, x: sk.recall_score(y, x > 0),
        "specificity": lambda y, x: sk.recall_score(1 - y, x <= 0),
        "brier": lambda y, x: np.mean((expit(x) - y) ** 2),
    }.items():
        assert METRICS[name](said) == pytest.approx(of_labels(said, score)), name


def test_calibration_error_by_hand():
    # Confidences .95, .95, .55, .30 in bins 15, 15, 9 and 5; right, wrong, right, right.
    probabilities = np.array(
        [[0.95, 0.03, 0.01, 0.01], [0.02, 0.95, 0.02, 0.01], [0.55, 0.25, 0.1, 0.1],
         [0.3, 0.25, 0.25, 0.2]]
    )  # fmt: skip
    said = Predictions(np.log(probabilities), np.array([0, 2, 0, 0]))
    assert METRICS["calibration_error"](said) == pytest.approx(
        2 / 4 * abs(0.95 - 1 / 2) + 1 / 4 * abs(0.55 - 1) + 1 / 4 * abs(0.30 - 1)
    )
    perfect = Predictions(np.array([[0.0, 0.0], [0.0, 0.0]]), np.array([0, 1]))
    assert METRICS["calibration_error"](perfect) == pytest.approx(0)


def test_a_bin_is_open_below_and_holds_its_upper_end():
    bins = calibration_bins(np.array([0.0, 1e-9, 1 / 15, 1 / 15 + 1e-9, 1.0])).argmax(axis=1)
    assert bins.tolist() == [0, 0, 0, 1, 14]


def test_calibration_of_several_labels_is_of_each_labels_own_probability():
    sure = Predictions(np.array([[9.0, -9.0], [9.0, -9.0]]), np.array([[1.0, 0.0], [1.0, 1.0]]),
                       multilabel=True)  # fmt: skip
    assert METRICS["calibration_error"](sure) == pytest.approx((0 + 0.5) / 2, abs=1e-3)


@pytest.mark.parametrize("name", ["matthews", "average_precision", "sensitivity", "specificity"])
def test_what_is_undefined_is_said_to_be_so(name):
    """One class alone, as labels; Matthews also where one class alone is predicted."""
    without = Predictions(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([0, 0]))
    everything = Predictions(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([1, 1]))
    values = {METRICS[name](without), METRICS[name](everything)}
    assert None in values
    if name == "matthews":
        same = Predictions(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]))
        assert values == {None} and METRICS[name](same) is None


def test_they_are_in_results_but_not_in_the_tables_of_comparisons():
    new = ("matthews", "average_precision", "sensitivity", "specificity", "brier")
    assert not any(METRICS[name].compared for name in (*new, "calibration_error"))
    assert not METRICS["brier"].higher_is_better
