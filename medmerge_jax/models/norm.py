"""Batch normalization with PyTorch's conventions."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmerge_jax.merging.trees import at_least_float32

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


# The derivatives are written by hand. JAX would derive a term for how the variance changes with the
# mean, which is zero, and compute it all the same. In reverse mode, what is written here sums over
# the batch twice and passes over x once, like the backward pass of Ioffe & Szegedy's paper.


def resolve(train: bool, use_running_average: bool | None) -> bool:
    """What batch norms do in a mode, unless a caller says: training uses the batch's statistics."""
    return not train if use_running_average is None else use_running_average


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
    of_batch = statistics(x)
    x, dx = at_least_float32(x), at_least_float32(dx)
    axes = tuple(range(x.ndim - 1))
    return of_batch, Statistics(jnp.mean(dx, axes), 2 * jnp.mean((x - of_batch.mean) * dx, axes))


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
    def __call__(
        self, x: jax.Array, use_running_average: bool, of_batch: Statistics | None = None
    ) -> jax.Array:
        """Normalises the last axis of (..., c) with running statistics or those of the batch.

        Args:
          x: The input.
          use_running_average: Which; the running ones stay as they are then.
          of_batch: `statistics(x)`, where the caller has it.
        """
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)

        x = at_least_float32(x)
        if use_running_average:
            mean, var = running_mean.value, running_var.value
        else:
            mean, var = statistics(x) if of_batch is None else of_batch
        y = affine(x, mean, var, scale, bias)
        updates = self.is_mutable_collection("batch_stats") and not self.is_initializing()
        if updates and not use_running_average:
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
        {**variables, "batch_stats": zeros},
        inputs,
        use_running_average=False,
        mutable=["batch_stats"],
    )
    # One step of the running average, from zero.
    return jax.tree.map(lambda new: new / (1 - MOMENTUM), updated["batch_stats"])
