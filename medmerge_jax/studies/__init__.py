"""What needs more than one run, and the function that runs whatever a config asks for."""

from medmerge_jax.studies.execute import run

__all__ = ["run"]
