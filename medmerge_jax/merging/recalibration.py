"""Statistics of a merged model: batch norms recalibrated, and REPAIR where there are none.

Averaged units vary less than their parents' units do, the less the less they agree, and from
layer to layer less and less ("variance collapse", Jordan et al. 2022, "REPAIR: REnormalizing
Permuted Activations for Interpolation Repair", arXiv 2211.08403). Running statistics are those of
the parents' units, so that a batch norm does not undo it until they are estimated anew.

REPAIR asks for more: every unit's mean and standard deviation shall be the averages of the
parents' units'. Where a batch norm follows a layer, as in this package's convolutional networks,
or reads its output elsewhere (DenseNet's concatenations), recalibration does that: a unit behind
a batch norm has the mean `bias` and the standard deviation |`scale`|, and those are averages. The
two differ

- where no batch norm follows, as in transformers: `repair` rescales such layers;
- where the parents' scales differ in sign: |mean of scales| is less than the mean of |scales|, and
  `repair_scales` makes up for it.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.merging.trees import (
    array_module,
    as_jax,
    at_least_float32,
    check_finite,
    check_parents,
    check_weights,
    flatten,
    nest_like,
    parent_names,
    promote,
)

Tree = Mapping[Any, Any]
Statistics = Mapping[str, tuple[Any, Any]]

# A unit that varies so much less than it should holds nothing but rounding errors.
_DEAD = 1e-5


def recalibrate(
    batch_statistics: Callable[[Any, Any], Tree], variables: Tree, batches: Iterable[Any]
) -> dict[Any, Any]:
    """Variables with running statistics estimated anew, as averages over batches.

    All examples count alike, at whatever momentum the model was trained: for batches of one size
    it is PyTorch's `momentum=None`, the cumulative average. The former statistics are forgotten.

    Args:
      batch_statistics: `batch_statistics(variables, inputs)`, the mean and unbiased variance of
        every batch norm's input, in training mode, of one batch: a tree like
        `variables["batch_stats"]`. See `models.norm.batch_statistics`.
      variables: Of a merged model: `{"params": ..., "batch_stats": ...}`.
      batches: Training inputs, arrays or trees of arrays (n, ...). Read once. Of any sizes, but the
        variance inside a batch of few examples is that of few.

    Returns:
      `variables` with another "batch_stats"; all else is not copied.

    Raises:
      ValueError: There are no running statistics, no batches, or the new statistics are of other
        paths or shapes, or not finite.
    """
    old = flatten(variables.get("batch_stats", {}))
    if not old:
        raise ValueError(
            'the variables have no "batch_stats" to estimate anew: a network without batch norm '
            "is not recalibrated but repaired"
        )
    totals = {path: np.zeros(np.shape(leaf), np.float64) for path, leaf in old.items()}
    num_examples = 0
    for batch in batches:
        size = len(jax.tree.leaves(batch)[0])
        new = flatten(batch_statistics(variables, batch))
        check_parents([old, new], "batch_stats/", ["the variables", "a batch's statistics"])
        check_finite(new, "a batch's statistics")
        totals = {path: x + size * np.asarray(new[path], np.float64) for path, x in totals.items()}
        num_examples += size
    if not num_examples:
        raise ValueError("no batch to estimate running statistics from")
    means = {path: jnp.asarray(x / num_examples, old[path].dtype) for path, x in totals.items()}
    return {**variables, "batch_stats": nest_like(means, variables["batch_stats"])}


def repair(
    measure: Callable[[Any], Statistics],
    params: Tree,
    parents: Sequence[Tree],
    weights: Sequence[float] | None = None,
) -> dict[Any, Any]:
    """REPAIR: rescales layers so that their units vary as the parents' units do.

    Layer by layer, each is measured with all before it repaired, and its kernel and bias are
    changed so that each unit's mean and standard deviation are the weighted means of the
    parents'. That is exact, and takes one measurement for each layer; the published code inserts
    batch norms for one pass, which comes to the same.

    Args:
      measure: `measure(params)` runs the network over training data and returns, by the layer's
        path in `params` ("features/3") and in the order in which layers are applied, the (mean,
        variance) of its output before the activation, two arrays (c_out,), over examples and
        positions.
      params: Of the merged network. The layers measured have "kernel" (..., c_out) and "bias".
      parents: What it was merged from, with their units aligned.
      weights: Of the parents in the merge; they sum to 1. By default all equal.

    Returns:
      `params` with other kernels and biases. A unit that is dead in the merged network, of less
      than 1e-5 of the wanted standard deviation, has only its mean corrected.

    Raises:
      ValueError: No parent, not one weight each, a measured layer without kernel or bias or with
        another number of units, or statistics that are not finite.
    """
    weights = _each_weight(weights, len(parents))
    measured = [measure(parent) for parent in parents]
    flat = flatten(params)
    for layer in measured[0]:
        moments = [
            _moments(statistics, layer, name)
            for statistics, name in zip(measured, parent_names(parents), strict=True)
        ]
        goal_mean, goal_std = (
            np.asarray(sum(w * moment for w, moment in zip(weights, of_parents, strict=True)))
            for of_parents in zip(*moments, strict=True)
        )
        kernel, bias = _kernel_and_bias(flat, layer, len(goal_mean))
        mean, std = _moments(measure(nest_like(flat, params)), layer, "the merged network")
        alive = std > _DEAD * goal_std
        gain = np.where(alive, goal_std, 1) / np.where(alive, std, 1)
        flat[f"{layer}/kernel"] = _times(kernel, gain)
        shifted = (np.asarray(bias, np.float64) - mean) * gain + goal_mean
        flat[f"{layer}/bias"] = jnp.asarray(shifted, bias.dtype)
    return nest_like(flat, params)


def repair_scales(
    variables: Tree, parents: Sequence[Tree], weights: Sequence[float] | None = None
) -> dict[Any, Any]:
    """Batch norms' scales as long as the parents' are on average, in the merged sign.

    A unit behind a recalibrated batch norm then has the mean and the standard deviation that REPAIR
    asks for, also where parents' scales differ in sign. To be used beside `recalibrate`, before or
    after.

    Args:
      variables: Of the merged model. A scale is a leaf of "params" named "scale" whose module has
        running statistics.
      parents: Variables of what it was merged from, with their units aligned.
      weights: Of the parents in the merge; they sum to 1. By default all equal.

    Returns:
      `variables` with other scales; one that is zero in the merged model counts as positive.

    Raises:
      ValueError: No parent, not one weight each, or a scale that a parent lacks or has in another
        shape.
    """
    weights = _each_weight(weights, len(parents))
    flat = flatten(variables)
    scales = {path: leaf for path, leaf in flat.items() if _is_scale(path, flat)}
    ours = [{p: x for p, x in flatten(parent).items() if p in scales} for parent in parents]
    check_parents([scales, *ours], names=["the merged model", *parent_names(parents)])
    for path in scales:
        (merged, *leaves), dtype = promote([scales[path], *[parent[path] for parent in ours]])
        module = array_module([merged, *leaves])
        length = sum(w * module.abs(leaf) for w, leaf in zip(weights, leaves, strict=True))
        flat[path] = as_jax(module.where(merged < 0, -length, length).astype(dtype))
    return nest_like(flat, variables)


def _moments(statistics: Statistics, layer: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation in float64; a variance may be a little below zero."""
    if layer not in statistics:
        raise ValueError(f"{layer} is not among the layers measured in {name}")
    mean, variance = (np.asarray(moment, np.float64) for moment in statistics[layer])
    check_finite({layer: mean}, f"the means of {name}")
    check_finite({layer: variance}, f"the variances of {name}")
    return mean, np.sqrt(np.maximum(variance, 0))


