"""Covariance and correlation of the hidden units of several models, from batches of activations.

Models see the same images; every position of a feature map is a sample. What matching by
activations (Ainsworth et al., arXiv 2209.04836) and ZipIt! (Stoica et al., arXiv 2305.03053) go by.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Moments(NamedTuple):
    """Running central moments of the N = n · size units of n models, observed at T taps.

    Each tap has a mean of its own, and all add to one co-moment Σ (x - mean)(x - mean)ᵀ. Where a
    residual stream is observed after every block, the correlation is so that of units within a
    block, not that of all units' growth from block to block.

    Attributes:
      num_samples: (T,), samples seen at each tap.
      mean: (T, N); unit i of model m is m · size + i.
      comoment: (N, N), the sum over all samples.
      compensation: (N, N), what rounding took off the sum (Kahan), to be added.
    """

    num_samples: jax.Array
    mean: jax.Array
    comoment: jax.Array
    compensation: jax.Array


def init_moments(
    num_models: int, size: int, num_taps: int = 1, dtype: Any = jnp.float32
) -> Moments:
    """Moments of no samples.

    Args:
      num_models: n ≥ 1.
      size: Units of each model.
      num_taps: Places T at which the units are observed.
      dtype: Of the sums; their rounding is compensated, so that float32 is enough.

    Raises:
      ValueError: A number is less than 1.
    """
    for name, value in (("num_models", num_models), ("size", size), ("num_taps", num_taps)):
        if value < 1:
            raise ValueError(f"{name} is {value}; at least 1 is wanted")
    units = num_models * size
    # Not one array of zeros twice: the caller may donate the moments to a jitted update.
    return Moments(
        jnp.zeros((num_taps,), dtype),
        jnp.zeros((num_taps, units), dtype),
        jnp.zeros((units, units), dtype),
        jnp.zeros((units, units), dtype),
    )


def update_moments(
    moments: Moments,
    activations: Sequence[Any],
    *,
    tap: Any = 0,
    valid: Any = None,
) -> Moments:
    """Takes a batch in; pure, `jax.jit` works.

    The batch's own central moments are joined to those before it (Chan et al. 1979), so that the
    small variance of a unit with a large mean is not lost.

    Args:
      moments: From `init_moments` or an earlier call.
      activations: For each model (batch, ..., size), of the same images and one shape.
      tap: Index of the place that they were observed at, 0 to T - 1.
      valid: (batch,), 1 for a real example, 0 for padding. All are real by default.

    Raises:
      ValueError: Shapes that differ between models, or from those of the moments.
    """
    shapes = [np.shape(model) for model in activations]
    units = moments.mean.shape[-1]
    if len(set(shapes)) != 1 or len(shapes[0]) < 2 or len(shapes) * shapes[0][-1] != units:
        raise ValueError(
            f"activations of shapes {', '.join(map(str, shapes)) or '()'} for moments of "
            f"{units} units; (batch, ..., size) of every model is wanted, {units} units in all"
        )
    dtype = moments.comoment.dtype
    samples = jnp.concatenate(
        [jnp.asarray(model).reshape(-1, shapes[0][-1]).astype(dtype) for model in activations], -1
    )
    positions = samples.shape[0] // shapes[0][0]
    weights = jnp.ones(shapes[0][:1], dtype) if valid is None else jnp.asarray(valid).astype(dtype)
    weights = jnp.repeat(weights, positions)[:, None]

    count = jnp.sum(weights)
    divisor = jnp.maximum(count, 1)
    # The second step takes off the rounding of the first: a constant unit has variance zero.
    mean = jnp.sum(weights * samples, 0) / divisor
    mean = mean + jnp.sum(weights * (samples - mean[None]), 0) / divisor
    centred = weights * (samples - mean[None])
    # By default a GPU multiplies with ten bits.
    comoment = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)

    before, before_mean = moments.num_samples[tap], moments.mean[tap]
    total = jnp.maximum(before + count, 1)
    shift = mean - before_mean
    comoment = comoment + (before * (count / total)) * (shift[:, None] * shift[None, :])
    added = comoment + moments.compensation
    new_sum = moments.comoment + added
    return Moments(
        moments.num_samples.at[tap].add(count),
        moments.mean.at[tap].set(before_mean + shift * (count / total)),
        new_sum,
        added - (new_sum - moments.comoment),
    )


def covariance(moments: Moments) -> np.ndarray:
    """Covariance of all units, float64 (N, N): block (a, b) is of model a's with model b's.

    Raises:
      ValueError: No samples, or activations that were infinite or not a number.
    """
    count = float(np.sum(np.asarray(moments.num_samples, np.float64)))
    if count <= 0:
        raise ValueError("no activations were observed; at least one image is wanted")
    comoment = np.asarray(moments.comoment, np.float64) + np.asarray(
        moments.compensation, np.float64
    )
    bad = np.flatnonzero(~np.isfinite(comoment.diagonal()))
    if bad.size:
        raise ValueError(
            f"the activations of {bad.size} of {len(comoment)} units (first: {bad[0]}) are infinite"
            " or not a number; do all models give finite outputs for these images?"
        )
    # A matrix product need not be symmetric to the last bit.
    return (comoment + comoment.T) / (2 * count)


def correlation(moments: Moments, eps: float = 1e-7) -> np.ndarray:
    """Pearson's correlation of all units: covariance over the product of standard deviations.

    The product is taken as `eps` where it is smaller, as in ZipIt!'s code: units that hardly vary
    correlate little, and a dead one, of constant activation, with nothing, not even itself.

    Args:
      moments: Of at least one sample.
      eps: Smallest product of two standard deviations, above 0.

    Returns:
      float64 (N, N) in [-1, 1], symmetric, without NaN.

    Raises:
      ValueError: As `covariance`.
    """
    result = covariance(moments)
    std = np.sqrt(np.maximum(result.diagonal(), 0.0))
    result /= np.maximum(np.outer(std, std), eps)
    return np.clip(result, -1.0, 1.0, out=result)
