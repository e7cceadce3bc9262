"""MedMerge: parents merged kernel by kernel (Almakky et al., arXiv 2403.11646).

For every kernel K_j (one output filter of a convolution) a coefficient w_j blends two parents:

    θ̂_Kj = w_j · θᵇ_Kj + (1 - w_j) · θᶜ_Kj                 w_j = 0.5 at first

and for n parents the first n - 1 have coefficients and the last gets the rest:

    θ̂ = Σᵢ wᵢ · θᵢ + (1 - Σᵢ wᵢ) · θ_n                      wᵢ = 1/n at first

Everything else (batch norms, biases) is the mean of the parents. The head, the sub-tree "head",
belongs to a parent's own classes and is left out of everything here.

All functions are pure, work on nested mappings of arrays, and can be transformed by `jax.jit`,
`jax.grad` and `jax.vmap`: what they check is static (paths, shapes, dtypes).
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.merging.trees import (
    SEPARATOR,
    array_module,
    as_jax,
    at_least_float32,
    check_parents,
    describe_shape,
    flatten,
    mean,
    nest_like,
    promote,
)

GRANULARITIES = ("kernel", "layer", "slice", "parameter")
CONSTRAINTS = ("none", "clip", "sigmoid")

Tree = Mapping[Any, Any]
IsKernel = Callable[[str, Any], bool]


def is_conv_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf is the kernel of a convolution: named "kernel", with three or more axes.

    Args:
      path: "layer1/0/conv2/kernel".
      leaf: Anything with `ndim`; a convolution's is (*window, c_in, c_out).
    """
    return path.rpartition(SEPARATOR)[2] == "kernel" and getattr(leaf, "ndim", 0) >= 3


def init_coefficients(
    params: Tree,
    num_parents: int = 2,
    *,
    granularity: str = "kernel",
    constraint: str = "none",
    is_kernel: IsKernel = is_conv_kernel,
) -> dict[Any, Any]:
    """The coefficients at which every parent has the same weight.

    Args:
      params: Parameters of a parent; only the shapes are used, so that `jax.eval_shape`'s will do.
      num_parents: n ≥ 2.
      granularity: What has a coefficient of its own, for a kernel (*window, c_in, c_out):
        "kernel", each output filter, (c_out,), the paper's; "layer", the whole convolution, ();
        "slice", each window, (c_in, c_out); "parameter", each number, the kernel's own shape.
      constraint: As for `merge_kernels`. "sigmoid" starts at 0, the others at 1/n.
      is_kernel: `is_kernel(path, leaf)`, which leaves are merged by coefficients.

    Returns:
      A tree like `params` with kernels only: float32 arrays of the granularity's shape, for
      n > 2 behind a leading axis of n - 1, the parents but the last.

    Raises:
      ValueError: An argument is not one of the above, or no leaf is a kernel.
    """
    _check_num_parents(num_parents)
    _check_choice("granularity", granularity, GRANULARITIES)
    _check_choice("constraint", constraint, CONSTRAINTS)
    start = 0.0 if constraint == "sigmoid" else 1 / num_parents
    backbone = _backbone(params)
    coefficients = {
        path: jnp.full(
            _parents_axis(num_parents) + _granular_shape(np.shape(leaf), granularity),
            start,
            jnp.float32,
        )
        for path, leaf in backbone.items()
        if is_kernel(path, leaf)
    }
    if not coefficients:
        raise ValueError(f"none of the {len(backbone)} leaves outside the head is a kernel")
    return nest_like(coefficients, params)


def effective_coefficients(
    coefficients: Tree, num_parents: int = 2, constraint: str = "none"
) -> dict[Any, Any]:
    """The weights that the trained numbers stand for.

    Args:
      coefficients: Tree of (...) for two parents, (n - 1, ...) for n > 2.
      num_parents: n ≥ 2.
      constraint: "none": as they are, free real numbers (the paper's). "clip": each clipped to
        [0, 1], and divided by their sum over parents where that exceeds 1; outside of [0, 1] the
        gradient is zero. "sigmoid": softmax over the n - 1 numbers and a zero for the last
        parent; for two parents the logistic sigmoid.

    Returns:
      A tree of the same paths and shapes, in float32.

    Raises:
      ValueError: An argument is not one of the above, or n > 2 and a leaf lacks the leading axis.
    """
    _check_num_parents(num_parents)
    _check_choice("constraint", constraint, CONSTRAINTS)
    effective = {}
    for path, leaf in flatten(coefficients).items():
        if num_parents > 2 and np.shape(leaf)[:1] != (num_parents - 1,):
            raise ValueError(
                f"coefficients of {path}: shape {np.shape(leaf)}, but {num_parents} parents need "
                f"({num_parents - 1}, ...)"
            )
        effective[path] = _constrain(leaf, num_parents, constraint)
    return nest_like(effective, coefficients)


