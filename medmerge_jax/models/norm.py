"""Batch normalization with PyTorch's conventions."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmerge_jax.models.layers import at_least_float32

EPSILON = 1e-5
MOMENTUM = 0.9


@jax.custom_jvp
def normalise_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scales (x - mean) / √(var + ε) and shifts it, the statistics over all axes but the last.

    Its derivative is written down, because the one that JAX derives keeps apart what cancels: with
    a = scale / √(var + ε), dx in x gives a · (dx - E[dx]) - (x - mean) · a · E[(x - mean) · dx] /
    (var + ε) in y. Transposed, that is two sums and one pass over x, as in Ioffe & Szegedy.

    Args:
      x: float32 or float64 (..., c).
      scale: (c,).
      bias: (c,).

    Returns:
      y like `x`, the mean (c,) and the biased variance (c,).
    """
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    # In two passes: E[x²] - E[x]² loses the small variances.
    var = jnp.mean(jnp.square(x - mean), axes)
    return affine(x, mean, var, scale, bias), mean, var


@normalise_batch.defjvp
def _normalise_batch_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    x, scale, bias = primals
    dx, dscale, dbias = tangents
    y, mean, var = normalise_batch(x, scale, bias)
    axes = tuple(range(x.ndim - 1))
    rsqrt = jax.lax.rsqrt(var + EPSILON)
    dmean = jnp.mean(dx, axes)
    covariance = jnp.mean((x - mean) * dx, axes)
    # Per channel first: the transpose then sums over the batch only twice.
    slope = rsqrt * dscale - scale * rsqrt**3 * covariance
    offset = dbias - scale * rsqrt * dmean
    dy = scale * rsqrt * dx + (x - mean) * slope + offset
    return (y, mean, var), (dy, dmean, 2 * covariance)


def affine(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """With given statistics: y = scale · (x - mean) / √(var + ε) + bias."""
    # Subtracting first, not folding the mean into the bias: no cancellation when |mean| ≫ std.
    return (x - mean) * (scale * jax.lax.rsqrt(var + EPSILON)) + bias


class BatchNorm(nn.Module):
    """y = scale · (x - mean) / √(var + ε) + bias per channel (Ioffe & Szegedy 2015).

    As PyTorch's `BatchNorm2d` with its defaults, unlike Flax's: the running variance takes in the
    unbiased variance of the batch, n/(n - 1) of what normalises it. Statistics and the
    arithmetic are float32 even if the input is bfloat16.

    Parameters are `scale` and `bias`; `batch_stats` has `mean` and `var`, updated when the
    collection is mutable in training mode.

    Attributes:
      dtype: Of the output.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Normalises the last axis of (..., c) with batch (`train`) or running statistics."""
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        x = at_least_float32(x)
        if not train:
            y = affine(x, running_mean.value, running_var.value, scale, bias)
            return y.astype(self.dtype)
        y, mean, var = normalise_batch(x, scale, bias)
        if self.is_mutable_collection("batch_stats") and not self.is_initializing():
            count = x.size // x.shape[-1]
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
            running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * unbiased
        return y.astype(self.dtype)


@functools.partial(jax.jit, static_argnames="model")
def batch_statistics(model: nn.Module, variables: Any, inputs: jax.Array) -> Any:
    """What one batch alone makes of the running statistics: `merging.recalibrate` averages them.

    Args:
      model: Any of the package.
      variables: `{"params": ..., "batch_stats": ...}`; of the statistics, only the shapes matter.
      inputs: (n, ...), normalised.

    Returns:
      A tree like `variables["batch_stats"]`: mean and unbiased variance of every batch norm's input
      in training mode.
    """
    zeros = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    _, updated = model.apply(
        {**variables, "batch_stats": zeros}, inputs, train=True, mutable=["batch_stats"]
    )
    # One step of the running average, from zero.
    return jax.tree.map(lambda new: new / (1 - MOMENTUM), updated["batch_stats"])
