import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.special
import sklearn.metrics

from medmerge_jax.evaluation.metrics import (
    METRICS,
    classification_metrics,
    confusion_matrix,
    mean_std,
)
from medmerge_jax.evaluation.predictions import Predictions


def multiclass(logits, labels, **kwargs):
    logits, labels = np.array(logits, np.float32), np.array(labels)
    return classification_metrics(Predictions(logits, labels, **{"ordinal": True, **kwargs}))


def multilabel(logits, labels, **kwargs):
    logits, labels = np.array(logits, np.float32), np.array(labels, np.float32)
    return classification_metrics(Predictions(logits, labels, multilabel=True, **kwargs))


def one_hot_logits(predictions, classes):
    return 3.0 * np.eye(classes)[predictions]


def area(positive, scores):
    """Share of (positive, negative) pairs that are in order; a tie counts one half."""
    above, below = np.array(scores)[positive], np.array(scores)[~np.array(positive)]
    difference = above[:, None] - below[None, :]
    return np.mean((difference > 0) + 0.5 * (difference == 0))


def test_of_equal_logits_the_first_class_is_predicted():
    """As PyTorch's and NumPy's argmax have it."""
    logits = np.array([[1, 1, 0], [0, 2, 2], [3, 3, 3], [5, 0, 5]], np.float32)
    assert multiclass(logits, [0, 1, 0, 0])["accuracy"] == 1
    matrix = confusion_matrix(Predictions(logits, np.array([0, 1, 0, 0])))
    np.testing.assert_array_equal(matrix, np.diag([3, 1, 0]))


# Labels 0, 0, 0, 1, 1, 2 against predictions 0, 0, 1, 1, 2, 2.
LABELS, PREDICTIONS = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2]


def test_three_classes_by_hand():
    metrics = multiclass(one_hot_logits(PREDICTIONS, 3), LABELS)
    assert metrics["accuracy"] == pytest.approx(4 / 6)
    # F1 = 2 hits / (labels + predictions) of each class.
    assert metrics["macro_f1"] == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    assert metrics["balanced_accuracy"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    # Squared distances: two of 1 observed; by chance Σ labels_i · predictions_j (i - j)² / 6.
    chance = (3 * 2 * 1 + 3 * 2 * 4 + 2 * 2 * 1 + 2 * 2 * 1 + 1 * 2 * 4 + 1 * 2 * 1) / 6
    assert metrics["kappa"] == pytest.approx(1 - 2 / chance)
    right = math.log(1 + 2 * math.exp(-3))
    assert metrics["loss"] == pytest.approx((4 * right + 2 * (right + 3)) / 6, rel=1e-6)
    assert metrics["num_examples"] == 6
    assert tuple(metrics) == (*METRICS, "num_examples")
    assert all(type(value) in (float, int) for value in metrics.values())


def test_confusion_matrix_by_hand():
    matrix = confusion_matrix(Predictions(one_hot_logits(PREDICTIONS, 4), np.array(LABELS)))
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_macro_auc_against_counting_pairs():
    random = np.random.default_rng(0)
    logits, labels = random.normal(size=(40, 3)), random.integers(0, 3, 40)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = [area(labels == c, probabilities[:, c]) for c in range(3)]
    assert multiclass(logits, labels)["macro_auc"] == pytest.approx(np.mean(expected))


def test_auc_of_two_classes_is_that_of_class_one():
    logits = [[0.0, 1.0], [0.0, -1.0], [0.0, 2.0], [0.0, 0.5]]
    assert multiclass(logits, [1, 0, 0, 0])["macro_auc"] == pytest.approx(2 / 3)


def test_a_pair_of_equal_scores_counts_a_half():
    """The first positive ties with both negatives, the second is above both."""
    logits = [[0.0, 1.0], [0.0, 2.0], [0.0, 1.0], [0.0, 1.0]]
    assert multiclass(logits, [1, 1, 0, 0])["macro_auc"] == (0.5 + 0.5 + 1 + 1) / 4
    scores = [[one] for _, one in logits]
    assert multilabel(scores, [[1], [1], [0], [0]])["macro_auc"] == (0.5 + 0.5 + 1 + 1) / 4


def test_confident_logits_do_not_tie():
    # In float64 the sigmoid of both is 1.
    logits = [[0.0, 80.0], [0.0, 90.0]]
    assert multiclass(logits, [0, 1])["macro_auc"] == 1.0


def test_auc_leaves_out_classes_without_positives():
    logits = np.random.default_rng(1).normal(size=(20, 4))
    labels = np.arange(20) % 3
    odds = np.log(1 / (1 / (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)) - 1))
    expected = [area(labels == c, odds[:, c]) for c in range(3)]
    assert multiclass(logits, labels)["macro_auc"] == pytest.approx(np.mean(expected))