def merge_kernels(
    parents: Sequence[Tree],
    coefficients: Tree,
    *,
    constraint: str = "none",
    is_kernel: IsKernel = is_conv_kernel,
) -> dict[Any, Any]:
    """Parameters of the merged backbone: kernels blended, every other leaf the parents' mean.

    θ̂ = Σᵢ wᵢ · θᵢ + (1 - Σᵢ wᵢ) · θ_n, equation 1 of MedMerge (arXiv 2403.11646) for n = 2. It is
    computed as written, so that w = 1 and w = 0 give the parents' own numbers (except subnormal
    ones, below 1.2e-38, which XLA takes for zero).

    Example, with `flax.nnx`, whose states hold the same nested dicts:

        states = [nnx.to_pure_dict(nnx.state(parent, nnx.Param)) for parent in parents]
        merged = merge_kernels(states, init_coefficients(states[0]))
        state = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(state, merged)
        nnx.update(model, state)

    Args:
      parents: n ≥ 2 trees of parameters with the same paths and shapes outside of the head.
        Any mappings; keys of the first are returned. Heads are ignored, of any size, or none.
      coefficients: Tree of the kernels' paths. The granularity of each leaf is read off its
        shape, see `init_coefficients`.
      constraint: "none", "clip" or "sigmoid", see `effective_coefficients`.
      is_kernel: As given to `init_coefficients`.

    Returns:
      A nested dict without the head. Leaves are computed in float32 (in float64 for float64
      parents) and returned in the parents' dtype; where parents differ, in the one that JAX
      promotes them to.

    Raises:
      ValueError: Fewer than two parents; a path that a parent or the coefficients lack or have
        too many; shapes that differ; a leaf that is no floating-point array.
    """
    _check_choice("constraint", constraint, CONSTRAINTS)
    backbones = [_backbone(parent) for parent in parents]
    _check_num_parents(len(parents))
    check_parents(backbones)
    flat_coefficients = flatten(coefficients)
    kernels = {path: leaf for path, leaf in backbones[0].items() if is_kernel(path, leaf)}
    _check_coefficients(flat_coefficients, kernels, len(parents))
    merged = {}
    for path in backbones[0]:
        leaves = [backbone[path] for backbone in backbones]
        if path in kernels:
            weights = _constrain(flat_coefficients[path], len(parents), constraint)
            merged[path] = _blend(leaves, weights)
        else:
            merged[path] = mean(leaves)
    return nest_like(merged, parents[0])


def merge_variables(
    parents: Sequence[Tree],
    coefficients: Tree,
    *,
    constraint: str = "none",
    is_kernel: IsKernel = is_conv_kernel,
) -> dict[Any, Any]:
    """Variables of the merged backbone: as `merge_kernels`, and the mean of running statistics.

    The running statistics are those that MedMerge starts its linear probe from; of a model that
    is not trained further they should be estimated anew.

    Args:
      parents: n ≥ 2 of `{"params": ..., "batch_stats": ..., ...}`.
      coefficients: Of the kernels in "params", as for `merge_kernels`.
      constraint: As for `merge_kernels`.
      is_kernel: As for `merge_kernels`; applied to "params" alone.

    Returns:
      `{"params": merged, "batch_stats": mean, ...}` without heads; every collection but "params"
      is the parents' mean. dtypes are as for `merge_kernels`.

    Raises:
      ValueError: As for `merge_kernels`; or a parent lacks "params".
    """
    for index, parent in enumerate(parents):
        if not isinstance(parent, Mapping) or "params" not in parent:
            raise ValueError(f'parent {index} is not a mapping with a collection "params"')
    merged: dict[Any, Any] = {
        "params": merge_kernels(
            [parent["params"] for parent in parents],
            coefficients,
            constraint=constraint,
            is_kernel=is_kernel,
        )
    }
    names = dict.fromkeys(name for parent in parents for name in parent if name != "params")
    for name in names:
        collections = [parent.get(name, {}) for parent in parents]
        statistics = [_backbone(collection) for collection in collections]
        check_parents(statistics, f"{name}{SEPARATOR}")
        means = {path: mean([flat[path] for flat in statistics]) for path in statistics[0]}
        merged[name] = nest_like(means, collections[0])
    return merged


