"""Reading and writing models with torchvision's names and layouts."""

from medmerge_jax.weights.files import read_tensors, write_safetensors
from medmerge_jax.weights.hub import LocatedWeights, find_imagenet_weights
from medmerge_jax.weights.models import (
    find_architecture,
    load_parent,
    load_weights,
    model_fingerprint,
    save_model,
    save_weights,
)
from medmerge_jax.weights.names import variables_from_torch, variables_to_torch

__all__ = [
    "LocatedWeights",
    "find_architecture",
    "find_imagenet_weights",
    "load_parent",
    "load_weights",
    "model_fingerprint",
    "read_tensors",
    "save_model",
    "save_weights",
    "variables_from_torch",
    "variables_to_torch",
    "write_safetensors",
]
