import dataclasses

import numpy as np
import pytest

from medmerge_jax.analysis import comparison_table, results_text
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import METRICS, classification_metrics, metric
from medmerge_jax.evaluation.predictions import Predictions, number_groups
from medmerge_jax.storage.npz import read_npz
from medmerge_jax.studies import checks

LOGITS = np.array([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 1.0, 3.0]], np.float32)
LABELS = np.array([0, 2, 2], np.int32)


@pytest.mark.parametrize("multilabel", [False, True])
def test_they_are_read_as_they_were_written(tmp_path, multilabel):
    labels = np.array([[1, 0, np.nan]] * 3, np.float32) if multilabel else LABELS
    groups = None if multilabel else number_groups(["ann", "bob", "ann"])
    written = Predictions(
        LOGITS,
        labels,
        multilabel,
        ("x", "y", "eye"),
        ("a", "b", "c"),
        not multilabel,
        groups=groups,
    )
    written.save(tmp_path / "predictions.npz")
    arrays = read_npz(tmp_path / "predictions.npz")
    assert (tuple(arrays["ids"]), tuple(arrays["classes"])) == (written.ids, written.classes)
    for name in ("logits", "labels"):
        array = getattr(written, name)
        np.testing.assert_array_equal(arrays[name], array)
        assert arrays[name].dtype == array.dtype
    found = Predictions.load(tmp_path / "predictions.npz")
    for field in dataclasses.fields(Predictions):
        np.testing.assert_equal(getattr(found, field.name), getattr(written, field.name))


def test_some_images_are_taken_with_all_that_is_known_of_them():
    groups = number_groups(["ann", "bob", "cem"])
    whole = Predictions(LOGITS, LABELS, ids=("x", "y", "eye"), groups=groups)
    found = whole.take(np.array([2, 0, 2]))
    np.testing.assert_array_equal(found.logits, LOGITS[[2, 0, 2]])
    assert (found.labels.tolist(), found.ids) == ([2, 0, 2], ("eye", "x", "eye"))
    assert found.groups.tolist() == [2, 0, 2]


def test_a_file_of_another_kind_is_no_predictions(tmp_path):
    np.savez(tmp_path / "x.npz", logits=LOGITS)
    with pytest.raises(UserError, match=r"x\.npz: holds no predictions of this program .'labels'"):
        Predictions.load(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", logits=LOGITS, labels=LABELS, ids=["a"] * 2, classes=["a"])
    with pytest.raises(UserError, match="2 ids of 3 images"):
        Predictions.load(tmp_path / "x.npz")


def test_kappa_is_only_of_classes_in_order():
    metrics = [
        classification_metrics(Predictions(LOGITS, LABELS, ordinal=o)) for o in (True, False)
    ]
    assert metrics[0]["kappa"] == pytest.approx(1 - 1 / 5)
    assert metrics[1] == {**metrics[0], "kappa": None}


@pytest.fixture
def mistakes():
    """A metric that a user's file registers; less of it is better."""

    @metric(title="mistakes", higher_is_better=False)
    def mistakes(predictions):
        return np.sum(predictions.predicted != predictions.labels)

    yield
    METRICS._entries.pop("mistakes")


def test_a_metric_of_ones_own_is_everywhere(mistakes):
    found = classification_metrics(Predictions(LOGITS, LABELS))
    assert (found["mistakes"], list(found)[-2:]) == (1.0, ["mistakes", "num_examples"])
    several = classification_metrics(Predictions(LOGITS, np.ones((3, 3)), multilabel=True))
    assert several["mistakes"] is None
    assert "mistakes" in checks.CHOICES["metric"]()
    assert "| mistakes" in results_text({"test": found})
    rows = [
        {"recipe": name, "start": "b", "mistakes": {"mean": mean, "std": 0.0}}
        for name, mean in (("ft", 3.0), ("lp", 2.0))
    ]
    lines = comparison_table(rows).splitlines()
    assert lines[0].endswith("mistakes |")
    assert lines[2].endswith(" 3.000 ± 0.000 |")
    assert lines[3].endswith(" 2.000 ± 0.000 |")
