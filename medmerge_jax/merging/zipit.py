"""ZipIt!: units of several models merged into one model's, across models and within them.

Stoica et al., "ZipIt! Merging models from different tasks without training" (arXiv 2305.03053).
In every space of hidden units (see `spaces`) the n models' units are merged, greedily and most
correlated first, until as many are left as one model has. The merge matrix M averages the units
that became one, the unmerge matrix U gives each of them their average back, and both go into the
arrays around. For layer l with the kernels Wᵢ of models i, whose inputs are space l - 1,

    W = Σᵢ M_l,i Wᵢ U_l-1,i

and everything elementwise (batch norms, with their running statistics) is averaged by M. These
running statistics are not those of the merged model: re-estimate them, as the paper does.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.sparse

from medmerge_jax.merging.spaces import Space, find_spaces, refuse_heads
from medmerge_jax.merging.trees import (
    check_finite,
    check_parents,
    flatten,
    flatten_parents,
    nest_like,
    parent_names,
)

Tree = Mapping[Any, Any]

# The defaults of the published code. Its scripts search them for each pair of models.
ALPHA = 0.3
BETA = 0.125

_HEAD = "params/head/"
# Two units are the same if their correlation is 1 up to this.
_SAME = 1e-5
# Of equally correlated units, those of one number in different models go first.
_PREFERENCE = 1e-9


def match_features(
    correlation: Any, num_models: int, size: int, alpha: float = ALPHA, beta: float = BETA
) -> tuple[np.ndarray, np.ndarray]:
    """Which of n models' units become one (section 4 of arXiv 2305.03053).

    The two most correlated units are merged, of any models, again and again until `size` are
    left. A merged unit correlates with another as the least correlated of its members, times α.

    Two points that the paper leaves open: a merge is one within a model if both sides have a unit
    of it, so that the budget is exact and is never exceeded. (Published code gives a merged unit
    to the first of its models, and spends the budget by that.) And identical models are merged
    unit by unit. For this, correlations are taken relative to the units' own with themselves,
    which are less than 1 where a unit hardly varies; dead units, which have 0, are fully
    correlated with those of other models; units that cannot be told apart, whose correlation is
    1, are merged without the discount; and of equally correlated ones those of the same number in
    different models go first.

    Args:
      correlation: Symmetric (n · size, n · size); unit i of model m is m · size + i. As from
        `correlation.correlation`.
      num_models: n ≥ 1.
      size: Units of each model, and of the merged one.
      alpha: In [0, 1], what a merged unit's correlation is multiplied by. 0: a merged unit never
        takes in a second unit of a model.
      beta: In [0, 1], the share of all (n - 1) · size merges that may be within models, each
        model having a part of 1/n. 0: none; with two models that is a permutation, aligned
        averaging.

    Returns:
      merge: float64 (size, n · size); row j averages the units that became unit j.
      unmerge: float64 (n · size, size) of 0 and 1; merge @ unmerge is the identity. The unit j is
        the place of the first unit of model 0 in it; those without are put where there is room.

    Raises:
      ValueError: A shape does not fit, the matrix is not symmetric or has NaN, or alpha or beta
        is outside of [0, 1].
    """
    labels = _match(correlation, num_models, size, alpha, beta, "the correlation").ravel()
    unmerge = np.zeros((num_models * size, size))
    unmerge[np.arange(num_models * size), labels] = 1.0
    return unmerge.T / unmerge.sum(axis=0)[:, None], unmerge


def zipit(
    parents: Sequence[Tree],
    correlations: Mapping[str, Any],
    *,
    alpha: float = ALPHA,
    beta: float = BETA,
    spaces: Sequence[Space] | None = None,
) -> dict[Any, Any]:
    """One model from n: all hidden units merged by ZipIt!, from the first layer to the head.

    Heads are merged with their inputs unmerged and their outputs averaged. Parents with different
    heads: leave these out, or see `partial_zipit`.

    Args:
      parents: n ≥ 1 of `{"params": ..., "batch_stats": ...}` of one architecture. One parent is
        returned as it is.
      correlations: For each space's name the (n · size, n · size) correlation of its units'
        activations in the n parents, on the same images.
      alpha: As for `match_features`.
      beta: As for `match_features`.
      spaces: Of the parents; found if not given.

    Returns:
      Variables like the first parent's. Computed in float64, returned in the parents' dtype.

    Raises:
      ValueError: A path or shape that parents do not share, numbers that are not finite or no
        floating-point ones; a space without correlation, or one of a wrong shape, or of units that
        lie in heads; alpha or beta outside of [0, 1].
    """
    flats = flatten_parents(parents)
    spaces = find_spaces(parents[0]) if spaces is None else spaces
    axes = _axes(spaces, correlations, len(parents), alpha, beta)
    merged = {path: _merge([flat[path] for flat in flats], axes.get(path, {})) for path in flats[0]}
    return nest_like(merged, parents[0])


def partial_zipit(
    parents: Sequence[Tree],
    correlations: Mapping[str, Any],
    *,
    stop: str,
    alpha: float = ALPHA,
    beta: float = BETA,
    spaces: Sequence[Space] | None = None,
) -> list[dict[Any, Any]]:
    """Models that share their first layers, zipped, and keep their own from there on.

    The first own layers of parent i read the merged units through its part of U; each model is
    thus an ordinary one of the architecture. Heads may be of any numbers of classes.

    Args:
      parents: As for `zipit`, but for the heads.
      correlations: As for `zipit`; needed of the zipped spaces only.
      stop: The last part that is zipped, one of `partial_stops(spaces)`: a ResNet's "layer2"; a
        DenseNet's "features/denseblock2", with the norm of the transition behind it.
      alpha: As for `match_features`.
      beta: As for `match_features`.
      spaces: Of the parents; found if not given.

    Returns:
      Variables of n models, in the order of the parents; zipped leaves are the same arrays in
      all. Running statistics of the own layers are the parents': re-estimate them too.

    Raises:
      ValueError: As for `zipit`; or the network cannot be cut there, with all that are possible.
    """
    flats = [flatten(parent) for parent in parents]
    check_parents([{p: x for p, x in flat.items() if not p.startswith(_HEAD)} for flat in flats])
    for flat, name in zip(flats, parent_names(parents), strict=True):
        check_finite(flat, name)
    spaces = find_spaces(parents[0]) if spaces is None else spaces
    stops = _stops(spaces)
    if stop not in stops:
        raise ValueError(
            f"the network cannot be cut after {stop!r}; possible are {', '.join(stops)}. Behind "
            "a cut, only convolutions and the head may read the merged units"
        )
    axes = _axes(spaces[: stops[stop]], correlations, len(parents), alpha, beta)
    shared = {
        path: _merge([flat[path] for flat in flats], of_path)
        for path, of_path in axes.items()
        if any(axis.averages for axis in of_path.values())
    }
    models = []
    for index, (flat, parent) in enumerate(zip(flats, parents, strict=True)):
        own = {
            path: _unmerge(path, leaf, axes.get(path, {}), index)
            for path, leaf in flat.items()
            if path not in shared
        }
        models.append(nest_like({**own, **shared}, parent))
    return models


def partial_stops(spaces: Sequence[Space]) -> tuple[str, ...]:
    """Where `partial_zipit` can stop, from the first layers to the last, all but the head.

    A network can be cut where all that reads the units before is linear and makes other units:
    after a stage of a ResNet whose next begins with convolutions on both ways, and before a
    DenseNet's transition's convolution.
    """
    return tuple(_stops(spaces))


@dataclasses.dataclass(frozen=True)
class _Axis:
    """What happens to an axis of an array.

    Attributes:
      averages: Units that become one are averaged (out, scale), or else summed (in).
      parts: For each space on the axis the units' positions and labels, (size,) and (n, size).
    """

    averages: bool
    parts: list[tuple[np.ndarray, np.ndarray]]

    def matrix(self, model: int, length: int) -> scipy.sparse.csr_array:
        """(length, length): the new positions from a model's own."""
        count = len(self.parts[0][1])
        # Channels that are no space's: those of all models are one, as the image's are.
        target = np.arange(length)
        weight = np.full(length, 1.0 / count if self.averages else 1.0)
        for positions, labels in self.parts:
            target[positions] = positions[labels[model]]
            if self.averages:
                members = np.bincount(labels.ravel(), minlength=len(positions))
                weight[positions] = 1.0 / members[labels[model]]
        return scipy.sparse.csr_array((weight, (target, np.arange(length))), (length, length))


