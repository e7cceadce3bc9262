"""Task vectors, what models differ by from their ancestor, made to interfere less with each other.

TIES drops small differences, and those whose sign most parents do not share; DARE drops some at
random. Both take trees as `averages` does and compute in the same types, but not under `jax.jit`.
Running statistics are no differences that could be dropped, and come out as the parents' mean.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from medmerge_jax.merging.averages import STATISTICS, task_arithmetic, uniform_average
from medmerge_jax.merging.trees import (
    as_jax,
    flatten,
    flatten_parents,
    nest_like,
    parent_names,
    promote,
)

Tree = Mapping[Any, Any]


def ties(
    ancestor: Tree, parents: Sequence[Tree], *, density: float = 0.2, scale: float = 1.0
) -> dict[Any, Any]:
    """θ₀ + s τ, with τ the parents' trimmed differences to θ₀, averaged where their signs agree.

    Yadav et al. 2023, "TIES-Merging: resolving interference when merging models" (arXiv
    2306.01708). Of each parent's difference τᵢ = θᵢ - θ₀ only the largest numbers are kept, by
    magnitude over the whole model, and the others become zero. The sign of each number is that of
    Σᵢ τᵢ, and τ is the mean of those τᵢ that have this sign.

    Args:
      ancestor: θ₀, what all parents were trained from.
      parents: n ≥ 1, as for `uniform_average`.
      density: The share of a model's numbers that are kept, above 0 and at most 1. Of equal ones at
        the border all are kept.
      scale: s; the paper takes 1 where there is no held-out data to choose it by.

    Raises:
      ValueError: As for `uniform_average`; or the density is not in its range.

    >>> start, b, c = ({"x": np.array(x)} for x in ([0.0, 0.0], [4.0, 1.0], [2.0, -3.0]))
    >>> ties(start, [b, c], density=1.0)["x"]
    Array([ 3., -3.], dtype=float32)
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}; above 0 and at most 1 is wanted")
    if not parents:
        raise ValueError("0 parents; one or more are wanted")
    start, *flats = flatten_parents([ancestor, *parents], _names(parents))
    least = [_smallest_kept(start, flat, density) for flat in flats]
    merged = flatten(uniform_average(parents))
    for path in _trained(start):
        (origin, *leaves), dtype = promote([start[path], *(flat[path] for flat in flats)])
        kept = np.stack([leaf - origin for leaf in leaves])
        for one, low in zip(kept, least, strict=True):
            one[np.abs(one) < low] = 0
        agree = (np.sign(kept) == np.sign(kept.sum(axis=0))) & (kept != 0)
        agreed = np.where(agree, kept, 0).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
        merged[path] = as_jax((origin + scale * agreed).astype(dtype))
    return nest_like(merged, parents[0])


def dropped(
    ancestor: Tree, parents: Sequence[Tree], drop: float, seed: int = 0
) -> list[dict[Any, Any]]:
    """Parents whose differences to their ancestor are dropped at random, the others enlarged.

    θ₀ + m (θᵢ - θ₀) / (1 - p), where each number's m is 0 with probability p and otherwise 1, so
    that the expectation is θᵢ: DARE (Yu et al. 2023, "Language models are super Mario", arXiv
    2311.03099). They are then merged by `task_arithmetic` or by `ties`.

    Args:
      ancestor: θ₀, what all parents were trained from.
      parents: n ≥ 1, as for `uniform_average`.
      drop: p, from 0 on and below 1.
      seed: Of the random numbers; they differ for each parent and each array.

    Raises:
      ValueError: As for `uniform_average`; or p is not in its range.

    >>> start, b = {"x": np.zeros(4)}, {"x": np.ones(4)}
    >>> sorted(set(dropped(start, [b], 0.5)[0]["x"].tolist()))
    [0.0, 2.0]
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop is {drop}; from 0 on and below 1 is wanted")
    start, *flats = flatten_parents([ancestor, *parents], _names(parents))
    results = []
    for number, (flat, parent) in enumerate(zip(flats, parents, strict=True)):
        thinned = dict(flat)
        key = jax.random.fold_in(jax.random.key(seed), number)
        for index, path in enumerate(sorted(_trained(start))):
            (origin, leaf), dtype = promote([start[path], flat[path]])
            keeps = jax.random.bernoulli(jax.random.fold_in(key, index), 1 - drop, leaf.shape)
            difference = np.where(keeps, leaf - origin, 0) / (1 - drop)
            thinned[path] = as_jax((origin + difference).astype(dtype))
        results.append(nest_like(thinned, parent))
    return results


def dare(
    ancestor: Tree, parents: Sequence[Tree], *, drop: float = 0.9, scale: Any = None, seed: int = 0
) -> dict[Any, Any]:
    """Task arithmetic of parents whose differences were dropped at random, see `dropped`.

    Args:
      ancestor: What all parents were trained from.
      parents: n ≥ 1, as for `uniform_average`.
      drop: The share that is dropped, from 0 on and below 1.
      scale: As for `task_arithmetic`; None: 1/n.
      seed: Of what is dropped.

    Raises:
      ValueError: As for `dropped` and `task_arithmetic`.

    >>> start, b = {"x": np.zeros(2)}, {"x": np.ones(2)}
    >>> dare(start, [b], drop=0.0)["x"]
    Array([1., 1.], dtype=float32)
    """
    if not parents:
        raise ValueError("0 parents; one or more are wanted")
    thinned = dropped(ancestor, parents, drop, seed)
    merged = flatten(
        task_arithmetic(ancestor, thinned, 1 / len(parents) if scale is None else scale)
    )
    means = flatten(uniform_average(parents))
    statistics = {path: leaf for path, leaf in means.items() if path.startswith(STATISTICS)}
    return nest_like({**merged, **statistics}, parents[0])


def _names(parents: Sequence[Tree]) -> list[str]:
    return ["the ancestor", *parent_names(parents)]


def _trained(flat: Mapping[str, Any]) -> list[str]:
    return [path for path in flat if not path.startswith(STATISTICS)]


def _smallest_kept(start: Mapping[str, Any], flat: Mapping[str, Any], density: float) -> float:
    """The least magnitude of the differences that are kept, of all arrays together."""
    sizes = []
    for path in _trained(start):
        (origin, leaf), _ = promote([start[path], flat[path]])
        sizes.append(np.abs(leaf - origin).ravel())
    together = np.concatenate(sizes)
    count = max(1, round(density * len(together)))
    return float(np.partition(together, len(together) - count)[len(together) - count])
