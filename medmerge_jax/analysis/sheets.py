"""Contact sheets: images and maps of them, row by row."""

import dataclasses
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medmerge_jax.analysis.drawing import FONT, PAGE, new_figure, save_figure
from medmerge_jax.runtime.inert import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL = 1.15
"""Inches: so wide are pictures, if all of a row fit."""

_GAP = 0.1
"""Inches above and below a row."""

_LETTERS = 15
"""That stand on an inch."""

_STRONGEST = 0.75
"""Opacity of a heat's greatest value."""


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
    """One picture of a sheet.

    Attributes:
      picture: uint8 (h, w, 3), or numbers (h, w), drawn in colours from `least` to `greatest`.
      title: Above it; of several lines. Long ones are wrapped.
      heat: (h, w) from 0, laid over the picture whatever its size; opaque where it is greatest.
      least: See `picture`.
      greatest: See `picture`.
    """

    picture: np.ndarray
    title: str = ""
    heat: np.ndarray | None = None
    least: float = 0.0
    greatest: float = 1.0


def contact_sheet(
    rows: Sequence[Sequence[Cell]], path: Path, row_names: Sequence[str] = ()
) -> None:
    """Draws a row of pictures for each row of cells; the last may be shorter.

    Args:
      rows: Of cells, at least one.
      path: The PNG file.
      row_names: Beside the rows, if there are any.
    """
    columns = max(map(len, rows))
    beside = 0.4 if row_names else 0.0
    cell = min(_CELL, (PAGE - beside) / columns - 0.05)
    titles = [[_wrapped(one.title, cell) for one in row] for row in rows]
    lines = [max(title.count("\n") + 1 if title else 0 for title in row) for row in titles]
    height = sum(cell + 2 * _GAP + 0.15 * count for count in lines)
    width = columns * (cell + 0.05) + beside
    figure, *panels = new_figure(width, height, len(rows) * columns, columns)
    figure.get_layout_engine().set(h_pad=_GAP)  # so that a title stands by its own picture
    for number, axes in enumerate(panels):
        row, column = divmod(number, columns)
        if column >= len(rows[row]):
            axes.set_axis_off()
            continue
        _draw(axes, rows[row][column], titles[row][column])
        if column == 0 and row_names:
            name = _wrapped(row_names[row], cell)
            axes.set_ylabel(name, fontsize=FONT, parse_math=False)
    save_figure(figure, path)


def _draw(axes: "Axes", cell: Cell, title: str) -> None:
    height, width = cell.picture.shape[:2]
    extent = (0, width, height, 0)
    if cell.picture.ndim == 3:
        axes.imshow(cell.picture, extent=extent)
    else:
        axes.imshow(
            cell.picture, extent=extent, cmap="viridis", vmin=cell.least, vmax=cell.greatest,
            interpolation="nearest",
        )  # fmt: skip
    if cell.heat is not None:
        share = cell.heat / max(float(cell.heat.max()), 1e-12)
        axes.imshow(
            _enlarged(share, height, width), extent=extent, cmap="inferno", vmin=0.0, vmax=1.0,
            alpha=_STRONGEST * _enlarged(share, height, width),
        )  # fmt: skip
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(title, fontsize=FONT, parse_math=False)


def _wrapped(text: str, width: float) -> str:
    """Lines that are no longer than so many inches."""
    letters = int(_LETTERS * width)
    lines = [visible(line) for line in text.split("\n")]
    return "\n".join(part for line in lines for part in textwrap.wrap(line, letters) or [""])


def _enlarged(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinearly, as the method's authors do."""
    from PIL import Image

    image = Image.fromarray(values.astype(np.float32))
    found = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    return np.clip(found, 0.0, 1.0)