def _axes(
    spaces: Sequence[Space],
    correlations: Mapping[str, Any],
    num_models: int,
    alpha: float,
    beta: float,
) -> dict[str, dict[int, _Axis]]:
    """What happens to the axes of arrays with units of these spaces, by path and axis."""
    refuse_heads(spaces)
    axes: dict[str, dict[int, _Axis]] = {}
    for space in spaces:
        labels, name = np.arange(space.size)[None], f"the correlation of the space {space.name!r}"
        if num_models > 1:
            if space.name not in correlations:
                raise ValueError(f"{name} is absent; those of all {len(spaces)} spaces are wanted")
            matrix = correlations[space.name]
            labels = _match(matrix, num_models, space.size, alpha, beta, name)
        for place in space.places:
            of_path = axes.setdefault(place.path, {})
            axis = of_path.setdefault(place.axis, _Axis(place.role != "in", []))
            axis.parts.append((place.positions, labels))
    return axes


def _merge(leaves: Sequence[Any], axes: Mapping[int, _Axis]) -> Any:
    """Σᵢ M_i Wᵢ U_i, or the mean of W_i U_i where no axis is averaged."""
    total = np.zeros(np.shape(leaves[0]))
    for model, leaf in enumerate(leaves):
        total += _apply(leaf, axes, model)
    if not any(axis.averages for axis in axes.values()):
        total /= len(leaves)
    dtype = functools.reduce(jnp.promote_types, [leaf.dtype for leaf in leaves])
    return jnp.asarray(total.astype(dtype))


