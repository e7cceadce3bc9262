"""Figures, tables and the report of a run; matplotlib and jinja2 are imported on first use."""

from medmerge_jax.analysis.figures import (
    coefficient_heatmap,
    confusion_matrix_figure,
    learning_curves,
    save_coefficients,
)
from medmerge_jax.analysis.report import write_report
from medmerge_jax.analysis.tables import comparison_table, results_text

__all__ = [
    "coefficient_heatmap",
    "comparison_table",
    "confusion_matrix_figure",
    "learning_curves",
    "results_text",
    "save_coefficients",
    "write_report",
]
