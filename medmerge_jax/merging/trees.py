"""Nested dicts of arrays as flat dicts with paths such as "layer1/0/conv2/kernel".

And what all merges of such trees share: the checks that they fit, and in what they are computed.
"""

import functools
import itertools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
    """Nested dicts from leaves by path, in their order; undoes `flatten` if no key has a "/".

    Raises:
      ValueError: A path is not a string or has an empty part, or is also the beginning of another.

    >>> unflatten({"bn/scale": 1, "bn/bias": 2})
    {'bn': {'scale': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        if not isinstance(path, str) or not all(path.split("/")):
            raise ValueError(f"{path!r} is not a path of names joined by '/'")
        *above, name = path.split("/")
        for beginning in itertools.accumulate(above, "{}/{}".format):
            if beginning in flat:
                raise ValueError(f"{beginning!r} is a leaf and also the beginning of another path")
        node = tree
        for part in above:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree


def nest_like(flat: Mapping[str, Any], like: Mapping[Any, Any]) -> dict[Any, Any]:
    """Those leaves of `flat` whose paths `like` has, nested with the very keys of `like`.

    Unlike `unflatten` this keeps integer keys and keys with "/", so that a tree made from an
    `nnx.State` goes back into it. Mappings that would be empty are left out. Like a `FrozenDict`
    the result is one.

    >>> nest_like({"a/0": 1.5}, {"a": {0: "x", 1: "y"}})
    {'a': {0: 1.5}}
    """
    return like_mapping(dict(_nested(flat, like, "")), like)


def like_mapping(tree: dict[Any, Any], like: Mapping[Any, Any]) -> dict[Any, Any]:
    """The tree as a `FrozenDict` if `like` is one, which Flax is not imported to tell."""
    return type(like)(tree) if hasattr(like, "unfreeze") else tree  # type: ignore[call-arg, return-value]


def without_head(variables: Mapping[str, Mapping[Any, Any]]) -> dict[str, dict[Any, Any]]:
    """The backbone: in each collection everything but the sub-tree "head", if there is one.

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
    the shortcut of a residual block: conv1 < conv2 < downsample. Transformers apply some of
    these before others: patch_embed < blocks, and qkv < proj. Needed because JAX hands dicts back
    sorted by the keys' characters.

    >>> sorted(["layer10", "downsample", "layer2", "conv1"], key=network_order)
    ['conv1', 'layer2', 'layer10', 'downsample']
    """
    return tuple(_part_key(part) for part in path.split("/"))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; one of {', '.join(choices)} is wanted")


def flatten_parents(
    parents: Sequence[Mapping[Any, Any]], names: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Leaves by path of each, after `check_parents` and `check_finite`."""
    flats = [flatten(parent) for parent in parents]
    check_parents(flats, names=names)
    for flat, name in zip(flats, names or parent_names(flats), strict=True):
        check_finite(flat, name)
    return flats


def parent_names(parents: Sequence[Any]) -> list[str]:
    """What they are called in messages: "parent 0", "parent 1", …."""
    return [f"parent {index}" for index in range(len(parents))]


def check_variables(parents: Sequence[Any]) -> None:
    """Raises a ValueError unless each is a mapping with a collection "params"."""
    for name, parent in zip(parent_names(parents), parents, strict=True):
        if not isinstance(parent, Mapping) or "params" not in parent:
            raise ValueError(f'{name} is not a mapping with a collection "params"')


def check_parents(
    parents: Sequence[Mapping[str, Any]], prefix: str = "", names: Sequence[str] | None = None
) -> None:
    """Raises a ValueError unless all have the first's paths and shapes, and floating-point arrays.

    Args:
      parents: Leaves by path of each, at least one.
      prefix: Put before a path in messages, "batch_stats/".
      names: What they are called in messages; by default as by `parent_names`.
    """
    if not parents:
        raise ValueError("0 parents; one or more are wanted")
    names = names or parent_names(parents)
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
    """Raises a ValueError if an array of `name` holds NaN or infinity, which `jax.jit` hides."""
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


