"""The coefficients that blend parents: where they start, and which weights they stand for."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.merging.trees import (
    as_jax,
    at_least_float32,
    check_choice,
    check_weights,
    describe_shape,
    flatten,
    nest_like,
)

GRANULARITIES = ("kernel", "layer", "slice", "parameter", "row")
CONSTRAINTS = ("none", "clip", "sigmoid")

Tree = Mapping[Any, Any]
IsKernel = Callable[[str, Any], bool]
IsHead = Callable[[str], bool]
Tie = Callable[[str, tuple[int, ...]], tuple[str, np.ndarray | None]]
"""`tie(path, shape)`: the path of the leaf whose coefficients a leaf has, its own or another's, and
which of them each unit of its last axis has: (c_out,) of int, or None for one each, in order."""

_COLLECTIONS = {"params", "batch_stats"}
_WIDEST_WINDOW = 16


def is_conv_kernel(path: str, leaf: Any) -> bool:
    """Whether a leaf is the kernel of a convolution: named "kernel", with three or more axes.

    Args:
      path: "layer1/0/conv2/kernel".
      leaf: Anything with `ndim`; a convolution's is (*window, c_in, c_out).

    >>> is_conv_kernel("layer1/0/conv2/kernel", np.zeros((3, 3, 8, 16)))
    True
    """
    return path.rpartition("/")[2] == "kernel" and getattr(leaf, "ndim", 0) >= 3


def is_head(path: str) -> bool:
    """Whether a leaf is the head's: below the sub-tree "head".

    >>> is_head("head/kernel"), is_head("layer1/0/conv2/kernel")
    (True, False)
    """
    return path.partition("/")[0] == "head"


def untied(path: str, shape: tuple[int, ...]) -> tuple[str, np.ndarray | None]:
    """The `Tie` of networks in which every kernel has coefficients of its own, one per filter."""
    del shape
    return path, None


def init_coefficients(
    params: Tree,
    num_parents: int = 2,
    *,
    init: Sequence[float] = (),
    granularity: str = "kernel",
    constraint: str = "none",
    is_kernel: IsKernel = is_conv_kernel,
    is_head: IsHead = is_head,
    tie: Tie = untied,
) -> dict[Any, Any]:
    """The coefficients at which every parent has its weight in `init`, or all have the same.

    Args:
      params: Parameters of a parent; only the shapes are used, so that `jax.eval_shape`'s will do.
      num_parents: n ≥ 2.
      init: The n weights, see `start_values`; none: 1/n each.
      granularity: What has a coefficient of its own, for a kernel (*window, c_in, c_out):
        "kernel", each output filter, (c_out,), the paper's, or each group of units that `tie`
        makes; "row", each output unit whatever its group; "layer", the whole convolution, ();
        "slice", each window, (c_in, c_out); "parameter", each number, the kernel's own shape. With
        the last two nothing is tied.
      constraint: As for `merge_kernels`. It says which numbers stand for the weights.
      is_kernel: `is_kernel(path, leaf)`, which leaves are merged by coefficients.
      is_head: `is_head(path)`, which leaves are left out: a head under another name must be named,
        `lambda path: path.startswith("classifier/")`.
      tie: Which kernels share coefficients, see `Tie`.

    Returns:
      A tree like `params` with the kernels only that have coefficients of their own: float32 arrays
      of the granularity's shape, for n > 2 behind a leading axis of n - 1, the parents but the
      last.

    Raises:
      ValueError: An argument is not one of the above; no leaf is a kernel; `params` holds whole
        variables; or kernels lie in PyTorch's layout, (c_out, c_in, *window), whose last axis is
        no filter; or `init` is refused by `start_values`.

    >>> coefficients = init_coefficients({"conv": {"kernel": np.zeros((3, 3, 4, 8))}})
    >>> coefficients["conv"]["kernel"].shape
    (8,)
    """
    check_num_parents(num_parents)
    check_choice("granularity", granularity, GRANULARITIES)
    check_choice("constraint", constraint, CONSTRAINTS)
    starts = np.asarray(start_values(init, num_parents, constraint), np.float32)
    backbone = without_head_leaves(params, is_head)
    shapes = {path: np.shape(leaf) for path, leaf in backbone.items() if is_kernel(path, leaf)}
    if not shapes:
        raise ValueError(f"none of the {len(backbone)} leaves outside the head is a kernel")
    if granularity in ("kernel", "slice"):
        _refuse_torch_layout(shapes)
    coefficients = {}
    for path, shape in shapes.items():
        owner, groups = tie(path, shape)
        if owner != path and granularity not in _FINEST:
            if owner not in shapes:
                raise ValueError(f"{path} has the coefficients of {owner}, which is no kernel")
            continue
        each = [np.full(_granular_shape(shape, granularity, groups), start) for start in starts]
        coefficients[path] = as_jax(each[0] if num_parents == 2 else np.stack(each))
    return nest_like(coefficients, params)


def start_values(init: Sequence[float], num_parents: int, constraint: str) -> list[float]:
    """The trained numbers of all parents but the last that stand for weights of the parents.

    Args:
      init: A weight for each of the n parents, of sum 1 (within 1e-6); none: 1/n each. With the
        constraint "none" any, negative ones too; with "clip" from 0 to 1, but what starts at an
        end and is moved outside has no gradient there; with "sigmoid" between them, without the
        ends, which it comes to only in the limit.
      num_parents: n ≥ 2.
      constraint: See `effective_coefficients`, which this undoes.

    Raises:
      ValueError: `init` has not one weight for each parent, another sum, or a weight that the
        constraint cannot represent.

    >>> start_values((1, 0), 2, "none"), start_values((), 2, "sigmoid")
    ([1.0], [0.0])
    """
    if len(init) == 0:
        return [0.0 if constraint == "sigmoid" else 1 / num_parents] * (num_parents - 1)
    check_weights(init, num_parents)
    *weights, last = map(float, init)
    if constraint == "sigmoid":
        if not min(*weights, last) > 0:
            raise ValueError(
                f"the weights at first are {list(init)}; the constraint 'sigmoid' keeps every "
                "weight above 0 and below 1 and comes to these only in the limit: give weights "
                "between them, such as 0.99 and 0.01, or take the constraint 'none' or 'clip'"
            )
        return [math.log(weight / last) for weight in weights]
    if constraint == "clip" and not min(*weights, last) >= 0:
        raise ValueError(
            f"the weights at first are {list(init)}; the constraint 'clip' keeps every weight from "
            "0 to 1: give such ones, or take the constraint 'none'"
        )
    return weights


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

    >>> effective_coefficients({"conv": {"kernel": np.array([0.0])}}, constraint="sigmoid")
    {'conv': {'kernel': Array([0.5], dtype=float32)}}
    """
    check_num_parents(num_parents)
    check_choice("constraint", constraint, CONSTRAINTS)
    effective = {}
    for path, leaf in flatten(coefficients).items():
        if num_parents > 2 and np.shape(leaf)[:1] != (num_parents - 1,):
            raise ValueError(
                f"coefficients of {path}: shape {np.shape(leaf)}, but {num_parents} parents need "
                f"({num_parents - 1}, ...)"
            )
        effective[path] = constrain(leaf, num_parents, constraint)
    return nest_like(effective, coefficients)


