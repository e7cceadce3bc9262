"""Figures, tables and the report of a run; matplotlib and jinja2 are imported on first use."""

from medmerge_jax.analysis.curves import reliability_diagram as reliability_diagram
from medmerge_jax.analysis.curves import threshold_curves as threshold_curves
from medmerge_jax.analysis.figures import coefficient_heatmap as coefficient_heatmap
from medmerge_jax.analysis.figures import comparison_figure as comparison_figure
from medmerge_jax.analysis.figures import confusion_matrix_figure as confusion_matrix_figure
from medmerge_jax.analysis.figures import learning_curves as learning_curves
from medmerge_jax.analysis.figures import save_coefficients as save_coefficients
from medmerge_jax.analysis.report import write_report as write_report
from medmerge_jax.analysis.tables import comparison_table as comparison_table
from medmerge_jax.analysis.tables import evaluation_text as evaluation_text
from medmerge_jax.analysis.tables import results_text as results_text