def check_one_each(what: str, items: Sequence[Any], num_parents: int) -> None:
    """Raises a ValueError unless there is one item for each parent."""
    if len(items) != num_parents:
        raise ValueError(f"{len(items)} {what} for {num_parents} parents; one each is wanted")


def check_weights(weights: Sequence[Any], num_parents: int) -> None:
    """Raises a ValueError unless there is one for each parent and they sum to 1, within 1e-6.

    Under `jax.jit` their sum cannot be known, unless they are constants.
    """
    check_one_each("weights", weights, num_parents)
    if array_module(weights) is jnp:
        return
    total = math.fsum(float(weight) for weight in weights)
    if not abs(total - 1) <= 1e-6:
        raise ValueError(f"the weights sum to {total:.7g}; a sum of 1 is wanted")


def check_shares(weights: Sequence[Any], num_parents: int) -> None:
    """As `check_weights`, for weights of which none may be negative either."""
    check_weights(weights, num_parents)
    if negative := [float(weight) for weight in weights if float(weight) < 0]:
        raise ValueError(f"the weight {negative[0]:g} is negative; numbers from 0 are wanted")


def describe_shape(flat: Mapping[str, Any], path: str) -> str:
    """The shape of the leaf at a path in words: "shape (64,)", or "absent"."""
    return f"shape {np.shape(flat[path])}" if path in flat else "absent"


def mean(leaves: Sequence[Any]) -> jax.Array:
    """The mean of arrays of one shape; computed as by `promote`, in the dtype it says."""
    arrays, dtype = promote(leaves)
    return as_jax((functools.reduce(operator.add, arrays) / len(arrays)).astype(dtype))


def promote(leaves: Sequence[Any]) -> tuple[list[Any], Any]:
    """The leaves in at least float32, of `array_module`, and the dtype to return their merge in."""
    module = array_module(leaves)
    arrays = [module.asarray(leaf) for leaf in leaves]
    dtype = functools.reduce(jnp.promote_types, [array.dtype for array in arrays])
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # float64 of numpy is float32 here by default
    computed = jnp.float64 if dtype == jnp.float64 else jnp.float32
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


def at_least_float32(x: Any) -> Any:
    """The array as float32, or float64 if it is that: for statistics, averages and logits."""
    # Not by `jnp.promote_types`, which refuses this under strict promotion.
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


# Not closures: one that calls itself is a cycle, and keeps its arrays until they are collected.
def _leaves(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, child in tree.items():
        path = prefix + _name(key, prefix)
        if isinstance(child, Mapping):
            yield from _leaves(child, f"{path}/")
        else:
            yield path, child


def _nested(
    flat: Mapping[str, Any], like: Mapping[Any, Any], prefix: str
) -> Iterator[tuple[Any, Any]]:
    for key, child in like.items():
        path = prefix + _name(key, prefix)
        if not isinstance(child, Mapping):
            if path in flat:
                yield key, flat[path]
        elif inner := dict(_nested(flat, child, f"{path}/")):
            yield key, inner


def _name(key: Any, prefix: str) -> str:
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    if not isinstance(key, str) or not key:
        raise ValueError(
            f"the key {key!r} under {prefix or 'the root'!r} cannot be part of a path: "
            "a non-empty string or an integer is wanted"
        )
    return key


def _part_key(part: str) -> tuple[Any, ...]:
    pieces = re.split(r"(\d+)", part)
    numbers = [int(piece) for piece in pieces[1::2]]
    late = part not in _EARLY
    return (numbers[0] if numbers else math.inf, late, tuple(pieces[::2]), tuple(numbers))


_EARLY = ("cls_token", "pos_embed", "patch_embed", "qkv")
"""Parts without a number, of transformers, that come before others without one."""