def constrain(raw: Any, num_parents: int, constraint: str) -> jax.Array:
    """One leaf of `effective_coefficients`."""
    weights = at_least_float32(jnp.asarray(raw))
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


def parent_weights(path: str, effective: Any, num_parents: int) -> np.ndarray:
    """The weights of all parents in one layer, one beside the other.

    Args:
      path: Of the layer, for messages.
      effective: A leaf of `effective_coefficients`, of any granularity's shape.
      num_parents: n ≥ 2.

    Returns:
      float64 (n, number of coefficients); the last parent's are one minus the others'.

    Raises:
      ValueError: The shape is not that of n parents.

    >>> parent_weights("conv1/kernel", np.array([0.25, 1.0]), 2)
    array([[0.25, 1.  ],
           [0.75, 0.  ]])
    """
    weights = np.asarray(effective, np.float64)
    if num_parents == 2:
        weights = weights[None]
    if weights.shape[:1] != (num_parents - 1,):
        raise ValueError(
            f"coefficients of {path}: shape {weights.shape}, but {num_parents} parents have "
            f"({num_parents - 1}, ...)"
        )
    weights = weights.reshape(num_parents - 1, -1)
    return np.concatenate([weights, 1.0 - weights.sum(axis=0, keepdims=True)])


def without_head_leaves(tree: Tree, is_head: IsHead) -> dict[str, Any]:
    """Leaves of a tree of parameters, or of another collection, by path and without the head.

    Raises:
      ValueError: It holds whole variables.
    """
    if isinstance(tree, Mapping) and "params" in tree and set(tree) <= _COLLECTIONS:
        raise ValueError(
            f"a tree holds whole variables (its keys are {', '.join(map(str, tree))}): take "
            'merge_variables(parents, coefficients), or hand over variables["params"]'
        )
    return {path: leaf for path, leaf in flatten(tree).items() if not is_head(path)}


