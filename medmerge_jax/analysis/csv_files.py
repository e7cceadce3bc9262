"""Tables of numbers for spreadsheets."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medmerge_jax.evaluation.prediction_file import inert
from medmerge_jax.runtime.inert import visible
from medmerge_jax.storage.atomic import write_text


def write_csv(path: Path, head: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file; atomic. What is not a number is empty, and no text is a formula.

    Args:
      path: Of the file.
      head: Names of the columns.
      rows: Texts, whole numbers and floats, which are written with eight digits.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([_cell(name) for name in head])
    writer.writerows([_cell(value) for value in row] for row in rows)
    write_text(path, text.getvalue())


def _cell(value: Any) -> str:
    if isinstance(value, float):  # as numpy's are
        return f"{value:.8g}" if math.isfinite(value) else ""
    return inert(visible(str(value)))
