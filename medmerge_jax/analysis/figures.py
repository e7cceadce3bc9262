"""Figures of a run. Drawn with matplotlib's `Figure` alone: no pyplot, no display."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmerge_jax.analysis.drawing import (
    COLUMN,
    FONT,
    PAGE,
    colour,
    new_figure,
    save_figure,
)
from medmerge_jax.evaluation.metrics import METRICS, titles
from medmerge_jax.merging.coefficients import parent_weights
from medmerge_jax.merging.trees import network_order
from medmerge_jax.runtime.inert import visible
from medmerge_jax.storage.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Coefficients = Mapping[str, np.ndarray]
"""Coefficients by path of the convolution's kernel."""

_MOST_CLASSES_WITH_NUMBERS = 15


def save_coefficients(path: Path, coefficients: Coefficients) -> None:
    """Writes an .npz with one float32 array per convolution, in network order; atomic.

    Args:
      path: Of the file.
      coefficients: By path, of any granularity's shape.
    """
    ordered: dict[str, Any] = {
        name: np.asarray(coefficients[name], np.float32)
        for name in sorted(coefficients, key=network_order)
    }
    write_atomically(path, lambda file: np.savez(file, **ordered))


def coefficient_heatmap(
    coefficients: Mapping[str, Coefficients],
    path: Path,
    *,
    num_parents: int = 2,
    parent_names: Sequence[str] = (),
    formats: Sequence[str] = (),
) -> None:
    """Draws MedMerge's depth-wise heat map: a cell per convolution, a row per target.

    A cell is the mean coefficient of the layer. The colours diverge from 1/n, where every
    parent has the same weight; for two parents above it is parent b, below it parent c. For more
    parents each target has a row for every parent, the last one's being one minus the others.

    Args:
      coefficients: For each row (target), effective coefficients by path, see
        `merging.effective_coefficients`: any granularity's shape, for n > 2 behind an axis of
        n - 1. Rows may differ in their convolutions.
      path: The PNG file.
      num_parents: n.
      parent_names: n names, in merging order.
      formats: See `drawing.save_figure`.

    Raises:
      ValueError: There are no coefficients, or their shape is not that of n parents.
    """
    rows, paths, means = heatmap(coefficients, num_parents, parent_names)
    figure, axes = new_figure(PAGE, 1.3 + 0.26 * len(rows))
    centre = 1 / num_parents
    reach = max(float(np.nanmax(np.abs(means - centre))), 1e-3)
    ends = {"vmin": centre - reach, "vmax": centre + reach}
    image = axes.imshow(means, cmap="RdBu", **ends, aspect="auto", interpolation="none")
    axes.set_facecolor("lightgrey")  # shows where a row has no such convolution
    axes.set_yticks(range(len(rows)), list(map(visible, rows)), parse_math=False)
    mark_blocks(axes, paths)
    axes.set_xlabel("convolutions, from the input to the output")
    label = visible(f"mean weight of {parent_names[0] if parent_names else 'parent b'}")
    if num_parents > 2:
        label = "mean weight"
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label(label, parse_math=False, fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    save_figure(figure, path, formats)


def heatmap(
    coefficients: Mapping[str, Coefficients], num_parents: int = 2, parent_names: Sequence[str] = ()
) -> tuple[list[str], list[str], np.ndarray]:
    """What `coefficient_heatmap` shows.

    Returns:
      Labels of the rows; paths of the columns in network order; means (rows, columns), NaN where
      a row lacks a convolution.
    """
    paths = sorted({path for row in coefficients.values() for path in row}, key=network_order)
    if not paths:
        raise ValueError("there are no coefficients to draw")
    names = list(parent_names) or [f"parent {i + 1}" for i in range(num_parents)]
    labels: list[str] = []
    rows: list[Sequence[float]] = []
    for target, row in coefficients.items():
        lacking = np.full(num_parents, np.nan)
        means = [
            parent_weights(p, row[p], num_parents).mean(axis=1) if p in row else lacking
            for p in paths
        ]
        if num_parents == 2:
            labels.append(target)
            rows.append([mean[0] for mean in means])
        else:
            labels.extend(f"{target}: {name}" for name in names)
            rows.extend(zip(*means, strict=True))
    return labels, paths, np.array(rows)


def learning_curves(
    records: Sequence[Mapping[str, Any]], path: Path, formats: Sequence[str] = ()
) -> None:
    """Draws loss, validation metrics, learning rate and, if any, coefficients over epochs.

    Of the metrics those that tables compare, and any that are not in `METRICS`. Stages stand one
    after another, with a line between them.

    Args:
      records: Lines of metrics.jsonl: "stage", "epoch" and numbers or None. Without any, nothing
        is written.
      path: The PNG file.
      formats: See `drawing.save_figure`.
    """
    if not records:
        return
    stages = list(dict.fromkeys(record["stage"] for record in records))
    ordered = sorted(records, key=lambda record: stages.index(record["stage"]))
    names = dict.fromkeys(name for record in ordered for name in record)
    left_out = {"val_num_examples", *(f"val_{n}" for n, of in METRICS.items() if not of.compared)}
    scores = [name for name in names if name.startswith("val_")]
    panels: dict[str, list[str]] = {
        "loss": [name for name in ("train_loss", "val_loss") if name in names],
        "validation": [name for name in scores if name not in left_out],
        "learning rate": [name for name in ("learning_rate",) if name in names],
        "coefficients": [name for name in ("coefficient_mean",) if name in names],
    }
    panels = {title: series for title, series in panels.items() if series}
    figure, *all_axes = new_figure(PAGE, 0.5 + 1.5 * max(1, len(panels)), len(panels))
    for axes, (title, series) in zip(all_axes, panels.items(), strict=True):
        axes.set_ylabel(title)
        _draw_series(axes, ordered, series, title)
        _mark_stages(axes, ordered, stages if axes is all_axes[0] else None)
    if panels:
        axes.set_xlabel("epoch, counted over stages")
    save_figure(figure, path, formats)


def comparison_figure(
    rows: Sequence[Mapping[str, Any]], metric: str, path: Path, reference: str = ""
) -> bool:
    """Draws a metric of all rows of a study: a point for each seed, and how certain their mean is.

    A bar is mean ± standard deviation over seeds; of a single run a line is the 95 % bootstrap
    interval over test images, where it is known.

    Args:
      rows: `{"recipe", "start", metric: {"mean", "std", "values"} or None, ...}`, as in
        results.json; of a single run also "low" and "high".
      metric: Name of one of `METRICS`.
      path: The PNG file.
      reference: "RECIPE from START" of the row whose mean is a dotted line; "": there is none.

    Returns:
      False, and nothing is drawn, where the metric is undefined in all rows.
    """
    drawn = [row for row in rows if row.get(metric)]
    if not drawn:
        return False
    figure, axes = new_figure(PAGE, 0.6 + 0.22 * len(drawn))
    for place, row in enumerate(drawn):
        is_reference = f"{row['recipe']} from {row['start']}" == reference
        _draw_row(axes, place, row[metric], colour(int(is_reference)))
        if is_reference:
            axes.axvline(row[metric]["mean"], linestyle=":", color=colour(1), linewidth=1.0)
    labels = [visible(f"{row['recipe']} from {row['start']}") for row in drawn]
    axes.set_yticks(range(len(drawn)), labels, parse_math=False)
    axes.set_ylim(len(drawn) - 0.5, -0.5)
    entry = METRICS.get(metric)
    title = (entry.title if entry else "") or metric.replace("_", " ")
    axes.set_xlabel(f"{title} of the test images", parse_math=False)
    axes.grid(alpha=0.3)
    save_figure(figure, path)
    return True


def _draw_row(axes: "Axes", place: int, found: Mapping[str, Any], shade: str) -> None:
    if found["std"] is not None:
        ends = found["mean"] - found["std"], found["mean"] + found["std"]
        axes.plot(ends, [place] * 2, color=shade, linewidth=5, alpha=0.35, solid_capstyle="butt")
    elif found.get("low") is not None:
        axes.plot([found["low"], found["high"]], [place] * 2, color=shade, linewidth=1)
    axes.plot(found["mean"], place, "|", color=shade, markersize=10, markeredgewidth=1.5)
    axes.plot(found["values"], [place] * len(found["values"]), "o", color=shade, markersize=3.5)


def confusion_matrix_figure(
    matrix: np.ndarray, classes: Sequence[str], path: Path, formats: Sequence[str] = ()
) -> None:
    """Draws counts and shares of each true class, coloured by the share.

    Args:
      matrix: (classes, classes) counts, row the label and column the prediction.
      classes: Their names.
      path: The PNG file.
      formats: See `drawing.save_figure`.
    """
    classes = [visible(name) for name in classes]
    numbers = len(classes) <= _MOST_CLASSES_WITH_NUMBERS
    side = min(14.0, 1.2 + (0.42 if numbers else 0.16) * len(classes))
    width = side + 0.05 * max(map(len, classes)) + 0.7
    figure, axes = new_figure(max(COLUMN, width), max(2.4, width - 0.7))
    share = matrix / np.maximum(np.sum(matrix, axis=1, keepdims=True), 1)
    image = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right", parse_math=False)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    if numbers:
        for (row, column), count in np.ndenumerate(matrix):
            of_label = share[row, column]
            axes.text(
                column, row, f"{count}\n{of_label:.0%}", ha="center", va="center", fontsize=FONT,
                color="white" if of_label > 0.5 else "black",
            )  # fmt: skip
    bar = figure.colorbar(image, ax=axes, fraction=0.046)
    bar.set_label("share of label", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    save_figure(figure, path, formats)


def mark_blocks(
    axes: "Axes", paths: Sequence[str], sideways: bool = False, least: float = 0.0
) -> None:
    """Parts the network's top-level blocks, and names them below columns or beside rows.

    Those that take less than a share of the axis have no name.
    """
    parts = blocks(paths)
    named = [(name, of) for name, of in parts if len(of) >= least * len(paths)]
    middles, names = [(of[0] + of[-1]) / 2 for _, of in named], [name for name, _ in named]
    if sideways:
        axes.set_yticks(middles, names, fontsize=FONT, parse_math=False)
    else:
        axes.set_xticks(middles, names, rotation=40, ha="right", fontsize=FONT, parse_math=False)
    line = axes.axhline if sideways else axes.axvline
    for _, places in parts[1:]:
        line(places[0] - 0.5, color="black", linewidth=0.6)


def blocks(paths: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Name and columns of the network's top-level blocks."""
    parts = [path.split("/") for path in paths]
    depth = 0
    while all(len(p) > depth + 2 for p in parts) and len({p[depth] for p in parts}) == 1:
        depth += 1  # a level that all share, such as DenseNet's "features"
    groups = itertools.groupby(range(len(parts)), key=lambda column: parts[column][depth])
    return [(name, list(columns)) for name, columns in groups]


def _draw_series(
    axes: "Axes", records: Sequence[Mapping[str, Any]], series: Sequence[str], title: str
) -> None:
    epochs = np.arange(1, len(records) + 1)
    # Gaps between stages: a curve must not join two different things that are trained.
    for number, name in enumerate(series):
        values = _column(records, name)
        bare = name.removeprefix("val_")
        label = titles().get(bare, bare) if title == "validation" else name
        for part in _stage_slices(records):
            axes.plot(epochs[part], values[part], color=colour(number), marker=".", markersize=4)
        axes.lines[-1].set_label(label.replace("_", " "))
    if title == "coefficients" and all("coefficient_min" in r for r in records if series[0] in r):
        low, high = _column(records, "coefficient_min"), _column(records, "coefficient_max")
        axes.fill_between(
            epochs, low, high, color=colour(0), alpha=0.2, linewidth=0, label="minimum to maximum"
        )
    if title == "learning rate":
        axes.set_yscale("log" if np.any(_column(records, series[0]) > 0) else "linear")
    else:
        # Beside the panel, where it covers no curve.
        axes.legend(fontsize=FONT, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.grid(alpha=0.3)


def _stage_slices(records: Sequence[Mapping[str, Any]]) -> list[slice]:
    stages = [record["stage"] for record in records]
    starts = [row for row in range(len(stages)) if row == 0 or stages[row] != stages[row - 1]]
    return [slice(*ends) for ends in itertools.pairwise([*starts, len(stages)])]


def _mark_stages(
    axes: "Axes", records: Sequence[Mapping[str, Any]], names: Sequence[str] | None
) -> None:
    """A line before each stage but the first; above the panel the stages' names, if given."""
    axes.set_xlim(0.5, len(records) + 0.5)
    axes.locator_params(axis="x", integer=True)
    for index, part in enumerate(_stage_slices(records)):
        if index:
            axes.axvline(part.start + 0.5, color="grey", linestyle="--", linewidth=0.8)
        if names:
            middle, above = (part.start + part.stop) / 2 + 0.5, axes.get_xaxis_transform()
            text = axes.text(
                middle, 1.02, names[index], transform=above, ha="center", fontsize=FONT
            )
            text.set_parse_math(False)


def _column(records: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """NaN where there is no number."""
    return np.array([record.get(name) for record in records], np.float64)