def _refuse_torch_layout(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises if kernels are (c_out, c_in, *window) by all that their shapes tell.

    A shape tells where only one end of it can be a window, two or more equal axes of 16 at most.
    Shapes that can be read both ways, such as (3, 3, 3, 3), tell nothing.
    """
    ends = {path: (_is_window(shape[:-2]), _is_window(shape[2:])) for path, shape in shapes.items()}
    torch = [path for path, windows in ends.items() if windows == (False, True)]
    if torch and (True, False) not in ends.values():
        shape = shapes[torch[0]]
        raise ValueError(
            f"{torch[0]}: a kernel of shape {shape} lies in PyTorch's layout (c_out, c_in, "
            "*window); Flax's (*window, c_in, c_out) is wanted: kernel.transpose"
            f"{(*range(2, len(shape)), 1, 0)}"
        )


def _is_window(axes: tuple[int, ...]) -> bool:
    return len(axes) > 1 and len(set(axes)) == 1 and axes[0] <= _WIDEST_WINDOW


def _parents_axis(num_parents: int) -> tuple[int, ...]:
    return () if num_parents == 2 else (num_parents - 1,)


_FINEST = ("slice", "parameter")
"""Granularities with which nothing is tied."""


def _granular_shape(
    shape: tuple[int, ...], granularity: str, groups: np.ndarray | None
) -> tuple[int, ...]:
    if granularity == "kernel" and groups is not None:
        return (int(groups.max()) + 1,)
    axes = {"layer": 0, "kernel": 1, "row": 1, "slice": 2, "parameter": len(shape)}[granularity]
    return shape[max(0, len(shape) - axes) :]


def check_num_parents(num_parents: int) -> None:
    """Raises a ValueError unless there are two or more."""
    if num_parents < 2:
        raise ValueError(f"{num_parents} parents; two or more are wanted")


def check_coefficients(
    coefficients: Mapping[str, Any],
    kernels: Mapping[str, Any],
    num_parents: int,
    tie: Tie = untied,
) -> None:
    """Raises a ValueError unless every kernel has coefficients of a granularity, and no more."""
    leading = _parents_axis(num_parents)
    for path in {**kernels, **coefficients}:
        if path not in kernels:
            raise ValueError(
                f"coefficients of {path}: {describe_shape(coefficients, path)}, but such a kernel "
                "is absent in the parents"
            )
        shape = np.shape(kernels[path])
        owner, groups = tie(path, shape)
        if path not in coefficients and owner != path and owner in coefficients:
            continue  # the owner's are checked
        shapes = {leading + _granular_shape(shape, one, groups): None for one in GRANULARITIES}
        if path not in coefficients or np.shape(coefficients[path]) not in shapes:
            raise ValueError(
                f"coefficients of {path}: {describe_shape(coefficients, path)}, but a kernel "
                f"{shape} of {num_parents} parents takes one of {', '.join(map(str, shapes))}"
            )


def kernel_weights(
    coefficients: Mapping[str, Any],
    path: str,
    shape: tuple[int, ...],
    num_parents: int,
    constraint: str,
    tie: Tie = untied,
) -> jax.Array:
    """The weights of all parents but the last in a kernel, its own coefficients or another's.

    Args:
      coefficients: By path, checked.
      path: Of the kernel.
      shape: Of the kernel.
      num_parents: n ≥ 2.
      constraint: See `effective_coefficients`.
      tie: See `Tie`.

    Returns:
      An array that the kernel's shape can be broadcast with, for n > 2 behind an axis of n - 1.
    """
    owner, groups = tie(path, shape)
    weights = constrain(
        coefficients[path if path in coefficients else owner], num_parents, constraint
    )
    has_units = weights.ndim > len(_parents_axis(num_parents))
    if groups is None or not has_units or weights.shape[-1] == len(groups):
        return weights
    return jnp.take(weights, groups, axis=-1)
