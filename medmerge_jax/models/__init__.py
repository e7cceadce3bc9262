"""Model definitions and their registry."""

from medmerge_jax.models.layers import LinearHead
from medmerge_jax.models.norm import BatchNorm
from medmerge_jax.models.preprocessing import Preprocessing
from medmerge_jax.models.registry import ModelSpec, create_model, get_spec, list_models, register

# Each family's file registers its architectures; this is their order in lists.
from medmerge_jax.models import resnet  # isort: skip
from medmerge_jax.models import densenet  # isort: skip

__all__ = [
    "BatchNorm",
    "LinearHead",
    "ModelSpec",
    "Preprocessing",
    "create_model",
    "densenet",
    "get_spec",
    "list_models",
    "register",
    "resnet",
]
