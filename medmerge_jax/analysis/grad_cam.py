"""Grad-CAM: which places of an image speak for a class (Selvaraju et al., 2017, arXiv 1610.02391).

A layer's feature maps A_k are summed by the mean of the class's gradient over each map,

    map = ReLU(Σ_k α_k A_k),   α_k = mean over places of ∂ logit / ∂ A_k

"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.models.feature_maps import FeatureMap
from medmerge_jax.models.network import Network

PREDICTED = -1
"""In place of a class: the one of the largest logit."""


class GradCam(NamedTuple):
    """Of n images.

    Attributes:
      maps: float32 (n, h, w) from 0, of the layer's size; in logits, so that images compare.
      classes: int (n,) those whose logits they explain.
      logits: float32 (n, classes).
    """

    maps: np.ndarray
    classes: np.ndarray
    logits: np.ndarray


def grad_cam(
    network: Network,
    variables: Mapping[str, Any],
    layer: FeatureMap,
    pixels: np.ndarray,
    classes: np.ndarray | int = PREDICTED,
) -> GradCam:
    """The maps of images.

    Args:
      network: With a head.
      variables: `{"params": ..., "batch_stats": ...}`; running statistics are used.
      layer: What the module returns, before any ReLU that follows it.
      pixels: uint8 or normalised float (n, size, size, 3).
      classes: Index of the class of each image, or of all; `PREDICTED` for what the model says.
    """
    wanted = np.broadcast_to(np.asarray(classes, np.int32), len(pixels))
    found = jax.device_get(gradients(network, layer, variables, pixels, wanted))
    gradient, maps, chosen, logits = found
    weights = gradient.mean(axis=(1, 2), keepdims=True)
    return GradCam(np.maximum((weights * maps).sum(axis=-1), 0), chosen, logits)


@functools.partial(jax.jit, static_argnums=(0, 1))
def gradients(
    network: Network,
    layer: FeatureMap,
    variables: Mapping[str, Any],
    pixels: jax.Array,
    classes: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """∂ logit / ∂ A and A, (n, h, w, channels) both; the classes (n,); logits (n, classes)."""
    images = network.normalise(pixels)

    def logit(change: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        maps = []

        def add(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            result = call(*args, **kwargs)
            if context.method_name != "__call__" or "/".join(context.module.path) != layer.module:
                return result
            maps.append(result)
            return result + change.astype(result.dtype)

        with nn.intercept_methods(add):
            logits: Any = network.model.apply(variables, images, train=False)
        chosen = jnp.where(classes == PREDICTED, jnp.argmax(logits, axis=1), classes)
        of_class = jnp.take_along_axis(logits, chosen[:, None], axis=1)
        return jnp.sum(of_class), (maps[0], chosen, logits)

    nothing = jnp.zeros((len(pixels), *layer.shape), images.dtype)
    gradient, (maps, chosen, logits) = jax.grad(logit, has_aux=True)(nothing)
    return gradient, maps, chosen, logits
