"""Statistics of registered models on images: batch norms' running ones, and REPAIR's."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax import merging
from medmerge_jax.merging.trees import flatten, network_order, unflatten
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.norm import batch_statistics, statistics
from medmerge_jax.models.taps import outputs_of
from medmerge_jax.runtime.progress import say

Tree = Mapping[str, Any]
Variables = dict[Any, Any]


def recalibrated(
    architecture: str, variables: Tree, batches: Iterable[np.ndarray], dtype: Any = jnp.float32
) -> Variables:
    """Variables with statistics of the batches, see `merging.recalibrate`.

    Args:
      architecture: One of `list_models()`.
      variables: With a head or without.
      batches: float32 (n, h, w, 3), normalised.
      dtype: In which the model computes.

    Returns:
      The variables as they are where there are no batch norms, as in transformers: that is said.
    """
    if not flatten(variables.get("batch_stats", {})):
        say(f"{architecture} has no batch norms, so that there are no statistics to recalibrate")
        return dict(variables)
    model = create_model(architecture, num_classes=0, dtype=dtype)
    return merging.recalibrate(functools.partial(batch_statistics, model), variables, batches)


def repaired(
    architecture: str,
    variables: Tree,
    parents: Sequence[Tree],
    images: np.ndarray,
    weights: Sequence[float] | None = None,
    *,
    batch_size: int = 32,
) -> Variables:
    """A model whose linear layers' outputs vary as its parents' do, see `merging.repair`.

    It takes a pass over the images for each layer and each parent.

    Args:
      architecture: One of `list_models()`; its kernels have biases and no batch norms.
      variables: Of the merged model, with a head or without.
      parents: Whose hidden units correspond to the merged model's; with heads or without.
      images: float32 (num_images, h, w, 3), normalised.
      weights: Of the parents in the merge; they sum to 1. By default all equal.
      batch_size: Of images.
    """
    spec, flat = get_spec(architecture), flatten(variables["params"])
    kernels = [p for p, x in flat.items() if spec.role(p, x) == "kernel" and p.endswith("/kernel")]
    layers = tuple(p.removesuffix("/kernel") for p in sorted(kernels, key=network_order))
    model = create_model(architecture, num_classes=0)

    def measure(params: Tree) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        backbone = {"params": {name: x for name, x in params.items() if name != "head"}}
        counts = [len(batch) for batch in even_batches(images, batch_size)]
        batches = [
            jax.device_get(_layer_moments(model, layers, backbone, batch))
            for batch in even_batches(images, batch_size)
        ]
        return {layer: _joined([one[layer] for one in batches], counts) for layer in layers}

    params = merging.repair(
        measure, variables["params"], [parent["params"] for parent in parents], weights
    )
    return {**variables, "params": params}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer_moments(
    model: nn.Module, layers: tuple[str, ...], variables: Tree, images: Any
) -> dict[str, Any]:
    """Mean and variance of each layer's outputs, over images and positions."""
    outputs = outputs_of(model, layers, variables, images)
    return {layer: tuple(statistics(outputs[layer])) for layer in layers}


def _joined(parts: Sequence[Any], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all images, of those of batches."""
    means, variances = (np.asarray([one[i] for one in parts], np.float64) for i in (0, 1))
    mean = np.average(means, axis=0, weights=counts)
    return mean, np.average(variances + np.square(means - mean), axis=0, weights=counts)


def with_statistics(
    architecture: str, variables: Tree, images: Any, *, batch_size: int = 32
) -> Variables:
    """A model whose batch norms' running statistics are estimated on images.

    Args:
      architecture: One of `list_models()`.
      variables: `{"params": ..., "batch_stats": ...}`; what the latter has is forgotten.
      images: float (num_images, h, w, 3), normalised as `model.apply` wants them.
      batch_size: Of images.

    Raises:
      ValueError: Images that are missing or of another shape.
    """
    shapes = get_spec(architecture).shapes()["batch_stats"]
    empty = unflatten({path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in shapes.items()})
    batches = even_batches(checked_images(images), batch_size)
    return recalibrated(architecture, {**variables, "batch_stats": empty}, batches)


def lacks_statistics(architecture: str, variables: Tree) -> bool:
    """Whether the batch norms of a model have no running statistics at all."""
    return not variables.get("batch_stats") and "batch_stats" in get_spec(architecture).shapes()


def estimated_note(count: int, data: str) -> str:
    """What is said of a model that `with_statistics` has completed."""
    return (
        "its batch norms had no running statistics; they were estimated on "
        f"{count} images of {data}"
    )


def even_batches(images: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """In order, in batches of nearly one size: a last one of few would vary less."""
    yield from np.array_split(images, -(-len(images) // batch_size))


def checked_images(images: Any) -> np.ndarray:
    """As float32; a ValueError if they are no normalised images (n, h, w, 3)."""
    array = np.asarray(images)
    if array.ndim != 4 or array.shape[-1] != 3 or not len(array):
        raise ValueError(f"images of shape {array.shape}; (n, h, w, 3) with n ≥ 1 is wanted")
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(
            f"images of dtype {array.dtype}; floating-point ones are wanted, normalised as the "
            "parents were trained"
        )
    if not np.isfinite(array).all():
        raise ValueError("the images hold NaN or infinity")
    return array.astype(np.float32, copy=False)
