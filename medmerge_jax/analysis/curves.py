"""Curves of one model: what its thresholds trade, and whether its confidence is due."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import expit, softmax

from medmerge_jax.analysis.drawing import (
    COLUMN,
    FONT,
    PAGE,
    colour,
    dashes,
    new_figure,
    save_figure,
)
from medmerge_jax.evaluation.metrics import METRICS, calibration_bins
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.evaluation.statistics import cooled, roc, tasks
from medmerge_jax.runtime.inert import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_CURVES = 15
"""Classes whose curves are told apart."""


def threshold_curves(predictions: Predictions, path: Path) -> bool:
    """Draws sensitivity over 1 - specificity, and precision over sensitivity, of each class.

    Each class against the rest, of two class 1; the legends have the areas. Dotted is chance: the
    diagonal, and the share of positives.

    Args:
      predictions: Of the images to be drawn.
      path: The PNG file.

    Returns:
      False, and nothing is drawn, where no class has both positives and negatives.
    """
    found = [(task, roc(task)) for task in tasks(predictions, every_class=False)]
    drawn = [(task, curve) for task, curve in found if curve is not None][:_MOST_CURVES]
    if not drawn:
        return False
    figure, left, right = new_figure(PAGE, 3.1 + 0.16 * len(drawn), 2, 2)
    for number, (task, curve) in enumerate(drawn):
        one = Predictions(task.scores[:, None], task.positive[:, None].astype(float), True)
        auc, precision = METRICS["macro_auc"](one), METRICS["average_precision"](one)
        line = {"color": colour(number), "linestyle": dashes(number)}
        left.step(
            curve.false_positives, curve.true_positives, where="post", **line,
            label=_named(f"{visible(task.name)}  {auc:.3f}"),
        )  # fmt: skip
        right.step(
            curve.true_positives, curve.precision, where="pre", **line,
            label=_named(f"{visible(task.name)}  {precision:.3f}"),
        )  # fmt: skip
        right.axhline(task.positive.mean(), color=colour(number), linestyle=":", linewidth=0.8)
    left.plot([0, 1], [0, 1], ":", color="grey", linewidth=0.8)
    for axes, across, along, title in (
        (left, "1 − specificity", "sensitivity", "area under the curve"),
        (right, "sensitivity (recall)", "precision", "average precision"),
    ):
        axes.set_xlabel(across)
        axes.set_ylabel(along)
        axes.set_xlim(-0.02, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.grid(alpha=0.3)
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16)}
        axes.legend(fontsize=FONT, title=title, title_fontsize=FONT, **place)
    save_figure(figure, path)
    return True


def reliability_diagram(predictions: Predictions, heat: float | None, path: Path) -> None:
    """Draws how often predictions of a confidence are right, before and after a temperature.

    Of several labels per image, all known labels together, by their own probability.

    Args:
      predictions: Of the images to be drawn.
      heat: See `statistics.temperature`; None: there is none.
      path: The PNG file.
    """
    figure, above, below = new_figure(COLUMN, 4.4, 2)
    above.plot([0, 1], [0, 1], ":", color="grey", linewidth=0.8)
    _draw_reliability(above, below, predictions, "as trained", colour(0), -1)
    if heat is not None:
        label = f"temperature {heat:.3g}"
        _draw_reliability(above, below, cooled(predictions, heat), label, colour(1), 1)
    above.set_ylabel("share that is right")
    below.set_ylabel("predictions")
    below.set_xlabel("confidence")
    for axes in (above, below):
        axes.set_xlim(0, 1)
        axes.grid(alpha=0.3)
    above.legend(fontsize=FONT, loc="upper left")
    save_figure(figure, path)


def _draw_reliability(
    above: "Axes", below: "Axes", predictions: Predictions, label: str, shade: str, side: int
) -> None:
    """A point where each bin's mean confidence is, and a bar for how many are in it."""
    if predictions.multilabel:
        known = ~np.isnan(predictions.labels)
        confidence, right = expit(predictions.logits)[known], predictions.labels[known] == 1
    else:
        confidence = softmax(predictions.logits, axis=1).max(axis=1)
        right = predictions.predicted == predictions.labels
    bins = calibration_bins(confidence)
    counts = bins.sum(axis=0)
    there = counts > 0
    means = [(bins * of[:, None]).sum(axis=0)[there] / counts[there] for of in (confidence, right)]
    above.plot(*means, marker="o", markersize=4, color=shade, label=label)
    width = 1 / len(counts)
    middles = (np.arange(len(counts)) + 0.5) * width
    below.bar(middles + side * width / 5, counts, 0.38 * width, color=shade)


def _named(text: str) -> str:
    """Text of a legend in which nothing is read as a formula."""
    return text.replace("$", r"\$").removeprefix("_") or "-"