def _unmerge(path: str, leaf: Any, axes: Mapping[int, _Axis], model: int) -> Any:
    """A leaf behind the cut: W_i U_i."""
    if not axes:
        return leaf
    for axis, units in axes.items():
        size = sum(len(positions) for positions, _ in units.parts)
        if np.shape(leaf)[axis : axis + 1] != (size,):
            raise ValueError(
                f"{path}: shape {np.shape(leaf)} in parent {model}, but {size} units are before it"
            )
    return jnp.asarray(_apply(leaf, axes, model).astype(leaf.dtype))


def _apply(leaf: Any, axes: Mapping[int, _Axis], model: int) -> np.ndarray:
    array = np.asarray(leaf).astype(np.float64)
    for number, axis in axes.items():
        units = np.moveaxis(array, number, 0)
        matrix = axis.matrix(model, len(units))
        changed = (matrix @ units.reshape(len(units), -1)).reshape(units.shape)
        array = np.moveaxis(changed, 0, number)
    return array


def _stops(spaces: Sequence[Space]) -> dict[str, int]:
    """By name of the last part before a cut, the number of spaces before it."""
    stops = {}
    for count in range(1, len(spaces) + 1):
        if _can_cut(spaces, count):
            later = [space.name + "/" for space in spaces[count:]]
            parts = spaces[count - 1].name.split("/")
            names = ["/".join(parts[: i + 1]) for i in range(len(parts))]
            # The largest part that ends here: "layer2", whose last space is "layer2/1/conv1".
            ended = (n for n in names if not any(x.startswith(n + "/") for x in later))
            stops[next(ended)] = count
    return stops


def _can_cut(spaces: Sequence[Space], count: int) -> bool:
    """Whether each array's units are all zipped, or none but those it reads."""
    made: dict[str, set[bool]] = {}
    read: dict[str, set[bool]] = {}
    for index, space in enumerate(spaces):
        for place in space.places:
            side = read if place.role == "in" else made
            side.setdefault(place.path, set()).add(index < count)
    whole = all(len(zipped) == 1 for zipped in (*made.values(), *read.values()))
    return whole and all(
        zipped == {False} or read.get(path, {True}) == {True} for path, zipped in made.items()
    )


def _match(
    correlation: Any, num_models: int, size: int, alpha: float, beta: float, name: str
) -> np.ndarray:
    """(num_models, size): the merged unit that each unit becomes a part of."""
    for option, value in (("alpha", alpha), ("beta", beta)):
        if not 0 <= value <= 1:
            raise ValueError(f"{option} is {value}; a number from 0 to 1 is wanted")
    units = num_models * size
    if num_models < 1 or size < 1 or np.shape(correlation) != (units, units):
        raise ValueError(
            f"{name} has shape {np.shape(correlation)}; for {num_models} models of {size} units "
            f"({units}, {units}) is wanted"
        )
    matrix = np.array(correlation, np.float64)
    if not np.isfinite(matrix).all():
        raise ValueError(f"{name} has {np.sum(~np.isfinite(matrix))} numbers that are not finite")
    if not np.allclose(matrix, matrix.T, rtol=0, atol=1e-6):
        raise ValueError(f"{name} is not symmetric")
    greedy = _Greedy(matrix, num_models, size, alpha, beta)
    for _ in range((num_models - 1) * size):
        greedy.merge()
    return _numbered(greedy.label.reshape(num_models, size))


