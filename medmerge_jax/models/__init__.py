"""Model definitions and their registry."""

from medmerge_jax.models.layers import LinearHead
from medmerge_jax.models.norm import BatchNorm
from medmerge_jax.models.registry import ModelSpec, create_model, get_spec, list_models

__all__ = ["BatchNorm", "LinearHead", "ModelSpec", "create_model", "get_spec", "list_models"]
