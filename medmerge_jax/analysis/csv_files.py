"""Tables of numbers for spreadsheets."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medmerge_jax.runtime.inert import visible
from medmerge_jax.storage.atomic import write_text
from medmerge_jax.storage.csv_cells import csv_line


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file; atomic. What is not a number is empty, and no text is a formula.

    Args:
      path: Of the file.
      head: Names of the columns.
      rows: Texts, whole numbers and floats, which are written with eight digits.
    """
    lines = [csv_line(map(_cell, line)) for line in (head, *rows)]
    write_text(path, "".join(lines))


def _cell(value: Any) -> str:
    if isinstance(value, float):  # as numpy's are
        return f"{value:.8g}" if math.isfinite(value) else ""
    return visible(str(value))