def _kernel_and_bias(flat: Mapping[str, Any], layer: str, size: int) -> tuple[Any, Any]:
    kernel, bias = (flat.get(f"{layer}/{name}") for name in ("kernel", "bias"))
    if kernel is None or bias is None:
        missing = "kernel" if kernel is None else "bias"
        raise ValueError(
            f"{layer} has no {missing} to repair; a layer before a batch norm needs none, see "
            "recalibrate"
        )
    if np.shape(bias) != (size,) or np.shape(kernel)[-1:] != (size,):
        raise ValueError(
            f"{layer}: a kernel {np.shape(kernel)} and a bias {np.shape(bias)}, but statistics of "
            f"{size} units"
        )
    return kernel, bias


def _times(kernel: Any, gain: np.ndarray) -> jax.Array:
    array = jnp.asarray(kernel)
    computed = at_least_float32(array)
    factor = jnp.asarray(gain, computed.dtype).reshape((1,) * (array.ndim - 1) + (-1,))
    return (computed * factor).astype(array.dtype)


def _is_scale(path: str, flat: Mapping[str, Any]) -> bool:
    match = re.fullmatch("params/(.*/|)scale", path)
    return match is not None and f"batch_stats/{match[1]}mean" in flat


def _each_weight(weights: Sequence[float] | None, num_parents: int) -> list[float]:
    if not num_parents:
        raise ValueError("0 parents; one or more are wanted")
    if weights is None:
        return [1 / num_parents] * num_parents
    check_weights(weights, num_parents)
    return [float(weight) for weight in weights]
