"""Reading and writing models with torchvision's names and layouts."""

from medmerge_jax.weights.card import shareable
from medmerge_jax.weights.files import read_tensors, write_safetensors
from medmerge_jax.weights.imagenet import find_imagenet_weights
from medmerge_jax.weights.lazy import LazyArray, read_all
from medmerge_jax.weights.models import (
    Model,
    find_architecture,
    load_card,
    load_model,
    load_parent,
    load_weights,
    model_fingerprint,
    model_from_card,
    open_parent,
    save_model,
    save_weights,
)
from medmerge_jax.weights.names import variables_from_torch, variables_to_torch
from medmerge_jax.weights.normalisation import as_published, fold_normalisation
from medmerge_jax.weights.references import is_on_hub, path_of

__all__ = [
    "LazyArray",
    "Model",
    "as_published",
    "find_architecture",
    "find_imagenet_weights",
    "fold_normalisation",
    "is_on_hub",
    "load_card",
    "load_model",
    "load_parent",
    "load_weights",
    "model_fingerprint",
    "model_from_card",
    "open_parent",
    "path_of",
    "read_all",
    "read_tensors",
    "save_model",
    "save_weights",
    "shareable",
    "variables_from_torch",
    "variables_to_torch",
    "write_safetensors",
]
