"""What needs more than one run, and the function that runs whatever a config asks for."""

from medmerge_jax.studies import slurm  # noqa: F401  # registers its executor
from medmerge_jax.studies.compare import compare
from medmerge_jax.studies.execute import run
from medmerge_jax.studies.fission_fusion import fission_fusion
from medmerge_jax.studies.fold_soup import fold_soup
from medmerge_jax.studies.grid import grid_search
from medmerge_jax.studies.hierarchical_soup import hierarchical_soup

__all__ = ["compare", "fission_fusion", "fold_soup", "grid_search", "hierarchical_soup", "run"]
