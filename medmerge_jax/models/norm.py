"""Batch normalization with PyTorch's conventions."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmerge_jax.models.layers import at_least_float32

EPSILON = 1e-5
MOMENTUM = 0.9


class Statistics(NamedTuple):
    """Of a batch, per channel.

    Attributes:
      mean: (c,).
      var: Biased variance, (c,).
    """

    mean: jax.Array
    var: jax.Array


# The derivatives are written down, because those that JAX derives keep apart what cancels: the
# variance changes with the mean by nothing. Transposed, those of a batch norm are two sums and one
# pass over x, as in Ioffe & Szegedy.


@jax.custom_jvp
def statistics(x: jax.Array) -> Statistics:
    """Over all axes but the last of (..., c), in float32 even if `x` is bfloat16."""
    x = at_least_float32(x)
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes)
    # In two passes: E[x²] - E[x]² loses the small variances.
    return Statistics(mean, jnp.mean(jnp.square(x - mean), axes))


@statistics.defjvp
def _statistics_jvp(primals: tuple[Any], tangents: tuple[Any]) -> Any:
    ((x,), (dx,)) = primals, tangents
    found = statistics(x)
    x, dx = at_least_float32(x), at_least_float32(dx)
    axes = tuple(range(x.ndim - 1))
    return found, Statistics(jnp.mean(dx, axes), 2 * jnp.mean((x - found.mean) * dx, axes))


@jax.custom_jvp
def affine(
    x: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """With given statistics: y = scale · (x - mean) / √(var + ε) + bias, all but `x` (c,)."""
    # Subtracting first, not folding the mean into the bias: no cancellation when |mean| ≫ std.
    return (x - mean) * (scale * jax.lax.rsqrt(var + EPSILON)) + bias


@affine.defjvp
def _affine_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> Any:
    x, mean, var, scale, _ = primals
    dx, dmean, dvar, dscale, dbias = tangents
    rsqrt = jax.lax.rsqrt(var + EPSILON)
    # Per channel first: the transpose then sums over the batch only twice.
    slope = rsqrt * dscale - 0.5 * scale * rsqrt**3 * dvar
    offset = dbias - scale * rsqrt * dmean
    return affine(*primals), scale * rsqrt * dx + (x - mean) * slope + offset


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
    def __call__(self, x: jax.Array, train: bool, of_batch: Statistics | None = None) -> jax.Array:
        """Normalises the last axis of (..., c) with batch (`train`) or running statistics.

        Args:
          x: The input.
          train: Which.
          of_batch: `statistics(x)`, where the caller has it.
        """
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        x = at_least_float32(x)
        if train:
            mean, var = statistics(x) if of_batch is None else of_batch
        else:
            mean, var = running_mean.value, running_var.value
        y = affine(x, mean, var, scale, bias)
        if train and self.is_mutable_collection("batch_stats") and not self.is_initializing():
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