def test_f1_and_recall_of_classes_that_do_not_occur():
    # Class 2 is predicted only: counts 0 in F1, not in the recalls. Class 3 does not occur at all.
    metrics = multiclass(one_hot_logits([0, 1, 2], 4), [0, 1, 1])
    assert metrics["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert metrics["balanced_accuracy"] == pytest.approx((1 + 1 / 2) / 2)


def test_one_class_alone_leaves_auc_and_kappa_undefined():
    metrics = multiclass(one_hot_logits([1, 1], 3), [1, 1])
    assert metrics["macro_auc"] is None
    assert metrics["kappa"] is None
    assert metrics["accuracy"] == metrics["macro_f1"] == metrics["balanced_accuracy"] == 1.0


def test_kappa_of_constant_predictions_is_zero():
    assert multiclass(one_hot_logits([0, 0, 0], 3), [0, 1, 2])["kappa"] == pytest.approx(0.0)


def test_class_weights_weigh_the_loss_alone():
    logits, labels = [[1.0, 0.0], [1.0, 0.0]], [0, 1]
    plain = multiclass(logits, labels)
    weighted = multiclass(logits, labels, class_weights=np.array([1.0, 3.0]))
    low, high = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert plain["loss"] == pytest.approx((low + high) / 2)
    assert weighted["loss"] == pytest.approx((low + 3 * high) / 4)
    assert {**weighted, "loss": plain["loss"]} == plain


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.data())
def test_ranges_and_order_of_examples(data):
    n, classes = data.draw(st.integers(1, 12)), data.draw(st.integers(2, 5))
    elements = st.floats(-50, 50, width=32)
    logits = data.draw(hnp.arrays(np.float32, (n, classes), elements=elements))
    labels = data.draw(hnp.arrays(np.int32, (n,), elements=st.integers(0, classes - 1)))
    metrics = multiclass(logits, labels)
    order = data.draw(st.permutations(range(n)))
    assert multiclass(logits[order], labels[order]) == pytest.approx(metrics, nan_ok=False)
    assert metrics["loss"] >= 0
    for name in ("accuracy", "macro_f1", "balanced_accuracy", "macro_auc"):
        assert metrics[name] is None or 0 <= metrics[name] <= 1
    assert metrics["kappa"] is None or -1 <= metrics["kappa"] <= 1


NAN = float("nan")


def test_several_labels_by_hand():
    logits = [[2.0, -1.0, 1.0], [-2.0, 1.0, 1.0], [1.0, -3.0, 1.0], [-1.0, 0.5, 1.0]]
    labels = [[1, 0, NAN], [0, 1, NAN], [0, NAN, 1], [1, 1, 1]]
    metrics = multilabel(logits, labels)
    # Label 0: scores 2, -2, 1, -1 of 1, 0, 0, 1. Label 1: -1, 1, 0.5 of 0, 1, 1. Label 2: all 1.
    assert metrics["accuracy"] == pytest.approx((2 / 4 + 1 + 1) / 3)
    assert metrics["macro_f1"] == pytest.approx((2 / 4 + 1 + 1) / 3)
    assert metrics["balanced_accuracy"] == pytest.approx((1 / 2 + 1) / 2)
    assert metrics["macro_auc"] == pytest.approx((3 / 4 + 1) / 2)
    assert metrics["kappa"] is None
    margins = [2.0, 2.0, -1.0, -1.0, 1.0, 1.0, 0.5, 1.0, 1.0]
    assert metrics["loss"] == pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in margins]))
    assert metrics["num_examples"] == 4


def test_class_weights_of_several_labels_weigh_the_positives():
    low, high = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    weighted = multilabel([[1.0], [1.0]], [[1], [0]], class_weights=np.array([5.0]))
    assert weighted["loss"] == pytest.approx((5 * low + high) / 2)