def _numbered(label: np.ndarray) -> np.ndarray:
    """Clusters numbered by their first unit in model 0, those without in what is free."""
    size = label.shape[1]
    clusters, first = np.unique(label[0], return_index=True)
    number = dict(zip(clusters.tolist(), first.tolist(), strict=True))
    free = sorted(set(range(size)) - set(number.values()))
    others = [cluster for cluster in np.unique(label).tolist() if cluster not in number]
    number |= dict(zip(others, free, strict=True))
    return np.array([[number[cluster] for cluster in row] for row in label.tolist()])


class _Greedy:
    """Clusters of units, of which the two most alike are merged, one pair at a time.

    A merge costs O(N) for N units and not O(N²): `bound` holds for every cluster at least the
    highest similarity to another that it may be merged with, and a row of the matrix is searched
    only when its bound is the highest of all. Similarities of clusters may change in any way, but
    what is forbidden once remains so, which keeps the bounds of searched rows true. `label` (N,)
    is the cluster of each unit; clusters bear the number of their first unit.
    """

    def __init__(
        self, similarity: np.ndarray, num_models: int, size: int, alpha: float, beta: float
    ) -> None:
        units = num_models * size
        model = np.arange(units) // size
        own = np.maximum.outer(similarity.diagonal(), similarity.diagonal())
        dead = own <= 0
        own[dead] = 1.0
        similarity = similarity / own
        similarity[dead] = np.not_equal.outer(model, model)[dead]
        similarity[similarity >= 1 - _SAME] = 1.0
        for other in range(1, num_models):
            first, second = np.arange(units - other * size), np.arange(other * size, units)
            similarity[first, second] += _PREFERENCE
            similarity[second, first] += _PREFERENCE
        np.fill_diagonal(similarity, -np.inf)

        self.label = np.arange(units)
        self._similarity = similarity
        self._bound = similarity.max(axis=1)
        self._size, self._alpha = size, alpha
        # A little more, as 0.29 · 200 / 2 is 28.99…; the published code does the same.
        merges = (num_models - 1) * size
        self._budget = np.full(num_models, int(beta * merges / num_models + 1e-4))
        self._has = model[None, :] == np.arange(num_models)[:, None]
        self._merged = np.zeros(units, bool)
        self._full = False

    def merge(self) -> None:
        """Merges the two clusters that are most alike of those that may be."""
        first, second = self._best()
        row = np.minimum(self._similarity[first], self._similarity[second])
        if self._alpha > 0:
            row = np.where(row >= 1, row, self._alpha * row)
        row[[first, second]] = -np.inf
        self._similarity[first] = self._similarity[:, first] = row
        self._similarity[second] = self._similarity[:, second] = -np.inf
        self._bound = np.maximum(self._bound, row)
        self._bound[first], self._bound[second] = row.max(), -np.inf

        self.label[self.label == second] = first
        self._budget -= self._has[:, first] & self._has[:, second]
        self._has[:, first] |= self._has[:, second]
        self._has[:, second] = False
        self._merged[first] = True
        # Merged units of several models are final when there are as many as there will be units.
        # All others then find a place in them, and the budget need not be exceeded in the end.
        self._full = self._full or bool(np.sum(self._has.sum(axis=0) > 1) == self._size)

    def _best(self) -> tuple[int, int]:
        while True:
            cluster = int(self._bound.argmax())
            row = np.where(self._forbidden(cluster), -np.inf, self._similarity[cluster])
            other = int(row.argmax())
            if row[other] == self._bound[cluster]:
                return min(cluster, other), max(cluster, other)
            self._bound[cluster] = row[other]

    def _forbidden(self, cluster: int) -> np.ndarray:
        """(N,), the clusters that one may not be merged with."""
        models = self._has[:, cluster]
        shares = self._has[models & (self._budget <= 0)].any(axis=0)
        if self._alpha == 0:
            again = self._has[models].any(axis=0)
            shares |= again if self._merged[cluster] else again & self._merged
        if self._full:
            mixed = self._has.sum(axis=0) > 1
            if mixed[cluster]:
                shares |= mixed
            else:
                shares |= ~mixed & ~self._has[models].any(axis=0)
        return shares
