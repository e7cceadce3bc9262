"""Curves of thresholds and of calibration."""

import numpy as np
import pytest

from medmerge_jax.analysis import curves, reliability_diagram, threshold_curves
from medmerge_jax.evaluation.predictions import Predictions


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written, instead of pixels."""
    written, save = [], curves.save_figure
    monkeypatch.setattr(
        curves, "save_figure", lambda figure, path: written.append(figure) or save(figure, path)
    )
    return written


def test_a_curve_for_each_class_with_its_areas(drawn, tmp_path):
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 60)
    logits = random.normal(size=(60, 3)) + np.eye(3)[labels]
    classes = ("$x^", "_hidden", "ant")
    assert threshold_curves(Predictions(logits, labels, classes=classes), tmp_path / "a.png")
    (figure,) = drawn
    left, right = figure.axes
    assert [text.get_text().split("  ")[0] for text in left.get_legend().get_texts()] == [
        "\\$x^", "hidden", "ant",
    ]  # fmt: skip
    curve = left.lines[2].get_xydata()
    assert curve[0].tolist() == [0, 0] and curve[-1].tolist() == [1, 1]
    assert (np.diff(curve, axis=0) >= 0).all()
    assert len(right.get_legend().get_texts()) == 3
    one_class = Predictions(logits, np.zeros(60, int))
    assert threshold_curves(one_class, tmp_path / "b.png") is False
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize("heat", [None, 2.0])
def test_the_reliability_of_known_confidences(drawn, tmp_path, heat):
    # Of ten predictions with confidence 0.8, six are right.
    logits = np.tile(np.log([[0.8, 0.2]]), (10, 1))
    reliability_diagram(Predictions(logits, np.arange(10) // 6), heat, tmp_path / "r.png")
    (figure,) = drawn
    above, below = figure.axes
    points = [line.get_xydata().tolist() for line in above.lines[1:]]
    assert points[0] == [pytest.approx([0.8, 0.6])]
    assert len(points) == (1 if heat is None else 2)
    assert sum(bar.get_height() for bar in below.patches) == 10 * len(points)
    if heat is not None:  # √0.8 / (√0.8 + √0.2) = 2/3
        assert points[1] == [pytest.approx([2 / 3, 0.6])]
