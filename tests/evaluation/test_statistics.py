"""What is told of a model beside its metrics, against scikit-learn, brute force or by hand."""

import json

import numpy as np
import pytest
import sklearn.metrics as sk
from helpers.drawn_predictions import drawn, drawn_labels
from scipy.special import softmax

from medmerge_jax.evaluation.metrics import METRICS
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.evaluation.statistics import (
    at_thresholds,
    by_group,
    per_class,
    roc,
    statistics,
    tasks,
    temperature,
)


@pytest.mark.parametrize("classes", [2, 4])
def test_of_each_class(classes):
    said = drawn(classes, classes=tuple("abcd"[:classes]))
    rows = per_class(said)
    wanted = sk.precision_recall_fscore_support(said.labels, said.predicted)
    for names, values in zip(("precision", "recall", "f1", "positives"), wanted, strict=True):
        assert [row[names] for row in rows] == pytest.approx(values)
    assert [row["class"] for row in rows] == list("abcd"[:classes])
    for label, row in enumerate(rows):
        rest = said.predicted[said.labels != label] != label
        assert row["specificity"] == pytest.approx(rest.mean())
    areas = [row["auc"] for row in rows]
    assert np.mean(areas[1:] if classes == 2 else areas) == pytest.approx(
        METRICS["macro_auc"](said)
    )


def test_of_each_label_the_known_images_count():
    said = drawn_labels()
    for index, row in enumerate(per_class(said)):
        known = ~np.isnan(said.labels[:, index])
        labels, predicted = said.labels[known, index], said.logits[known, index] > 0
        assert row["recall"] == pytest.approx(sk.recall_score(labels, predicted))
        assert row["auc"] == pytest.approx(sk.roc_auc_score(labels, said.logits[known, index]))
        assert row["positives"] == labels.sum()


def test_what_is_nothing_of_nothing_is_undefined():
    said = Predictions(np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), np.array([0, 1]))
    never = per_class(said)[2]
    assert never["positives"] == 0
    assert {never[name] for name in ("precision", "recall", "f1", "auc")} == {None}
    assert never["specificity"] == 1.0
    assert roc(list(tasks(said))[2]) is None


@pytest.mark.parametrize("said", [drawn(2), drawn_labels()], ids=["class", "label"])
def test_the_curve_is_scikit_learns(said):
    for task in tasks(said, every_class=False):
        curve = roc(task)
        wrong, right, _ = sk.roc_curve(task.positive, task.scores, drop_intermediate=False)
        np.testing.assert_allclose(curve.true_positives, right)
        np.testing.assert_allclose(curve.false_positives, wrong)
        precision, recall, _ = sk.precision_recall_curve(task.positive, task.scores)
        np.testing.assert_allclose(curve.precision, precision[::-1])
        np.testing.assert_allclose(curve.true_positives, recall[::-1])


def test_thresholds_are_chosen_on_validation_by_brute_force_and_told_of_the_test_images():
    validation, test = drawn(2, seed=1), drawn(2, seed=2)
    (row,) = at_thresholds(validation, test)

    def at(said, threshold):
        positive = softmax(said.logits, axis=1)[:, 1] >= threshold - 1e-9
        return positive[said.labels == 1].mean(), (~positive[said.labels == 0]).mean()

    tried = np.unique(softmax(validation.logits, axis=1)[:, 1])
    best = max(sum(at(validation, t)) for t in tried)
    youden = row["youden"]
    assert sum(at(validation, youden["threshold"])) == pytest.approx(best)
    enough = min(t for t in tried if at(validation, t)[1] >= 0.95)
    assert row["specificity_95"]["threshold"] == pytest.approx(enough)
    for rule in ("youden", "specificity_95"):
        told = row[rule]
        assert (told["sensitivity"], told["specificity"]) == at(test, told["threshold"])


def test_a_threshold_wants_positives_and_negatives_in_validation():
    validation = Predictions(np.eye(2)[[0, 1]], np.array([0, 0]))
    assert at_thresholds(validation, drawn(2)) == [
        {"class": "1", "youden": None, "specificity_95": None}
    ]


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_temperature_undoes_a_factor(multilabel):
    """Labels drawn as the probabilities say: the factor of the logits is the best temperature."""
    random = np.random.default_rng(0)
    logits = random.normal(size=(20_000, 3))
    if multilabel:
        labels = (random.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(float)
    else:
        ladder = softmax(logits, axis=1).cumsum(axis=1)
        labels = (random.random(len(logits))[:, None] > ladder).sum(axis=1)
    heat = temperature(Predictions(3 * logits, labels, multilabel))
    assert heat == pytest.approx(3, rel=0.05)


def test_there_is_no_temperature_for_a_model_that_is_always_right():
    assert temperature(Predictions(np.eye(3), np.arange(3))) is None
    assert temperature(Predictions(np.eye(3), np.array([1, 2, 0]))) is None


def test_the_mean_probabilities_of_a_patients_images():
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.6, 0.4]])
    said = Predictions(np.log(probabilities), np.array([0, 1, 0, 0]), groups=np.array([7, 2, 7, 7]))
    found = by_group(said)
    assert found.labels.tolist() == [1, 0]
    np.testing.assert_allclose(softmax(found.logits, axis=1), [[0.2, 0.8], [0.6, 0.4]])
    assert METRICS["accuracy"](said) == 0.75 and METRICS["accuracy"](found) == 1.0


@pytest.mark.parametrize("groups", [None, [0, 1, 2, 3], [0, 0, 1, 1]])
def test_there_are_no_groups_without_several_images_of_one_label(groups):
    groups = None if groups is None else np.array(groups)
    said = Predictions(np.eye(2)[[0, 1, 0, 1]], np.array([0, 1, 0, 0]), groups=groups)
    assert by_group(said) is None


@pytest.mark.parametrize("said", [drawn(2), drawn(3), drawn_labels()], ids=["2", "3", "labels"])
def test_all_of_it_is_json_and_intervals_hold_their_metric(said):
    told = json.loads(json.dumps(statistics(said, said), allow_nan=False))
    for name, interval in told["intervals"].items():
        value = METRICS[name](said)
        assert (interval is None) == (value is None)
        if interval:
            assert interval["low"] < value < interval["high"]
    assert told["by_group"] is None and told["resampled"] == "images"
    heat, after = told["calibration"]["temperature"], told["calibration"]["after"]
    assert heat > 0 and after["loss"] <= told["calibration"]["before"]["loss"]
