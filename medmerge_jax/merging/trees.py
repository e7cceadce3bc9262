"""Nested dicts of arrays as flat dicts with paths such as "layer1/0/conv2/kernel".

And what all merges of such trees share: the checks that they fit, and in what they are computed.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

SEPARATOR = "/"


def flatten(tree: Mapping[Any, Any]) -> dict[str, Any]:
    """Leaves by path, in the tree's own order.

    Args:
      tree: Nested mappings: dicts, Flax's `FrozenDict`, an `nnx.State` as a pure dict. Keys are
        strings or integers (as in `nnx.List`), which are written in decimals. A string may have
        "/" in it, as Haiku's and those of a flat dict do. Everything that is not a mapping is a
        leaf. Empty mappings hold no leaf and leave no trace.

    Returns:
      `{"layer1/0/conv2/kernel": leaf, ...}`.

    Raises:
      ValueError: `tree` is not a mapping, a key cannot be part of a path, or two keys make the
        same path (0 and "0", or "a/b" and "a" above "b").

    >>> flatten({"layer1": [0], "res/~/conv": {"w": 1, 0: 2}})
    {'layer1': [0], 'res/~/conv/w': 1, 'res/~/conv/0': 2}
    """
    if not isinstance(tree, Mapping):
        raise ValueError(f"a mapping of names to arrays is wanted, found {type(tree).__name__}")
    flat: dict[str, Any] = {}
    for path, leaf in _leaves(tree, ""):
        if path in flat:
            raise ValueError(f"two leaves have the path {path!r}: write their keys in one way")
        flat[path] = leaf
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts from leaves by path; undoes `flatten` on trees of strings without "/".

    Args:
      flat: Leaves by path, as `flatten` makes them.

    Returns:
      Nested dicts in the order of `flat`.

    Raises:
      ValueError: A path is not a string or has an empty part, or is also the beginning of another.

    >>> unflatten({"bn/scale": 1, "bn/bias": 2})
    {'bn': {'scale': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    nodes: dict[str, dict[str, Any]] = {"": tree}
    for path, leaf in flat.items():
        if not isinstance(path, str) or not all(path.split(SEPARATOR)):
            raise ValueError(f"{path!r} is not a path of names joined by {SEPARATOR!r}")
        parent = _node(nodes, path.rpartition(SEPARATOR)[0])
        name = path.rpartition(SEPARATOR)[2]
        if name in parent:
            raise ValueError(f"{path!r} is a leaf and also the beginning of another path")
        parent[name] = leaf
    return tree


def nest_like(flat: Mapping[str, Any], like: Mapping[Any, Any]) -> dict[Any, Any]:
    """Those leaves of `flat` whose paths `like` has, nested with the very keys of `like`.

    Unlike `unflatten` this keeps integer keys and keys with "/", so that a tree made from an
    `nnx.State` goes back into it. Mappings that would be empty are left out. Like a `FrozenDict`
    the result is one.

    >>> nest_like({"a/0": 1.5}, {"a": {0: "x", 1: "y"}})
    {'a': {0: 1.5}}
    """
    return like_mapping(_nest_like(flat, like, ""), like)


def like_mapping(tree: dict[Any, Any], like: Mapping[Any, Any]) -> dict[Any, Any]:
    """The tree as a `FrozenDict` if `like` is one, which Flax is not imported to tell."""
    return type(like)(tree) if hasattr(like, "unfreeze") else tree  # type: ignore[call-arg, return-value]


def without_head(variables: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[Any, Any]]:
    """The backbone: in each collection everything but the sub-tree "head".

    Args:
      variables: `{"params": ..., "batch_stats": ...}`, with a head or without.

    >>> without_head({"params": {"conv1": {"kernel": 1}, "head": {"bias": 2}}})
    {'params': {'conv1': {'kernel': 1}}}
    """
    backbone = {
        collection: {name: node for name, node in tree.items() if name != "head"}
        for collection, tree in variables.items()
    }
    return like_mapping(backbone, variables)


def network_order(path: str) -> tuple[Any, ...]:
    """Sort key that puts convolutions in the order in which a network applies them.

    Parts of a path are compared by their first number, then by name: conv1 < layer1 < layer2 <
    layer10, and denseblock1 < transition1 < denseblock2. Parts without a number come last, as
    the shortcut of a residual block: conv1 < conv2 < downsample. Needed because JAX hands dicts
    back sorted by the keys' characters.

    Args:
      path: "layer1/0/conv2/kernel".

    Returns:
      A key for `sorted`.

    >>> sorted(["layer10", "downsample", "layer2", "conv1"], key=network_order)
    ['conv1', 'layer2', 'layer10', 'downsample']
    """
    return tuple(_part_key(part) for part in path.split(SEPARATOR))


def check_parents(
    parents: Sequence[Mapping[str, Any]], prefix: str = "", names: Sequence[str] | None = None
) -> None:
    """Raises unless all have the paths and shapes of the first, and only floating-point arrays.

    Args:
      parents: Leaves by path of each.
      prefix: Put before a path in messages, "batch_stats/".
      names: What they are called in messages, by default "parent 0", "parent 1", ….

    Raises:
      ValueError: There is none; a path that one lacks or has too many; shapes that differ; a leaf
        that is no floating-point array.
    """
    if not parents:
        raise ValueError("0 parents; one or more are wanted")
    names = names or [f"parent {index}" for index in range(len(parents))]
    for name, parent in zip(names, parents, strict=True):
        for path in {**parents[0], **parent}:
            first, shape = describe_shape(parents[0], path), describe_shape(parent, path)
            if first != shape:
                raise ValueError(
                    f"{prefix}{path}: {first} in {names[0]}, {shape} in {name}; parents "
                    "must have the same architecture"
                )
            dtype = getattr(parent[path], "dtype", None)
            if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
                what = type(parent[path]).__name__ if dtype is None else f"of dtype {dtype}"
                raise ValueError(
                    f"{prefix}{path} in {name} is {what}; a floating-point array is wanted"
                )


def check_finite(flat: Mapping[str, Any], name: str) -> None:
    """Raises if an array holds NaN or infinity; under `jax.jit` nothing can be known.

    Args:
      flat: Arrays by path.
      name: What they belong to, for the message: "parent 1".

    Raises:
      ValueError: Names the first such path, and how many of its numbers are not finite.
    """
    for path, leaf in flat.items():
        if isinstance(leaf, jax.core.Tracer):
            continue
        finite = np.isfinite(leaf)
        if not finite.all():
            count = finite.size - int(finite.sum())
            raise ValueError(
                f"{path} in {name}: {count} of {finite.size} numbers are NaN or infinite; "
                "training diverged or a file is damaged"
            )


def check_weights(weights: Sequence[Any], num_parents: int) -> None:
    """Raises unless there is one for each parent and they sum to 1, within 1e-6.

    Under `jax.jit` their sum cannot be known, unless they are constants.

    Raises:
      ValueError: Says how many there are, or their sum.
    """
    if len(weights) != num_parents:
        raise ValueError(f"{len(weights)} weights for {num_parents} parents; one each is wanted")
    if any(isinstance(weight, jax.core.Tracer) for weight in weights):
        return
    total = math.fsum(float(weight) for weight in weights)
    if not abs(total - 1) <= 1e-6:
        raise ValueError(f"the weights sum to {total:.7g}; a sum of 1 is wanted")


def describe_shape(flat: Mapping[str, Any], path: str) -> str:
    """The shape of the leaf at a path in words: "shape (64,)", or "absent"."""
    return f"shape {np.shape(flat[path])}" if path in flat else "absent"


def mean(leaves: Sequence[Any]) -> jax.Array:
    """The mean of arrays of one shape; computed as by `promote`, in the dtype it says."""
    arrays, dtype = promote(leaves)
    total = arrays[0]
    for array in arrays[1:]:
        total = total + array
    return as_jax((total / len(arrays)).astype(dtype))


def promote(leaves: Sequence[Any]) -> tuple[list[Any], Any]:
    """The leaves in at least float32, of `array_module`, and the dtype to return their merge in."""
    module = array_module(leaves)
    arrays = [module.asarray(leaf) for leaf in leaves]
    dtype = arrays[0].dtype
    for array in arrays[1:]:
        dtype = jnp.promote_types(dtype, array.dtype)
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # float64 of numpy is float32 here by default
    computed = at_least_float32(dtype)
    return [array.astype(computed, copy=False) for array in arrays], dtype


def array_module(values: Iterable[Any]) -> Any:
    """What to compute with: `jax.numpy` under `jax.jit` and its like, otherwise numpy.

    JAX compiles every operation for every shape, and a network has many: the first average of
    two DenseNet-121 took 11 s of processor time, and takes 0.2 s with numpy.
    """
    return jnp if any(isinstance(value, jax.core.Tracer) for value in values) else np


def as_jax(array: Any) -> jax.Array:
    """A new array of numpy on the device; `jnp.asarray` would compile a copy for every shape."""
    return array if isinstance(array, jax.Array) else jax.device_put(array)


def at_least_float32(dtype: Any) -> Any:
    """Not by `jnp.promote_types`, which refuses this under strict promotion."""
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, child in tree.items():
        path = prefix + _name(key, prefix)
        if isinstance(child, Mapping):
            yield from _leaves(child, path + SEPARATOR)
        else:
            yield path, child


def _name(key: Any, prefix: str) -> str:
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    if not isinstance(key, str) or not key:
        raise ValueError(
            f"the key {key!r} under {prefix or 'the root'!r} cannot be part of a path: "
            "a non-empty string or an integer is wanted"
        )
    return key


def _node(nodes: dict[str, dict[str, Any]], path: str) -> dict[str, Any]:
    """The dict at `path`, made with all above it where it is missing."""
    if path not in nodes:
        above, _, name = path.rpartition(SEPARATOR)
        parent = _node(nodes, above)
        if name in parent:
            raise ValueError(f"{path!r} is a leaf and also the beginning of another path")
        nodes[path] = parent[name] = {}
    return nodes[path]


def _nest_like(flat: Mapping[str, Any], like: Mapping[Any, Any], prefix: str) -> dict[Any, Any]:
    nested: dict[Any, Any] = {}
    for key, child in like.items():
        path = prefix + _name(key, prefix)
        if isinstance(child, Mapping):
            inner = _nest_like(flat, child, path + SEPARATOR)
            if inner:
                nested[key] = inner
        elif path in flat:
            nested[key] = flat[path]
    return nested


def _part_key(part: str) -> tuple[Any, ...]:
    pieces = re.split(r"(\d+)", part)
    numbers = [int(piece) for piece in pieces[1::2]]
    return (numbers[0] if numbers else math.inf, tuple(pieces[::2]), tuple(numbers))
