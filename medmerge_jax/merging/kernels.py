"""MedMerge: parents merged kernel by kernel (Almakky et al., arXiv 2403.11646).

For every kernel K_j (one output filter of a convolution) a coefficient w_j blends two parents:

    θ̂_Kj = w_j · θᵇ_Kj + (1 - w_j) · θᶜ_Kj                 w_j = 0.5 at first

and for n parents the first n - 1 have coefficients and the last gets the rest:

    θ̂ = Σᵢ wᵢ · θᵢ + (1 - Σᵢ wᵢ) · θ_n                      wᵢ = 1/n at first

Everything else (batch norms, biases) is the mean of the parents. The head belongs to a parent's own
classes and is left out of everything here: the sub-tree "head", unless `is_head` says otherwise.

All functions are pure, work on nested mappings of arrays, and can be transformed by `jax.jit`,
`jax.grad` and `jax.vmap`: what they check is static (paths, shapes, dtypes).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.merging.coefficients import (
    CONSTRAINTS,
    IsHead,
    IsKernel,
    Tie,
    Tree,
    check_coefficients,
    check_num_parents,
    is_conv_kernel,
    is_head,
    kernel_weights,
    untied,
    without_head_leaves,
)
from medmerge_jax.merging.trees import (
    array_module,
    as_jax,
    check_choice,
    check_parents,
    check_variables,
    flatten,
    like_mapping,
    mean,
    nest_like,
    promote,
)


def merge_kernels(
    parents: Sequence[Tree],
    coefficients: Tree,
    *,
    constraint: str = "none",
    is_kernel: IsKernel = is_conv_kernel,
    is_head: IsHead = is_head,
    tie: Tie = untied,
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
      is_head: Likewise.
      tie: Likewise.

    Returns:
      A nested dict without the head. Leaves are computed in float32 (in float64 for float64
      parents) and returned in the parents' dtype; where parents differ, in the one that JAX
      promotes them to.

    Raises:
      ValueError: Fewer than two parents; whole variables in place of parameters; a path that a
        parent or the coefficients lack or have too many; shapes that differ; a leaf that is no
        floating-point array.

    >>> b, c = ({"conv": {"kernel": np.full((1, 1, 1, 2), value)}} for value in (1.0, 3.0))
    >>> merge_kernels([b, c], {"conv": {"kernel": np.array([0.5, 1.0])}})["conv"]["kernel"]
    Array([[[[2., 1.]]]], dtype=float32)
    """
    check_choice("constraint", constraint, CONSTRAINTS)
    backbones = [without_head_leaves(parent, is_head) for parent in parents]
    check_num_parents(len(parents))
    check_parents(backbones)
    flat_coefficients = flatten(coefficients)
    kernels = {path: leaf for path, leaf in backbones[0].items() if is_kernel(path, leaf)}
    check_coefficients(flat_coefficients, kernels, len(parents), tie)
    merged = {}
    for path in backbones[0]:
        leaves = [backbone[path] for backbone in backbones]
        if path in kernels:
            weights = kernel_weights(
                flat_coefficients, path, np.shape(leaves[0]), len(parents), constraint, tie
            )
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
    is_head: IsHead = is_head,
    tie: Tie = untied,
) -> dict[Any, Any]:
    """Variables of the merged backbone: as `merge_kernels`, and the mean of running statistics.

    The running statistics are those that MedMerge starts its linear probe from; of a model that
    is not trained further they should be estimated anew.

    Args:
      parents: n ≥ 2 of `{"params": ..., "batch_stats": ..., ...}`.
      coefficients: Of the kernels in "params", as for `merge_kernels`.
      constraint: As for `merge_kernels`.
      is_kernel: As for `merge_kernels`; applied to "params" alone.
      is_head: As for `merge_kernels`; applied to all collections.
      tie: As for `merge_kernels`.

    Returns:
      `{"params": merged, "batch_stats": mean, ...}` without heads; every collection but "params"
      is the parents' mean. dtypes are as for `merge_kernels`.

    Raises:
      ValueError: As for `merge_kernels`; or a parent lacks "params".

    >>> params = {"conv": {"kernel": np.ones((1, 1, 1, 2))}, "bn": {"scale": np.ones(2)}}
    >>> statistics = ({"bn": {"mean": np.full(2, mean)}} for mean in (0.0, 2.0))
    >>> parents = [{"params": params, "batch_stats": one} for one in statistics]
    >>> merge_variables(parents, {"conv": {"kernel": 0.5}})["batch_stats"]["bn"]["mean"]
    Array([1., 1.], dtype=float32)
    """
    check_variables(parents)
    merged: dict[Any, Any] = {
        "params": merge_kernels(
            [parent["params"] for parent in parents],
            coefficients,
            constraint=constraint,
            is_kernel=is_kernel,
            is_head=is_head,
            tie=tie,
        )
    }
    names = dict.fromkeys(name for parent in parents for name in parent if name != "params")
    for name in names:
        collections = [parent.get(name, {}) for parent in parents]
        statistics = [without_head_leaves(collection, is_head) for collection in collections]
        check_parents(statistics, f"{name}/")
        means = {path: mean([flat[path] for flat in statistics]) for path in statistics[0]}
        merged[name] = nest_like(means, collections[0])
    return like_mapping(merged, parents[0])


def zeros_parent(
    variables: Tree, *, is_kernel: IsKernel = is_conv_kernel, is_head: IsHead = is_head
) -> dict[Any, Any]:
    """MedMerge's parent of zeros: a kernel that prefers it is one whose feature hurts.

    Only kernels are zero. Batch norms are those of `variables`, the other parent: were they zero
    too, the mean would halve every scale, bias and running average, and the start would differ
    from the other parent by more than its kernels.

    Args:
      variables: `{"params": ..., "batch_stats": ...}` of the parent to be merged with.
      is_kernel: As for `merge_variables`.
      is_head: Likewise.

    Returns:
      The same collections without heads, shapes and dtypes as given.

    >>> params = {"conv": {"kernel": np.ones((1, 1, 1, 2))}, "bn": {"scale": np.ones(2)}}
    >>> zeros = zeros_parent({"params": params})["params"]
    >>> float(zeros["conv"]["kernel"].sum()), float(zeros["bn"]["scale"].sum())
    (0.0, 2.0)
    """
    parent: dict[Any, Any] = {}
    for name, collection in variables.items():
        flat = without_head_leaves(collection, is_head)
        if name == "params":
            flat = {p: jnp.zeros_like(x) if is_kernel(p, x) else x for p, x in flat.items()}
        parent[name] = nest_like(flat, collection)
    return like_mapping(parent, variables)


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