def zeros_parent(variables: Tree, *, is_kernel: IsKernel = is_conv_kernel) -> dict[Any, Any]:
    """MedMerge's parent of zeros: a kernel that prefers it is one whose feature hurts.

    Only kernels are zero. Batch norms are those of `variables`, the other parent: were they zero
    too, the mean would halve every scale, bias and running average, and the start would differ
    from the other parent by more than its kernels.

    Args:
      variables: `{"params": ..., "batch_stats": ...}` of the parent to be merged with.
      is_kernel: As for `merge_variables`.

    Returns:
      The same collections without heads, shapes and dtypes as given.
    """
    parent: dict[Any, Any] = {}
    for name, collection in variables.items():
        flat = _backbone(collection)
        if name == "params":
            flat = {p: jnp.zeros_like(x) if is_kernel(p, x) else x for p, x in flat.items()}
        parent[name] = nest_like(flat, collection)
    return parent


def _constrain(raw: Any, num_parents: int, constraint: str) -> jax.Array:
    weights = jnp.asarray(raw)
    weights = weights.astype(at_least_float32(weights.dtype))
    if constraint == "none":
        return weights
    if constraint == "clip":
        weights = jnp.clip(weights, 0.0, 1.0)
        if num_parents == 2:
            return weights
        return weights / jnp.maximum(jnp.sum(weights, axis=0, keepdims=True), 1.0)
    if num_parents == 2:
        return jax.nn.sigmoid(weights)
    last = jnp.zeros_like(weights[:1])
    return jax.nn.softmax(jnp.concatenate([weights, last]), axis=0)[:-1]


def _blend(leaves: Sequence[Any], weights: jax.Array) -> jax.Array:
    kernels, dtype = promote(leaves)
    module = array_module([*kernels, weights])
    weights = module.asarray(weights, kernels[0].dtype)
    if len(kernels) == 2:
        weights = weights[None]

    def scaled(weight: Any, kernel: Any) -> Any:
        # Broadcast by hand, also for jax.numpy_rank_promotion("raise"). Not by way of the shape
        # (1, 1, 1, c_out): of a 1 x 1 kernel, the gradient then is a sum over one axis of four,
        # a hundred times slower on a CPU than over three.
        return module.broadcast_to(weight, kernel.shape) * kernel

    blended = scaled(1.0 - module.sum(weights, axis=0), kernels[-1])
    for weight, kernel in zip(reversed(list(weights)), reversed(kernels[:-1]), strict=True):
        blended = scaled(weight, kernel) + blended
    return as_jax(blended.astype(dtype))


def _backbone(tree: Tree) -> dict[str, Any]:
    """Leaves by path without the sub-tree "head"."""
    return {p: x for p, x in flatten(tree).items() if p.partition(SEPARATOR)[0] != "head"}


def _parents_axis(num_parents: int) -> tuple[int, ...]:
    return () if num_parents == 2 else (num_parents - 1,)


def _granular_shape(shape: tuple[int, ...], granularity: str) -> tuple[int, ...]:
    axes = {"layer": 0, "kernel": 1, "slice": 2, "parameter": len(shape)}[granularity]
    return shape[max(0, len(shape) - axes) :]


def _check_num_parents(num_parents: int) -> None:
    if num_parents < 2:
        raise ValueError(f"{num_parents} parents; two or more are wanted")


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; one of {', '.join(choices)} is wanted")


def _check_coefficients(
    coefficients: Mapping[str, Any], kernels: Mapping[str, Any], num_parents: int
) -> None:
    leading = _parents_axis(num_parents)
    for path in {**kernels, **coefficients}:
        if path not in kernels:
            raise ValueError(
                f"coefficients of {path}: {describe_shape(coefficients, path)}, but such a kernel "
                "is absent in the parents"
            )
        shape = np.shape(kernels[path])
        wanted = [leading + _granular_shape(shape, granularity) for granularity in GRANULARITIES]
        if path not in coefficients or np.shape(coefficients[path]) not in wanted:
            raise ValueError(
                f"coefficients of {path}: {describe_shape(coefficients, path)}, but a kernel "
                f"{shape} of {num_parents} parents takes one of {', '.join(map(str, wanted))}"
            )
