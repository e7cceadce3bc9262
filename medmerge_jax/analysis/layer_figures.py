"""Figures over the layers of networks, from the input to the output."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medmerge_jax.analysis.coefficients import Depth, Trajectory
from medmerge_jax.analysis.drawing import FONT, PAGE, new_figure, save_figure
from medmerge_jax.analysis.figures import blocks, mark_blocks
from medmerge_jax.analysis.rank import RankCorrelation
from medmerge_jax.runtime.inert import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NARROW = 0.03
"""The share of a small panel that a block has to have for a name."""

_MOST_MARKED = 20
"""Epochs of which each has a point."""

_XLABEL = "convolutions, from the input to the output"


def depth_figure(found: Depth, path: Path) -> None:
    """Draws the mean weight by depth, and below it the spread inside of each layer.

    Almakky et al., figures 2 and 4. The colours of the means diverge from 1/n, where all parents
    have the same weight: blue is more, red is less.
    """
    rows = len(found.rows)
    figure, above, below = new_figure(PAGE, 1.1 + 2 * max(0.8, 0.3 * rows), 2)
    centre = 1 / found.num_parents
    reach = max(float(np.nanmax(np.abs(found.mean - centre))), 1e-3)
    names = sorted(set(found.parents))
    weight = f"mean weight\nof {visible(names[0])}" if len(names) == 1 else "mean weight"
    spread = max(float(np.nanmax(found.inside)), 1e-3)
    for axes, values, label, colours, ends in (
        (above, found.mean, weight, "RdBu", (centre - reach, centre + reach)),
        (below, found.inside, "deviation\nover kernels", "viridis", (0.0, spread)),
    ):
        image = axes.imshow(
            values, cmap=colours, vmin=ends[0], vmax=ends[1], aspect="auto", interpolation="none"
        )
        axes.set_facecolor("lightgrey")  # shows where a row has no such convolution
        labels = list(map(visible, found.rows))
        axes.set_yticks(range(rows), labels, fontsize=FONT, parse_math=False)
        mark_blocks(axes, found.layers)
        bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label(label, fontsize=FONT, parse_math=False)
        bar.ax.tick_params(labelsize=FONT)
        bar.ax.locator_params(nbins=4)
    above.tick_params(labelbottom=False)
    below.set_xlabel(_XLABEL, fontsize=FONT)
    save_figure(figure, path)


def trajectory_figure(found: Sequence[Trajectory], path: Path) -> None:
    """Draws weights over epochs: a panel for each block, a row for each run.

    A line is the mean of a layer, its band one standard deviation over the layer's kernels to both
    sides; the later a layer stands in its block, the lighter it is. Dotted is 1/n.

    Args:
      found: Of networks with the same blocks. Of more than two parents each has a row.
      path: The PNG file.
    """
    parts = blocks(found[0].layers)
    rows = [(one, n) for one in found for n in range(_rows_of(one))]
    width = min(PAGE, 1.2 + 1.5 * len(parts))
    figure, *panels = new_figure(width, 0.9 + 1.5 * len(rows), len(rows) * len(parts), len(parts))
    grid = np.array(panels, object).reshape(len(rows), len(parts))
    means, deviations = (np.concatenate([one.values[n].ravel() for one in found]) for n in (0, 1))
    low, high = float((means - deviations).min()), float((means + deviations).max())
    margin = 0.05 * max(high - low, 1e-3)
    for (one, parent), row in zip(rows, grid, strict=True):
        for axes, (name, columns) in zip(row, blocks(one.layers), strict=True):
            _draw_lines(axes, one, parent, columns)
            axes.set_ylim(low - margin, high + margin)
            axes.tick_params(labelsize=FONT, labelleft=axes is row[0])
            axes.locator_params(axis="x", integer=True, nbins=4)
            axes.grid(alpha=0.3)
            if row is grid[0] or axes in grid[0]:
                axes.set_title(name, fontsize=FONT, parse_math=False)
            if axes in grid[-1]:
                axes.set_xlabel("epoch", fontsize=FONT)
        label = f"{visible(one.label)}\nweight of {visible(one.parents[parent])}"
        row[0].set_ylabel(label, fontsize=FONT, parse_math=False)
    save_figure(figure, path)


def _rows_of(one: Trajectory) -> int:
    """Of two parents the second's weights are one minus the first's."""
    return 1 if len(one.parents) == 2 else len(one.parents)


def _draw_lines(axes: "Axes", one: Trajectory, parent: int, columns: Sequence[int]) -> None:
    from matplotlib import colormaps

    axes.axhline(1 / len(one.parents), color="black", linestyle=":", linewidth=0.8)
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(columns)))
    for colour, column in zip(shades, columns, strict=True):
        mean, deviation = (one.values[n][:, column, parent] for n in (0, 1))
        axes.fill_between(
            one.epochs, mean - deviation, mean + deviation, color=colour, alpha=0.12, linewidth=0
        )
        marker = "." if len(one.epochs) <= _MOST_MARKED else ""
        axes.plot(one.epochs, mean, color=colour, linewidth=1.0, marker=marker, markersize=3)


def rank_figure(
    found: RankCorrelation,
    means: np.ndarray,
    scores: np.ndarray,
    names: Sequence[str],
    labels: tuple[str, str],
    path: Path,
) -> None:
    """Draws the correlation of each layer, and beside it the targets that it is over.

    Layers that are told apart from chance, of all layers together, are dark.

    Args:
      found: Of each layer.
      means: (targets,) mean coefficient over all layers.
      scores: (targets,) that the coefficients are correlated with.
      names: Of the targets.
      labels: What the coefficients and the scores are.
      path: The PNG file.
    """
    figure, left, right = new_figure(PAGE, 2.8, 2, 2)
    there = np.flatnonzero(np.isfinite(found.rho))
    dark = found.p_of_any[there] <= 0.05
    colours = np.where(dark, "#08306b", "#9ecae1")
    left.bar(there, found.rho[there], color=list(colours), width=0.9)
    mark_blocks(left, found.layers)
    left.set(xlim=(-0.5, len(found.layers) - 0.5), ylim=(-1.05, 1.05))
    left.axhline(0, color="black", linewidth=0.8)
    left.set_xlabel(_XLABEL, fontsize=FONT)
    left.set_ylabel(f"rank correlation, n = {found.targets}", fontsize=FONT)
    right.plot(scores, means, "o", color="#08306b", markersize=4)
    middle = (scores.min() + scores.max()) / 2
    for name, *place in zip(names, scores, means, strict=True):
        side, away = ("left", 4) if place[0] <= middle else ("right", -4)  # inside of the panel
        right.annotate(
            visible(name), place, (away, 3), textcoords="offset points", fontsize=FONT,
            ha=side, parse_math=False,
        )  # fmt: skip
    right.axvline(0, color="black", linestyle=":", linewidth=0.8)
    right.set_xlabel(visible(labels[1]), fontsize=FONT, parse_math=False)
    right.set_ylabel(visible(labels[0]), fontsize=FONT, parse_math=False)
    right.margins(0.2)
    right.locator_params(axis="x", nbins=5)
    for axes in (left, right):
        axes.tick_params(labelsize=FONT)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def cka_figure(
    matrix: np.ndarray, names: Sequence[str], layers: Sequence[Sequence[str]], path: Path
) -> None:
    """Draws the similarity of the layers of each two models, and of each with itself.

    Args:
      matrix: (all layers, all layers), see `cka.cka`; NaN is grey.
      names: Of the models.
      layers: Of each model, paths in network order.
      path: The PNG file.
    """
    count = len(names)
    side = min(2.3, (PAGE - 1.5) / count)
    figure, *panels = new_figure(1.5 + side * count, 0.5 + side * count, count * count, count)
    ends = np.cumsum([0, *map(len, layers)])
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    image: Any = None
    for number, axes in enumerate(panels):
        row, column = divmod(number, count)
        if column > row:  # the same, transposed
            axes.set_axis_off()
            continue
        image = axes.imshow(
            matrix[parts[row], parts[column]], cmap="viridis", vmin=0.0, vmax=1.0,
            aspect="auto", interpolation="none",
        )  # fmt: skip
        axes.set_facecolor("lightgrey")
        mark_blocks(axes, _as_leaves(layers[column]), least=_NARROW)
        mark_blocks(axes, _as_leaves(layers[row]), sideways=True, least=_NARROW)
        axes.tick_params(labelbottom=row == count - 1, labelleft=column == 0)
        if column == 0:
            axes.set_ylabel(visible(names[row]), fontsize=FONT, parse_math=False)
        if row == count - 1:
            axes.set_xlabel(visible(names[column]), fontsize=FONT, parse_math=False)
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02, shrink=0.8)
    bar.set_label("linear CKA", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT)
    save_figure(figure, path)


def _as_leaves(modules: Sequence[str]) -> list[str]:
    """Paths as those of arrays in the modules, by which blocks are told."""
    return [f"{module}/output" for module in modules]
