"""Figures of what was measured between models, with the models marked."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medmerge_jax.analysis.drawing import FONT, PAGE, colour, new_figure, save_figure
from medmerge_jax.analysis.surfaces import RECALIBRATED, Plane, Segment
from medmerge_jax.runtime.inert import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LEVELS = 25
_SHOWN = 0.7
"""The share of a plane's points whose losses the colours tell apart; higher ones look alike, or the
slopes far away would leave none for the basins."""


def segment_figure(found: Segment, names: Sequence[str], path: Path) -> None:
    """Draws a panel for each number, over the share of the second model.

    A split has a colour; recalibrated models are dashed. Of losses the straight line between the
    ends is dotted, above which a barrier rises.

    Args:
      found: What was measured.
      names: Of the two models.
      path: The PNG file.
    """
    names = list(map(visible, names))
    numbers = list(dict.fromkeys(map(_kind, found.values)))
    figure, *panels = new_figure(PAGE, 0.5 + 2.0 * len(numbers), len(numbers))
    splits = list(dict.fromkeys(map(_split, found.values)))
    for axes, number in zip(panels, numbers, strict=True):
        for name, values in found.values.items():
            if _kind(name) != number:
                continue
            dashed = "--" if name.startswith(RECALIBRATED) else "-"
            shade = colour(splits.index(_split(name)))
            axes.plot(
                found.shares, values, dashed, color=shade, marker=".", markersize=4,
                label=_title(name, number),
            )  # fmt: skip
            if number == "loss":
                axes.plot([0, 1], values[[0, -1]], ":", color=shade, linewidth=0.8)
        axes.set_ylabel(number.replace("_", " "))
        axes.legend(fontsize=FONT, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        axes.grid(alpha=0.3)
        for end in (0, 1):
            axes.axvline(end, color="black", linewidth=0.8)
        labels = [names[0], "¼", "½", "¾", names[1]]
        axes.set_xticks(np.linspace(0, 1, 5), labels, parse_math=False)
    axes.set_xlabel(f"share of {names[1]}; distance {found.distance:.4g}", parse_math=False)
    save_figure(figure, path)


def plane_figure(found: Plane, names: Sequence[str], path: Path) -> None:
    """Draws a map for each number, with the three models marked and their values.

    Args:
      found: What was measured.
      names: Of the three models.
      path: The PNG file.
    """
    columns = min(2, len(found.values))
    rows = -(-len(found.values) // columns)
    width = PAGE / 2
    height = 0.6 + 0.75 * width * float(np.ptp(found.y) / np.ptp(found.x))  # lengths are equal
    figure, *panels = new_figure(width * columns, height * rows, len(found.values), columns)
    for axes, (name, values) in zip(panels, found.values.items(), strict=True):
        _draw_map(axes, found, name, values)
        _mark_models(axes, found, list(map(visible, names)), found.at_models[name])
        axes.set_title(_title(name, _kind(name), whole=True), fontsize=FONT)
        axes.set_aspect("equal")
    save_figure(figure, path)


def _mark_models(axes: "Axes", found: Plane, names: Sequence[str], values: np.ndarray) -> None:
    """Names below left, below right and above, so that of near models they stand apart."""
    sides = (((-4, -6), "right", "top"), ((4, -6), "left", "top"), ((0, 7), "center", "bottom"))
    for name, value, corner, (away, across, along) in zip(
        names, values, found.corners, sides, strict=True
    ):
        axes.plot(*corner, "o", color="white", markeredgecolor="black", markersize=6)
        axes.annotate(
            f"{name} {value:.3g}", tuple(corner), away, textcoords="offset points", fontsize=FONT,
            ha=across, va=along, parse_math=False,
            bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 1},
        )  # fmt: skip


def _draw_map(axes: "Axes", found: Plane, name: str, values: np.ndarray) -> None:
    """Filled contours; NaN stays grey."""
    axes.set_facecolor("lightgrey")
    finite = values[np.isfinite(values)]
    if not finite.size:
        return
    at_models = found.at_models[name][np.isfinite(found.at_models[name])]
    low, high = min(finite.min(), *at_models), max(finite.max(), *at_models)
    beyond = "neither"
    if _kind(name) == "loss":
        shown = max(np.quantile(finite, _SHOWN), *at_models)
        beyond, high = ("max", shown) if shown < high else (beyond, high)
    levels = np.linspace(low, max(high, low + 1e-9), _LEVELS)
    masked = np.ma.masked_invalid(values)
    filled = axes.contourf(found.x, found.y, masked, levels, cmap="viridis", extend=beyond)
    axes.contour(found.x, found.y, masked, levels[::3], colors="black", linewidths=0.3)
    bar = axes.figure.colorbar(filled, ax=axes, fraction=0.046, pad=0.02, format="%.3g")
    bar.ax.tick_params(labelsize=FONT)


def _split(name: str) -> str:
    """The split of a number's name, "recalibrated_test_loss"."""
    return name.removeprefix(RECALIBRATED).partition("_")[0]


def _kind(name: str) -> str:
    """What the number is, without its split."""
    return name.removeprefix(RECALIBRATED).partition("_")[2]


def _title(name: str, number: str, whole: bool = False) -> str:
    text = f"{_split(name)} {number.replace('_', ' ')}" if whole else _split(name)
    return f"{text}, recalibrated" if name.startswith(RECALIBRATED) else text
