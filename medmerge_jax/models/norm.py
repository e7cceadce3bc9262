"""Batch normalization with PyTorch's conventions."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from medmerge_jax.models.layers import at_least_float32

EPSILON = 1e-5
MOMENTUM = 0.9


class BatchNorm(nn.Module):
    """y = scale · (x - mean) / √(var + ε) + bias per channel (Ioffe & Szegedy 2015).

    As PyTorch's `BatchNorm2d` with its defaults, unlike Flax's: the running variance takes in the
    unbiased variance of the batch, n/(n - 1) of what normalises it. Statistics and the
    arithmetic are float32 even if the input is bfloat16. The batch variance is computed in two
    passes: E[x²] - E[x]² loses the small variances.

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
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = jnp.mean(x, axes)
            var = jnp.mean(jnp.square(x - mean), axes)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                count = x.size // x.shape[-1]
                unbiased = var * (count / max(count - 1, 1))
                running_mean.value = MOMENTUM * running_mean.value + (1 - MOMENTUM) * mean
                running_var.value = MOMENTUM * running_var.value + (1 - MOMENTUM) * unbiased
        else:
            mean, var = running_mean.value, running_var.value
        # Subtracting first, not folding the mean into the bias: no cancellation when |mean| ≫ std.
        return ((x - mean) * (scale * jax.lax.rsqrt(var + EPSILON)) + bias).astype(self.dtype)


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
