"""Averages of parents: uniform, weighted, spherical, task arithmetic, Fisher-weighted.

All take trees of one architecture, `{"params": ..., "batch_stats": ...}` or any part of it, and
return such a tree, computed in float32 (float64 for such parents) and in the parents' dtype: every
leaf is merged, the head too where parents have one of the same shape. Heads of different sizes are
to be left out before. The running statistics that come out are what
the average makes of them and do not fit the merged kernels: see `recalibration`.

All but `diagonal_fisher` work under `jax.jit`, which then cannot tell whether parents hold NaN.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.merging.trees import (
    array_module,
    as_jax,
    check_finite,
    check_one_each,
    check_weights,
    describe_shape,
    flatten,
    flatten_parents,
    mean,
    nest_like,
    parent_names,
    promote,
)

Tree = Mapping[Any, Any]
Array = jax.Array

STATISTICS = "batch_stats/"
# Beyond this cosine an angle computed in float32 is too coarse to divide by its sine.
_PARALLEL = 0.9995
# Numbers in the gradients that `diagonal_fisher` holds at once, where it may choose: 0.5 GB.
_FISHER_NUMBERS = 2**27


def uniform_average(parents: Sequence[Tree]) -> dict[Any, Any]:
    """The mean of n ≥ 1 parents.

    Args:
      parents: Trees of the same paths and shapes.

    Raises:
      ValueError: No parent; paths or shapes that differ; a leaf that is no floating-point array, or
        that holds NaN or infinity.
    """
    flats = flatten_parents(parents)
    merged = {path: mean([flat[path] for flat in flats]) for path in flats[0]}
    return nest_like(merged, parents[0])


def weighted_average(parents: Sequence[Tree], weights: Sequence[Any] | None) -> dict[Any, Any]:
    """Σᵢ wᵢ θᵢ of n ≥ 1 parents.

    Args:
      parents: As for `uniform_average`.
      weights: One number per parent; they sum to 1 (within 1e-6). A negative one extrapolates, and
        may make running variances negative. None: `uniform_average`.

    Raises:
      ValueError: As for `uniform_average`; or not one weight for each, or their sum is not 1.
    """
    if weights is None:
        return uniform_average(parents)
    flats = flatten_parents(parents)
    check_weights(weights, len(flats))
    merged = {path: _weigh([flat[path] for flat in flats], weights) for path in flats[0]}
    return nest_like(merged, parents[0])


def slerp(parents: Sequence[Tree], t: Any = 0.5) -> dict[Any, Any]:
    """Spherical linear interpolation of two parents, tensor by tensor.

        sin((1 - t) Ω)/sin Ω · θ₀ + sin(t Ω)/sin Ω · θ₁

    with Ω the angle between the two tensors taken as vectors (Shoemake 1985, "Animating rotation
    with quaternion curves"; applied to weights as they are, not normalised, as mergekit does).
    Unlike the mean of tensors at right angles, it keeps their norm. Where |cos Ω| > 0.9995, or a
    tensor is zero, the two are interpolated linearly; so are running statistics always, which
    are no directions.

    Args:
      parents: Two, as for `uniform_average`.
      t: 0 gives the first parent, 1 the second.

    Raises:
      ValueError: As for `uniform_average`; or there are not two parents.
    """
    if len(parents) != 2:
        raise ValueError(f"{len(parents)} parents; slerp is between two")
    flats = flatten_parents(parents)
    merged = {}
    for path in flats[0]:
        pair = [flat[path] for flat in flats]
        merged[path] = _weigh(pair, (1 - t, t)) if path.startswith(STATISTICS) else _slerp(pair, t)
    return nest_like(merged, parents[0])


def task_arithmetic(ancestor: Tree, parents: Sequence[Tree], scale: Any) -> dict[Any, Any]:
    """θ₀ + Σᵢ sᵢ (θᵢ - θ₀): the parents' differences to a common ancestor, added up.

    Ilharco et al. 2022, "Editing models with task arithmetic" (arXiv 2212.04089), who choose one
    scale for all on held-out data. With the scale 1/n it is the mean of n parents, and with one
    parent and the scale 1 that parent. Running variances follow the formula but do not fall below
    the smallest of the ancestor's and the parents': a sum of differences may make them negative.

    Args:
      ancestor: What all parents were trained from.
      parents: n ≥ 1, as for `uniform_average`.
      scale: One number for all parents, or a sequence with one for each. A negative one forgets.

    Raises:
      ValueError: As for `uniform_average`; or the scales are too many or too few.
    """
    if not parents:
        raise ValueError("0 parents; one or more are wanted")
    flats = flatten_parents([*parents, ancestor], [*parent_names(parents), "the ancestor"])
    scales = [scale] * len(parents) if np.ndim(scale) == 0 else list(scale)
    check_one_each("scales", scales, len(parents))
    merged = {}
    for path in flats[0]:
        (*leaves, start), dtype = promote([flat[path] for flat in flats])
        module, total = array_module([start, *leaves, *scales]), start
        for leaf, factor in zip(leaves, scales, strict=True):
            total = total + module.asarray(factor, start.dtype) * (leaf - start)
        merged[path] = as_jax(total.astype(dtype))
    return floor_variances(nest_like(merged, ancestor), [*parents, ancestor])


def floor_variances(merged: Tree, parents: Sequence[Tree]) -> dict[Any, Any]:
    """The tree, its running variances not below the smallest of the parents'.

    Sums with negative weights may make them negative. What is between the parents' stays as it is,
    to the bit, and so is everything else.
    """
    flat, flats = flatten(merged), [flatten(parent) for parent in parents]
    for path, leaf in flat.items():
        if path.startswith(STATISTICS) and path.endswith("/var"):
            leaves = [of_parent[path] for of_parent in flats]
            module = array_module([leaf, *leaves])
            least = functools.reduce(module.minimum, leaves)
            flat[path] = as_jax(module.maximum(leaf, least).astype(leaf.dtype))
    return nest_like(flat, merged)


def diagonal_fisher(
    log_probs: Callable[[Any, Any], Array],
    params: Tree,
    batches: Iterable[Any],
    *,
    classes_at_once: int | None = None,
) -> dict[Any, Any]:
    """The diagonal of the Fisher information, exactly: the expectation is over the model's classes.

        F = mean over examples x of Σ_c p(c|x) (∂ log p(c|x) / ∂θ)²

    Each example is differentiated by itself, class by class; the square of a batch's gradient is
    something else. No labels are needed.

    Examples are taken one after another, and the classes of one at once: the backward pass is
    mapped over them, the forward pass shared. On two CPU cores a map over examples, which makes
    grouped convolutions of all, took three times as long.

    Args:
      log_probs: `log_probs(params, inputs)` maps n examples to (n, num_classes) log probabilities;
        with running statistics, not the batch's. Of a multi-label model to (n, num_labels, 2), of
        each label absent and present: labels are independent given x, so that their Fisher
        information adds up. It is compiled anew for each function object; a
        `jax.tree_util.Partial(function, statistics)` is compiled once for all `statistics`.
      params: Tree of what to differentiate by: the parameters of the model, without statistics.
      batches: Inputs of `log_probs`, arrays or trees of arrays (n, ...), of any n. Read once.
      classes_at_once: Gradients of this many classes are held in memory, each as large as
        `params`. By default as many as fit into 0.5 GB, at least one.

    Returns:
      A tree like `params`, float32, of non-negative numbers.

    Raises:
      ValueError: No example; `log_probs` returns another shape or no log probabilities; a parameter
        is no floating-point array or not finite.
    """
    (flat,) = flatten_parents([params], ["the model"])
    partial = jax.tree_util.Partial
    function = log_probs if isinstance(log_probs, partial) else partial(log_probs)
    totals = {path: np.zeros(np.shape(leaf), np.float64) for path, leaf in flat.items()}
    num_examples, chunk, num_classes = 0, 0, 0
    for batch in batches:
        size = len(jax.tree.leaves(batch)[0])
        # Summed in float32 inside a batch, in float64 over batches.
        sums = {path: jnp.zeros(np.shape(leaf), jnp.float32) for path, leaf in flat.items()}
        for i in range(size):
            example = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], batch)
            if not num_classes:
                num_classes = _num_classes(function, params, example)
                chunk = _classes_at_once(classes_at_once, num_classes, flat)
            for start in range(0, num_classes, chunk):
                sums, outputs = _add_squares(sums, function, params, example, start, chunk)
                if not num_examples and not i and not start:
                    _check_log_probs(outputs)
        totals = {path: total + np.asarray(sums[path]) for path, total in totals.items()}
        num_examples += size
    if not num_examples:
        raise ValueError("no example to compute the Fisher information from")
    fisher = {path: jnp.asarray(x / num_examples, jnp.float32) for path, x in totals.items()}
    check_finite(fisher, "the Fisher information")
    return nest_like(fisher, params)


def fisher_average(
    parents: Sequence[Tree],
    fishers: Sequence[Tree],
    coefficients: Sequence[Any] | None = None,
    *,
    floor: float = 1e-6,
    normalise: bool = True,
) -> dict[Any, Any]:
    """Σᵢ λᵢ Fᵢ θᵢ / Σᵢ λᵢ Fᵢ, number by number.

    Matena & Raffel 2022, "Merging models with Fisher-weighted averaging" (arXiv 2111.09832). As
    in their code, every F is raised to the floor and then divided by its L2 norm over all paths,
    the norm being that before the floor. Unlike in its default, the floor is for every parent.

    Args:
      parents: n ≥ 1, as for `uniform_average`.
      fishers: One tree per parent, as from `diagonal_fisher`, at the parents' paths: with parents
        `{"params": ..., "batch_stats": ...}` it is `{"params": fisher}`. What has no Fisher, as
        running statistics have none, is averaged with the coefficients alone.
      coefficients: λ, one per parent, none negative, not all zero; only ratios matter. By default
        all equal; the paper searches them on held-out data.
      floor: The least F, positive, so that numbers that no parent depends on are averaged.
      normalise: Whether to divide by the norms.

    Raises:
      ValueError: As for `uniform_average`; fishers of other paths or shapes, negative, or zero
        everywhere with `normalise`; coefficients or a floor not as above.
    """
    flats = flatten_parents(parents)
    flat_fishers = [flatten(fisher) for fisher in fishers]
    check_one_each("fishers", flat_fishers, len(flats))
    _check_fishers(flat_fishers, flats[0])
    coefficients = [1.0] * len(flats) if coefficients is None else coefficients
    _check_coefficients(coefficients, len(flats))
    if not floor > 0:
        raise ValueError(f"the floor is {floor}; a positive number is wanted")
    factors = list(coefficients)
    if normalise:
        norms = [_norm(fisher, index) for index, fisher in enumerate(flat_fishers)]
        factors = [factor / norm for factor, norm in zip(factors, norms, strict=True)]
    total = functools.reduce(lambda a, b: a + b, coefficients)
    shares = [coefficient / total for coefficient in coefficients]
    module = array_module([*factors, *(leaf for flat in flat_fishers for leaf in flat.values())])
    merged = {}
    for path in flats[0]:
        leaves = [flat[path] for flat in flats]
        weights = shares
        if path in flat_fishers[0]:
            weights = [
                factor * module.maximum(module.asarray(fisher[path], jnp.float32), floor)
                for factor, fisher in zip(factors, flat_fishers, strict=True)
            ]
            total_weight = functools.reduce(module.add, weights)
            weights = [weight / total_weight for weight in weights]
        merged[path] = _weigh(leaves, weights)
    return nest_like(merged, parents[0])


@functools.partial(jax.jit, donate_argnums=0, static_argnames="chunk")
def _add_squares(
    sums: dict[str, Array], log_probs: Any, params: Tree, example: Any, start: Any, chunk: int
) -> tuple[dict[str, Array], Array]:
    """Adds p_c (∂ log p_c)² of `chunk` classes of one example; also gives all log p."""
    log_p, pullback = jax.vjp(lambda params: log_probs(params, example), params)
    outputs = log_p.ravel()
    classes = start + jnp.arange(chunk)
    # A class beyond the last has a row of zeros here, so that its gradient is zero.
    rows = jax.nn.one_hot(classes, outputs.size, dtype=outputs.dtype)
    (gradients,) = jax.vmap(lambda row: pullback(row.reshape(log_p.shape)))(rows)
    probabilities = jnp.exp(outputs.astype(jnp.float32))[jnp.minimum(classes, outputs.size - 1)]
    added = {}
    for path, gradient in flatten(gradients).items():
        squares = jnp.square(gradient.astype(jnp.float32))
        added[path] = sums[path] + jnp.tensordot(probabilities, squares, 1)
    return added, log_p


def _num_classes(log_probs: Any, params: Tree, example: Any) -> int:
    shape = jax.eval_shape(log_probs, params, example).shape
    if len(shape) < 2 or shape[0] != 1:
        raise ValueError(
            f"log_probs returns shape {shape} for one example; (1, num_classes) is wanted"
        )
    return math.prod(shape)


def _check_log_probs(outputs: Array) -> None:
    for total in np.exp(np.asarray(outputs, np.float64)).sum(-1).ravel():
        if not abs(total - 1) < 0.01:
            raise ValueError(
                f"log_probs returns logarithms of numbers that sum to {total:.4g}, not to 1; "
                "log probabilities are wanted, as from jax.nn.log_softmax"
            )


def _classes_at_once(most: int | None, num_classes: int, flat: Mapping[str, Any]) -> int:
    if most is None:
        most = max(_FISHER_NUMBERS // sum(np.size(leaf) for leaf in flat.values()), 1)
    if most < 1:
        raise ValueError(f"classes_at_once is {most}; one or more are wanted")
    # As even as they can be: 5 and 5 of 10, not 9 and 1 padded to 9.
    num_chunks = -(-num_classes // min(most, num_classes))
    return -(-num_classes // num_chunks)


def _slerp(pair: Sequence[Any], t: Any) -> Array:
    (first, second), dtype = promote(pair)
    module = array_module([first, second, t])
    norms = module.linalg.norm(first.ravel()) * module.linalg.norm(second.ravel())
    cosine = module.sum(first * second) / module.where(norms > 0, norms, 1)
    linear = (norms == 0) | (abs(cosine) > _PARALLEL)
    angle = module.arccos(module.where(linear, 0, cosine))
    sine = module.sin(angle)
    weight_first = module.where(linear, 1 - t, module.sin((1 - t) * angle) / sine)
    weight_second = module.where(linear, t, module.sin(t * angle) / sine)
    return as_jax((weight_first * first + weight_second * second).astype(dtype))


def _weigh(leaves: Sequence[Any], weights: Sequence[Any]) -> Array:
    arrays, dtype = promote(leaves)
    module = array_module([*arrays, *weights])
    terms = [
        module.asarray(weight, array.dtype) * array
        for weight, array in zip(weights, arrays, strict=True)
    ]
    return as_jax(functools.reduce(module.add, terms).astype(dtype))


def _norm(fisher: Mapping[str, Any], index: int) -> Any:
    module = array_module(fisher.values())
    # In one order for all trees: those of a file and those that JAX returned differ in theirs.
    arrays = [module.asarray(fisher[path], jnp.float32) for path in sorted(fisher)]
    # Of a well-trained model all may be below 1e-19, the squares of which are zero in float32.
    largest = functools.reduce(module.maximum, [module.max(array) for array in arrays])
    unit = module.where(largest > 0, largest, 1)
    squares = [module.sum(module.square(array / unit)) for array in arrays]
    norm = largest * module.sqrt(functools.reduce(module.add, squares))
    if not isinstance(norm, jax.core.Tracer) and not norm > 0:
        raise ValueError(
            f"the Fisher information of parent {index} is zero everywhere and has no scale; "
            "its predictions may be saturated"
        )
    return norm


def _check_fishers(fishers: Sequence[Mapping[str, Any]], parent: Mapping[str, Any]) -> None:
    paths = dict.fromkeys(path for fisher in fishers for path in fisher)
    for index, fisher in enumerate(fishers):
        name = f"the Fisher information of parent {index}"
        for path in paths:
            of_parent, of_fisher = describe_shape(parent, path), describe_shape(fisher, path)
            if of_parent != of_fisher:
                raise ValueError(f"{path}: {of_fisher} in {name}, {of_parent} in the parents")
        check_finite(fisher, name)
        for path, leaf in fisher.items():
            if not isinstance(leaf, jax.core.Tracer) and not (np.asarray(leaf) >= 0).all():
                raise ValueError(f"{path}: negative in {name}")


def _check_coefficients(coefficients: Sequence[Any], num_parents: int) -> None:
    check_one_each("coefficients", coefficients, num_parents)
    if array_module(coefficients) is jnp:
        return
    values = [float(coefficient) for coefficient in coefficients]
    if not (all(value >= 0 for value in values) and 0 < sum(values) < math.inf):
        raise ValueError(f"coefficients {values}; none negative and not all zero is wanted")