def test_labels_that_are_unknown_or_never_positive():
    logits = [[1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]
    metrics = multilabel(logits, [[1, NAN, 0], [0, NAN, 0]])
    # Label 1 is never known; label 2 never positive nor predicted so: it has an accuracy only.
    assert metrics["accuracy"] == metrics["macro_f1"] == metrics["macro_auc"] == 1.0
    unknown = multilabel(logits, np.full((2, 3), NAN))
    assert {unknown[name] for name in METRICS} == {None}


@pytest.mark.parametrize("several", [False, True])
def test_logits_that_are_not_finite(several):
    logits = np.array([[0.0, np.nan], [np.inf, -np.inf]])
    labels = np.zeros((2, 2)) if several else np.zeros(2, int)
    with pytest.raises(FloatingPointError, match="3 of 4 logits are not finite"):
        classification_metrics(Predictions(logits, labels, several))


def test_shapes_and_labels_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3\) and labels of shape \(3,\)"):
        multiclass(np.zeros((2, 3)), [0, 1, 2])
    with pytest.raises(ValueError, match=r"\(2, 3\) and labels of shape \(2, 2\)"):
        multilabel(np.zeros((2, 3)), np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        multiclass(np.zeros((0, 3)), [])
    with pytest.raises(ValueError, match=r"labels are in \[-1, 3\], of 3 classes"):
        multiclass(np.zeros((2, 3)), [-1, 3])


def test_direction_of_metrics():
    lower = [name for name in METRICS if not METRICS[name].higher_is_better]
    assert lower == ["loss", "brier", "calibration_error"]
    with pytest.raises(ValueError, match=r"no metric 'f1'; one of loss, accuracy"):
        METRICS["f1"]


def test_mean_and_sample_standard_deviation():
    assert mean_std([1.0, 2.0, 6.0]) == {
        "mean": 3.0,
        "std": pytest.approx(math.sqrt(7.0)),
        "values": [1.0, 2.0, 6.0],
    }
    assert mean_std([0.5]) == {"mean": 0.5, "std": None, "values": [0.5]}


def scikit_learns(logits, labels):
    """All metrics of several classes but the loss, None where scikit-learn has no value."""
    predicted, probabilities = logits.argmax(axis=1), scipy.special.softmax(logits, axis=1)
    classes = np.arange(logits.shape[1])
    both = [c for c in classes if 0 < np.sum(labels == c) < len(labels)]
    areas = [sklearn.metrics.roc_auc_score(labels == c, probabilities[:, c]) for c in both]
    recalls = {"labels": np.unique(labels), "average": "macro", "zero_division": 0}
    return {
        "accuracy": sklearn.metrics.accuracy_score(labels, predicted),
        "macro_f1": sklearn.metrics.f1_score(labels, predicted, average="macro", zero_division=0),
        "balanced_accuracy": sklearn.metrics.recall_score(labels, predicted, **recalls),
        "macro_auc": np.mean(areas) if areas else None,
        "kappa": sklearn.metrics.cohen_kappa_score(
            labels, predicted, labels=classes, weights="quadratic"
        ),
    }


@pytest.mark.filterwarnings("ignore:y_pred contains classes")
def test_resamples_are_those_of_scikit_learn_on_repeated_images(rng):
    logits = np.round(rng.normal(size=(30, 4)), 1)  # some scores tie
    labels = rng.integers(0, 4, 30)
    predictions = Predictions(logits, labels, ordinal=True)
    counts = rng.multinomial(30, np.full(30, 1 / 30), size=8)
    counts[0] *= labels == 2
    values = {name: METRICS[name].resampled(predictions, counts) for name in METRICS}
    for index, row in enumerate(counts):
        rows = np.repeat(np.arange(30), row)
        for name, wanted in scikit_learns(logits[rows], labels[rows]).items():
            wanted = np.nan if wanted is None else wanted
            assert values[name][index] == pytest.approx(wanted, nan_ok=True), name
        alone = METRICS["loss"](predictions.take(rows))
        assert values["loss"][index] == pytest.approx(alone)
    assert np.isnan(values["macro_auc"]).tolist() == [True] + [False] * 7


def test_resamples_of_several_labels_are_those_of_repeated_images(rng):
    labels = rng.choice([0, 1, np.nan], (20, 3), p=[0.5, 0.3, 0.2])
    predictions = Predictions(rng.normal(size=(20, 3)), labels, multilabel=True)
    counts = rng.multinomial(20, np.full(20, 1 / 20), size=4)
    for name in METRICS:
        repeated = [METRICS[name](predictions.take(np.repeat(np.arange(20), r))) for r in counts]
        wanted = [np.nan if one is None else one for one in repeated]
        found = METRICS[name].resampled(predictions, counts)
        assert found == pytest.approx(np.array(wanted), nan_ok=True), name
