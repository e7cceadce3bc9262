"""Centred kernel alignment: how alike two layers represent the same images.

Linear CKA (Kornblith et al., 2019, arXiv 1905.00414) of whole feature maps, by the unbiased
estimate of HSIC over small batches (Nguyen et al., 2021, arXiv 2010.15327). Of each batch only the
images' products with each other leave the device, so that neither the width of a layer nor the
number of images costs memory. The usual estimate is biased towards one where a layer has more
numbers than a batch has images, as almost all have; and averaging maps over their places first,
which would do without batches, is another question.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.models.feature_maps import FeatureMap, feature_maps
from medmerge_jax.models.network import Network
from medmerge_jax.runtime import preemption

LEAST = 4
"""Images of which the estimate is defined."""


class Source(NamedTuple):
    """A model whose layers are compared.

    Attributes:
      network: Without a head.
      variables: Of its backbone.
      layers: Of `list_feature_maps`.
      pixels: uint8 (n, size, size, 3), the same images for all models, each as it wants them.
    """

    network: Network
    variables: Mapping[str, Any]
    layers: Sequence[FeatureMap]
    pixels: np.ndarray


def cka(grams: Iterable[np.ndarray]) -> np.ndarray:
    """Linear CKA between layers.

    Args:
      grams: Of each batch of n ≥ 4 images, (layers, n, n): each image's features times each other
        one's. It does not matter whether features are centred.

    Returns:
      float64 (layers, layers), symmetric, with ones on the diagonal; unrelated layers have about 0,
      which may be below it. NaN where a layer says the same of all images.

    Raises:
      ValueError: A batch has fewer images, or there is none.
    """
    total: np.ndarray | None = None
    for gram in grams:
        centred = _u_centred(np.asarray(gram, np.float64))
        images = centred.shape[-1]
        flat = centred.reshape(len(centred), -1)
        hsic = flat @ flat.T / (images * (images - 3))
        total = hsic if total is None else total + hsic
    if total is None:
        raise ValueError("0 batches; one or more are wanted")
    own = np.diag(total)
    own = np.where(own > 0, own, np.nan)
    return np.asarray(total / np.sqrt(own[:, None] * own))


def _u_centred(gram: np.ndarray) -> np.ndarray:
    """(layers, n, n), of which the products' sums are n (n − 3) times the unbiased HSIC.

    Székely & Rizzo, 2014: without the diagonal, and with sums of zero along every row and column.
    """
    images = gram.shape[-1]
    if images < LEAST:
        raise ValueError(f"{images} images in a batch; {LEAST} or more are wanted")
    outside = ~np.eye(images, dtype=bool)
    gram = gram * outside
    rows = gram.sum(axis=2) / (images - 2)
    whole = rows.sum(axis=1) / (images - 1)
    return (gram - rows[:, :, None] - rows[:, None, :] + whole[:, None, None]) * outside


def grams(sources: Sequence[Source], batch_size: int) -> Iterator[np.ndarray]:
    """What `cka` takes, of all layers of all sources, one after another.

    Args:
      sources: Of the same images in the same order.
      batch_size: Images at a time, at most; batches are as large as one another but for one image.
    """
    count = len(sources[0].pixels)
    parts = math.ceil(count / batch_size)
    size = math.ceil(count / parts)
    for rows in np.array_split(np.arange(count), parts):
        preemption.check()
        # Filled up to one shape, so that one program serves all batches.
        filled = np.concatenate([rows, np.repeat(rows[-1:], size - len(rows))])
        products = [
            _products(
                of.network, tuple(of.layers), of.variables, of.pixels[filled], np.int32(len(rows))
            )
            for of in sources
        ]
        yield np.concatenate(jax.device_get(products))[:, : len(rows), : len(rows)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _products(
    network: Network,
    layers: tuple[FeatureMap, ...],
    variables: Mapping[str, Any],
    pixels: jax.Array,
    valid: jax.Array,
) -> jax.Array:
    """float32 (layers, n, n) of features that are centred over the valid images."""
    there = (jnp.arange(len(pixels)) < valid)[:, None]
    found = []
    for of_layer in feature_maps(network, layers, variables, pixels):
        features = of_layer.reshape(len(pixels), -1).astype(jnp.float32)
        # Or what all images share would leave no digits for what tells them apart.
        mean = jnp.sum(jnp.where(there, features, 0), axis=0) / valid
        centred = jnp.where(there, features - mean, 0)
        found.append(jnp.matmul(centred, centred.T, precision=jax.lax.Precision.HIGHEST))
    return jnp.stack(found)
