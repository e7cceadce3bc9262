"""Tables for a spreadsheet and for a paper."""

import re
from collections.abc import Sequence

from medmerge_jax.analysis.tables import UNDEFINED, Cells
from medmerge_jax.runtime.inert import latex, visible
from medmerge_jax.storage.csv_cells import csv_line

_NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?(%| (±|to|of|\().*)?")
"""A cell that begins with a number: "0.569 ± 0.033", "3 (75 %)"."""


def numeric(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[bool]:
    """Of each column but the first, whether its cells are numbers, where they are not undefined.

    >>> numeric(["row", "F1", "kappa"], [["ft", "0.569 ± 0.033", "-"], ["lp", "-", "-"]])
    [False, True, True]
    """
    found = [False]  # what the row is about
    for column in range(1, len(head)):
        defined = [row[column] for row in rows if row[column] not in (UNDEFINED, "")]
        found.append(all(_NUMBER.fullmatch(cell) for cell in defined))
    return found


def csv_text(cells: Cells) -> str:
    """Lines of CSV, none of whose cells a spreadsheet computes; what is undefined is empty."""
    head, rows = cells
    lines = [
        ["" if cell == UNDEFINED else visible(cell) for cell in line] for line in (head, *rows)
    ]
    return "".join(map(csv_line, lines))


def latex_text(title: str, cells: Cells) -> str:
    r"""A `tabular` with the rules of the package booktabs, numbers to the right.

    >>> print(latex_text("Results", (["recipe", "F1"], [["lp_ft", "0.569 ± 0.033"]])))
    % Results; wants \usepackage{booktabs}
    \begin{tabular}{lr}
    \toprule
    recipe & F1 \\
    \midrule
    lp\_ft & 0.569 $\pm$ 0.033 \\
    \bottomrule
    \end{tabular}
    <BLANKLINE>
    """
    head, rows = cells
    columns = "".join("r" if one else "l" for one in numeric(head, rows))
    first, *lines = [rf"{' & '.join(map(latex, line))} \\" for line in [head, *rows]]
    return "\n".join(
        [
            rf"% {latex(title)}; wants \usepackage{{booktabs}}",
            rf"\begin{{tabular}}{{{columns}}}",
            *(r"\toprule", first, r"\midrule", *lines, r"\bottomrule"),
            r"\end{tabular}",
            "",
        ]
    )
