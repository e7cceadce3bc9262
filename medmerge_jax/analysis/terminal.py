"""Results for a terminal, whose lines are short: tables that fit, and no word of them broken."""

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from medmerge_jax.analysis.tables import (
    Cells,
    comparison_cells,
    comparison_title,
    differences_cells,
    differences_title,
    evaluation_cells,
    evaluation_title,
    metric_cells,
)
from medmerge_jax.runtime.inert import visible
from medmerge_jax.runtime.progress import fitted

_BETWEEN = "  "
_LEAST = 40
"""Columns that a terminal is taken to have at least."""


def terminal_text(results: Mapping[str, Any], width: int) -> str:
    """What the program prints of results.json on a terminal: what `results_text` has, narrower.

    Numbers lose spaces, then a decimal, where the table would be too wide; if that does not
    suffice, the columns are shared out among several tables.

    Args:
      results: The content of a results.json.
      width: Of the terminal in columns; names that are longer by themselves go beyond it.
    """
    return "\n\n".join(_section(*one, width) for one in sections(results))


def terminal_evaluation(results: Mapping[str, Any], names: Sequence[str], width: int) -> str:
    """What `evaluate` prints on a terminal: what `evaluation_text` has, narrower."""
    return _section(evaluation_title(results), evaluation_cells(results, names), 1, width)


def _section(title: str, cells: Cells, named: int, width: int) -> str:
    width = max(width, _LEAST)
    return f"{fitted(visible(title), width)}\n\n{narrow_table(cells, named, width)}"


def sections(results: Mapping[str, Any]) -> Iterator[tuple[str, Cells, int]]:
    """Title and cells of each table, and how many of its columns name a row."""
    if "table" not in results:
        names = [str(results[key]) for key in ("recipe", "start", "architecture") if key in results]
        yield f"{', '.join(names)}, seed {results.get('seed')}", metric_cells(results), 1
        return
    yield comparison_title(results), comparison_cells(results["table"]), 2
    if found := results.get("differences"):
        yield differences_title(found), differences_cells(found), 2
    for name, rows in results.get("evaluate_on", {}).items():
        yield f"On {name}", comparison_cells(rows), 2


def narrow_table(cells: Cells, named: int, width: int) -> str:
    """A table without rules at the sides, in lines of at most `width` columns if words allow it.

    Args:
      cells: Column titles, and the cells of each row.
      named: How many columns at the left name a row; they stand in each part of a table.
      width: In columns.
    """
    head = [visible(title) for title in cells[0]]
    rows = [[visible(cell) for cell in row] for row in cells[1]]
    columns = list(zip(head, *rows, strict=True))
    forms: list[list[str]] = [
        _parts([*columns[:named], *([one[0], *map(shorten, one[1:])] for one in columns[named:])],
               named, width)
        for shorten in _SHORTER
    ]  # fmt: skip
    fewest = min(forms, key=len)  # of equals the mildest
    return "\n\n".join(fewest)


def _tight(cell: str) -> str:
    """Without spaces.

    >>> _tight("0.569 ± 0.033")
    '0.569±0.033'
    """
    return cell.replace(" ± ", "±")


def _two_decimals(cell: str) -> str:
    """With one decimal less.

    >>> _two_decimals("0.569 ± 0.033")
    '0.57±0.03'
    """
    mean, _, deviation = cell.partition(" ± ")
    return f"{float(mean):.2f}±{float(deviation):.2f}" if deviation else cell


_SHORTER: tuple[Callable[[str], str], ...] = (lambda cell: cell, _tight, _two_decimals)
"""What becomes of numbers, the mildest first."""


def _parts(columns: Sequence[Sequence[str]], named: int, width: int) -> list[str]:
    """The table, or several of them that each have the columns that name a row."""
    left = [_wrapped(one, _least(one)) for one in columns[:named]]
    room = width - sum(_width(one) + len(_BETWEEN) for one in left)
    tables: list[list[list[list[str]]]] = [[]]
    used = 0
    for column in columns[named:]:
        wrapped = _wrapped(column, max(map(len, column[1:]), default=0))
        takes = _width(wrapped) + (len(_BETWEEN) if tables[-1] else 0)
        if tables[-1] and used + takes > room:
            tables.append([])
            used, takes = 0, _width(wrapped)
        tables[-1].append(wrapped)
        used += takes
    # Where there is room, names that are wrapped need not be.
    spare = room - used if len(tables) == 1 else 0
    for place, column in enumerate(columns[:named]):
        whole = _wrapped(column, max(map(len, column)))
        if (more := _width(whole) - _width(left[place])) <= spare:
            left[place] = whole
            spare -= more
    return [_drawn([*left, *right], named) for right in tables]


def _least(column: Sequence[str]) -> int:
    """The width of the longest word."""
    return max((len(word) for cell in column for word in cell.split()), default=1)


def _width(column: Sequence[Sequence[str]]) -> int:
    return max((len(line) for cell in column for line in cell), default=0)


def _wrapped(column: Sequence[str], width: int) -> list[list[str]]:
    """The lines of each cell; words stay whole, and so does a cell of the width."""
    return [
        textwrap.wrap(
            cell, max(width, _least(column), 1), break_long_words=False, break_on_hyphens=False
        )
        or [""]
        for cell in column
    ]


def _drawn(columns: Sequence[Sequence[Sequence[str]]], named: int) -> str:
    """Lines; titles at the bottom of theirs, and a rule below them."""
    widths = [_width(one) for one in columns]
    lines = []
    for number, row in enumerate(zip(*columns, strict=True)):
        height = max(map(len, row))
        padded = [
            [""] * (height - len(cell)) + list(cell) if number == 0 else [*cell, *[""] * height]
            for cell in row
        ]
        lines += [
            _BETWEEN.join(
                text[line].ljust(width) if place < named else text[line].rjust(width)
                for place, (text, width) in enumerate(zip(padded, widths, strict=True))
            ).rstrip()
            for line in range(height)
        ]
        if number == 0:
            lines.append(_BETWEEN.join("─" * width for width in widths))
    return "\n".join(lines)
