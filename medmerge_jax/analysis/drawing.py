"""How figures look and how they are written: 8 pt at the width of a column or a page of a paper."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmerge_jax.storage.atomic import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.5, 7.2
"""Inches: the width of one of two columns, and of both."""

FONT = 8
"""Points, of every text."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Which colour-blind readers tell apart (Okabe & Ito, 2008), without its yellow."""

FORMATS = ("png", "svg", "pdf")
"""Of which the report shows the first."""

_DPI = 200

CSS_PIXELS = 96 * 1.2 / _DPI
"""Of a pixel of the PNG files, where they are shown: a fifth larger than on paper."""

_DASHES = ("-", "--", "-.", ":")

_STYLE: dict[Any, Any] = {
    "font.size": FONT,
    "axes.titlesize": FONT,
    "axes.labelsize": FONT,
    "xtick.labelsize": FONT,
    "ytick.labelsize": FONT,
    "legend.fontsize": FONT,
    "legend.title_fontsize": FONT,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "svg.hashsalt": "medmerge_jax",  # or names inside of the file are drawn by lot
    "svg.fonttype": "path",  # looks the same where the font is missing
    "pdf.fonttype": 42,  # journals refuse Type 3
}

_ANONYMOUS: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}
"""Neither when nor with what it was drawn: equal figures are equal files."""


def colour(number: int) -> str:
    """The n-th colour; they come again, see `dashes`."""
    return COLOURS[number % len(COLOURS)]


def dashes(number: int) -> str:
    """How the n-th line is drawn, so that it differs from those of its colour."""
    return _DASHES[number // len(COLOURS) % len(_DASHES)]


def new_figure(width: float, height: float, panels: int = 1, columns: int = 1) -> list[Any]:
    """A figure, sizes in inches, and its axes: below each other, or row by row in columns.

    matplotlib takes a second to import, so it waits until here.
    """
    from matplotlib.figure import Figure

    with _style():
        figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
        rows = -(-panels // columns)
        return [figure, *(figure.add_subplot(rows, columns, one + 1) for one in range(panels))]


def save_figure(figure: "Figure", path: Path, formats: Sequence[str] = ()) -> None:
    """Writes a figure in each of the formats; atomic. The same figure gives the same bytes.

    Args:
      figure: Of `new_figure`.
      path: The PNG file; the others stand beside it, with another suffix.
      formats: Of `FORMATS`; empty: all, which takes two or three times as long as the first.
    """
    with _style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a box says that the font lacks a letter, too
        figure.draw_without_rendering()  # lays out, which is half of the work, once
        figure.set_layout_engine("none")
        # Not the figure's own box: the layout cuts off titles beside long names of classes.
        box = figure.get_tightbbox().padded(0.05)
        for name in formats or FORMATS:
            options = {"format": name, "bbox_inches": box, "metadata": _ANONYMOUS[name]}
            write_atomically(
                path.with_suffix(f".{name}"),
                lambda file, options=options: figure.savefig(file, dpi=_DPI, **options),  # type: ignore[misc]
            )


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Ours, whatever the user has set; theirs is as it was afterwards."""
    import matplotlib
    from cycler import cycler

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "axes.prop_cycle": cycler(color=COLOURS)})
        yield
