"""Permutation alignment: hidden units put in the order in which two networks agree most.

Entezari et al. 2021 (arXiv 2110.06296) conjectured that networks trained from different seeds lie
in one basin up to the order of their units; Ainsworth et al. 2022 (Git Re-Basin, arXiv 2209.04836)
gave the algorithms. With A the reference, P the permutations and ⟨·, ·⟩ the sum over all weights:

    weight matching        max over P of ⟨A, P(B)⟩, which is min of ‖A − P(B)‖²
    activation matching    max over P of the sum over units of corr(a_i, b_P(i))

The first is solved space by space: with all other spaces' orders held, the best order of one is a
linear assignment problem. Wang et al. 2020 (FedMA, arXiv 2002.06440) go through the layers once
instead, and match units by the weights that produce them.

The heads of an attention are exchanged whole: of two heads the best orders of their units are found
first, and what these gain says which head goes where.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from medmerge_jax.merging.averages import weighted_average
from medmerge_jax.merging.permutations import (
    Permutations,
    compose_permutations,
    identity_permutations,
    invert_permutations,
    of_heads,
    permute_variables,
)
from medmerge_jax.merging.spaces import (
    Place,
    Space,
    Tree,
    exchanged_together,
    find_spaces,
    refuse_heads,
)
from medmerge_jax.merging.trees import (
    check_choice,
    check_shares,
    check_variables,
    flatten_parents,
)

# Parameters by their path in the variables, as NumPy arrays in what they are computed in.
_Model = dict[str, np.ndarray]

STARTS = ("forward", "identity")

# No search has come near this number; it ends one that would go round in circles.
_MAX_ROUNDS = 100


def weight_matching(
    reference: Tree,
    variables: Tree,
    *,
    seed: int = 0,
    spaces: Sequence[Space] | None = None,
    start: str = "forward",
    tolerance: float = 1e-12,
    max_sweeps: int = _MAX_ROUNDS,
) -> Permutations:
    """Permutations of a model that bring its weights nearest to those of a reference.

    Coordinate ascent on ⟨A, P(B)⟩ (Ainsworth et al. 2022, algorithm 1): spaces in random order,
    for each the linear assignment problem on Σ W_A W_Bᵀ over all places of its units, the other
    axes of W_B being permuted as found so far; until no space gains. What it finds is a local
    optimum.

    As published it starts from the orders as given. Here a *forward sweep* goes first: spaces in
    network order, each matched on those places alone whose other axes are already matched, or
    are no hidden units; all others say nothing yet. A planted permutation is then recovered
    exactly by construction, as long as no two units are made by the same weights. From the
    orders as given it is not bound to be, though it was whenever it was tried; of two independent
    models the forward sweep found somewhat better optima, in less time (`benchmarks/README.md`).

    Only "params" are matched; `permute_variables` then carries running statistics along. The head
    is matched like any other array, which makes sense for two models of the same classes: leave
    it out of both trees otherwise, the permutations are those of the trees with heads too.

    Args:
      reference: `{"params": ..., ...}`, whose order of units is kept.
      variables: `{"params": ..., ...}` of the same architecture.
      seed: Of the order in which spaces are visited.
      spaces: Of these trees; found if they are not given.
      start: "forward", or "identity" as published.
      tolerance: A space's order is changed if that adds more than this to ⟨A, P(B)⟩.
      max_sweeps: Ends the ascent also where spaces still gain.

    Returns:
      For `permute_variables(variables, ...)`; the identity if the models are identical.

    Raises:
      ValueError: Paths or shapes of the parameters differ, one is not a floating-point array or
        holds NaN, the architecture is not known, or `start` is neither of the two.
    """
    check_choice("start", start, STARTS)
    parents = _parameters([reference, variables])
    spaces = find_spaces(reference) if spaces is None else spaces
    matching = _Matching(spaces, *parents)
    if start == "forward":
        matching.forward_sweep()
    matching.ascend(np.random.default_rng(seed), tolerance, max_sweeps)
    return matching.permutations


def activation_matching(
    correlations: Mapping[str, np.ndarray], spaces: Sequence[Space] | None = None
) -> Permutations:
    """Permutations of a model that make its activations agree best with those of a reference.

    Args:
      correlations: By the names of spaces, (size, size): Pearson correlation of each of the
        reference's units with each of the model's. 0 for units that are constant.
      spaces: Of the models. They are wanted where units lie in heads.

    Returns:
      Per space the order with the largest sum of correlations, of an attention over its spaces; the
      order as it is if no other has a larger sum.

    Raises:
      ValueError: A matrix is not square, or holds NaN; or spaces have none.
    """
    if spaces is None:
        spaces = [Space(name, len(matrix), (), ()) for name, matrix in correlations.items()]
    permutations: Permutations = {}
    for group in exchanged_together(spaces):
        gains = [_checked_correlations(space.name, correlations) for space in group]
        orders = _assignments(gains, group[0].heads)
        now = np.concatenate([np.diag(one) for one in gains])
        pairs = zip(gains, orders, strict=True)
        then = np.concatenate([one[np.arange(len(one)), order] for one, order in pairs])
        # Exchanging equal units gains nothing, but seems to by the rounding of correlations.
        if float(np.sum(then - now)) <= 1e-6 * np.abs(now).sum():
            orders = [np.arange(len(one)) for one in gains]
        permutations |= {space.name: order for space, order in zip(group, orders, strict=True)}
    return permutations


def _checked_correlations(name: str, correlations: Mapping[str, np.ndarray]) -> np.ndarray:
    if name not in correlations:
        raise ValueError(f"correlations of {name} are absent")
    gains = np.asarray(correlations[name], np.float64)
    if gains.ndim != 2 or gains.shape[0] != gains.shape[1]:
        raise ValueError(
            f"correlations of {name}: shape {gains.shape}; (size, size), the reference's "
            "units by the model's, is wanted"
        )
    if not np.isfinite(gains).all():
        raise ValueError(
            f"correlations of {name} hold NaN or infinity; a constant unit's are to be 0"
        )
    return gains


def align_to_mean(
    parents: Sequence[Tree],
    seed: int = 0,
    *,
    spaces: Sequence[Space] | None = None,
    tolerance: float = 1e-12,
) -> list[Permutations]:
    """Permutations of n models that bring all of them near each other.

    Ainsworth et al. 2022, algorithm 3 ("MergeMany"): each model in turn, in random order, is
    matched to the mean of all others by weight matching, until nothing changes. It starts from
    each model matched to the mean of those before it, where the published one starts from the
    orders as given, whose mean says little.

    Args:
      parents: n ≥ 1 of `{"params": ..., ...}`.
      seed: Of the orders in which models and spaces are visited.
      spaces: Of these trees; found if they are not given.
      tolerance: As for `weight_matching`.

    Returns:
      Permutations of each; those of the first parent are the identity, so that the mean has its
      order of units.

    Raises:
      ValueError: As for `weight_matching`.
    """
    models = _parameters(parents)
    spaces = find_spaces(parents[0]) if spaces is None else spaces
    rng = np.random.default_rng(seed)
    orders = [identity_permutations(spaces) for _ in models]
    swept = {0}

    def improve(i: int, others: Sequence[int]) -> bool:
        matching = _Matching(spaces, _mean([models[j] for j in others]), models[i])
        if i not in swept:
            matching.forward_sweep()
            swept.add(i)
        changed = matching.ascend(rng, tolerance, _MAX_ROUNDS)
        orders[i] = compose_permutations(orders[i], matching.permutations)
        models[i] = matching.model
        return changed

    _in_turn(len(models), improve, rng.permutation)
    back = invert_permutations(orders[0])
    return [compose_permutations(permutations, back) for permutations in orders]


def matched_averaging(
    parents: Sequence[Tree],
    weights: Sequence[float] | None = None,
    *,
    spaces: Sequence[Space] | None = None,
) -> dict[Any, Any]:
    """The average of n models that are matched layer by layer, FedMA-style.

    Wang et al. 2020: spaces in network order; the units of each are matched by what *produces*
    them, the kernels into them, whose inputs are in the matched order already, with their batch
    norm's scale and bias; then the next. Units of all models are matched to the average of the
    models before, and then each model's to the average of the others' until nothing changes. A
    residual stream is matched by what comes first: the kernels into it whose inputs are not
    matched yet do not count.

    Unlike FedMA, the number of units stays (theirs may grow, by a Bayesian nonparametric model),
    and nothing is trained between the layers. It takes units one by one: none may lie in heads.

    Args:
      parents: n ≥ 1 of `{"params": ..., ...}`, with equal heads or none.
      weights: (n,), not negative, with sum 1; 1/n each if not given.
      spaces: Of these trees; found if they are not given.

    Returns:
      A tree like the parents', in the order of units of the first; all collections averaged, in
      at least float32, and returned in the parents' dtype.

    Raises:
      ValueError: As for `weight_matching`, for all collections; or the weights do not fit, or units
        lie in heads.
    """
    weighted_average([{}] * len(parents), weights)  # before the long part, to refuse what is wrong
    if weights is not None:
        check_shares(weights, len(parents))
    shares = [1.0] * len(parents) if weights is None else [float(weight) for weight in weights]
    models = [_copied(model) for model in _parameters(parents)]
    spaces = find_spaces(parents[0]) if spaces is None else spaces
    refuse_heads(spaces)
    orders: list[Permutations] = [{} for _ in models]
    matched: set[str] = set()
    for space, places in zip(spaces, _matched_places(spaces), strict=True):
        producers = [p for p, others in places if p.role != "in" and others <= matched]
        of_space = _match_jointly(producers, models, shares)
        for permutations, model, order in zip(orders, models, of_space, strict=True):
            permutations[space.name] = order
            _reorder(model, [place for place, _ in places], order)
        matched.add(space.name)
    aligned = [
        permute_variables(parent, permutations, spaces)
        for parent, permutations in zip(parents, orders, strict=True)
    ]
    return weighted_average(aligned, weights)


class _Matching:
    """A model in the course of being matched to a reference, in the orders found so far."""

    def __init__(self, spaces: Sequence[Space], reference: _Model, model: _Model) -> None:
        self.model = _copied(model)
        self.permutations = identity_permutations(spaces)
        self._reference = reference
        self._groups = exchanged_together(spaces)
        names = [space.name for space in spaces]
        self._places = dict(zip(names, _matched_places(spaces), strict=True))
        self._group_of = {space.name: i for i, group in enumerate(self._groups) for space in group}
        # Products at a place, kept while nothing on the other axes of its array moves.
        self._products: dict[Place, np.ndarray] = {}
        self._at: dict[str, list[Place]] = {}
        for places in self._places.values():
            for place, _ in places:
                self._at.setdefault(place.path, []).append(place)

    def forward_sweep(self) -> None:
        """Spaces in network order, by the places whose other axes are in their final order."""
        matched: set[str] = set()
        for group in self._groups:
            self._improve(group, lambda others: others <= matched)
            matched.update(space.name for space in group)

    def ascend(self, rng: np.random.Generator, tolerance: float, max_sweeps: int) -> bool:
        """Spaces in random order, by all places, until none gains. Whether any has gained."""
        changed, waiting = False, set(range(len(self._groups)))
        for _ in range(max_sweeps):
            for index in rng.permutation(len(self._groups)).tolist():
                if index not in waiting:
                    continue
                # Its best order depends on its neighbours' alone: no need to look at it again
                # before one of them changes.
                waiting.remove(index)
                group = self._groups[index]
                if self._improve(group, lambda others: True, tolerance):
                    neighbours = [self._places[space.name] for space in group]
                    names = (
                        name for places in neighbours for _, others in places for name in others
                    )
                    waiting.update(self._group_of[name] for name in names)
                    changed = True
            if not waiting:
                break
        return changed

    def _improve(
        self,
        group: Sequence[Space],
        counts: Callable[[frozenset[str]], bool],
        tolerance: float = 0.0,
    ) -> bool:
        """Gives one group of spaces its best orders. Whether those are new ones.

        A place counts by the spaces on the other axes of its array.
        """
        all_places = [[place for place, _ in self._places[space.name]] for space in group]
        by_some = [[p for p, o in self._places[space.name] if counts(o)] for space in group]
        orders = _better_orders(
            *(by_some, self._reference, self.model, group[0].heads, tolerance, self._products)
        )
        if orders is None:
            return False
        for space, places, order in zip(group, all_places, orders, strict=True):
            self._reorder(space.name, places, order)
        return True

    def _reorder(self, name: str, places: Sequence[Place], order: np.ndarray) -> None:
        _reorder(self.model, places, order)
        self.permutations[name] = self.permutations[name][order]
        for place in places:
            if place in self._products:
                self._products[place] = self._products[place][:, order]
            for other in self._at[place.path]:
                if other.axis != place.axis:
                    self._products.pop(other, None)


def _match_jointly(
    places: Sequence[Place], models: Sequence[_Model], shares: Sequence[float]
) -> list[np.ndarray]:
    """Orders of n models' units of one space by some of its places; the first one's stays."""
    paths = dict.fromkeys(place.path for place in places)
    models = [{path: np.array(model[path]) for path in paths} for model in models]
    orders = [np.arange(len(places[0].positions)) for _ in models]

    def improve(i: int, others: Sequence[int]) -> bool:
        # Not divided by the sum of the shares, which changes no order.
        average = {path: _sum([shares[j] * models[j][path] for j in others]) for path in paths}
        better = _better_orders([places], average, models[i])
        if better is None:
            return False
        _reorder(models[i], places, better[0])
        orders[i] = orders[i][better[0]]
        return True

    _in_turn(len(models), improve, range)
    back = np.argsort(orders[0])
    return [order[back] for order in orders]


def _in_turn(
    n: int, improve: Callable[[int, Sequence[int]], bool], order: Callable[[int], Iterable[int]]
) -> None:
    """Matches each of n models to those before it, and then to all others until none changes.

    `improve(i, others)` matches one and says whether it has changed; `order(n)` is that of a round.
    """
    for i in range(1, n):
        improve(i, range(i))
    # Two models that are matched to each other are matched to the mean of the others already.
    for _ in range(_MAX_ROUNDS if n > 2 else 0):
        changed = [improve(i, [j for j in range(n) if j != i]) for i in order(n)]
        if not any(changed):
            break


def _better_orders(
    places: Sequence[Sequence[Place]],
    reference: _Model,
    model: _Model,
    heads: int = 1,
    tolerance: float = 0.0,
    products: dict[Place, np.ndarray] | None = None,
) -> list[np.ndarray] | None:
    """The orders of the model's units that agree best with the reference's, if better than now.

    Those of one space, or of several whose heads are exchanged together, each by its places. Better
    is what adds more than `tolerance` to the inner product at the given places. What `products`
    lacks of those of single places is added to it.
    """
    if not all(places):
        return None
    products = {} if products is None else products
    gains = [_products_sum(of_space, reference, model, products) for of_space in places]
    orders = _assignments(gains, heads)
    pairs = zip(places, orders, strict=True)
    gain = sum(_gain(of_space, reference, model, order) for of_space, order in pairs)
    return orders if gain > tolerance else None


def _products_sum(
    places: Sequence[Place],
    reference: _Model,
    model: _Model,
    products: dict[Place, np.ndarray],
) -> np.ndarray:
    """(size, size): inner products of the reference's units with the model's, over all places."""
    total = np.zeros((len(places[0].positions),) * 2)
    vectors = [place for place in places if model[place.path].ndim == 1]
    for place in places:
        if model[place.path].ndim > 1:
            if place not in products:
                products[place] = _product(place, reference[place.path], model[place.path])
            total += products[place]
    if vectors:
        a, b = (np.stack([x[v.path][v.positions] for v in vectors]) for x in (reference, model))
        total += a.T @ b
    return total


def _assignments(gains: Sequence[np.ndarray], heads: int) -> list[np.ndarray]:
    """For each row of each matrix its column, with the largest sum of the numbers there.

    The units of all matrices lie in so many heads, which are exchanged in all of them alike. That
    is solved exactly: what two heads gain together is the sum over their units' best orders.
    """
    if heads == 1:
        return [_assignment(matrix) for matrix in gains]
    within, between = zip(*(_orders_within(matrix, heads) for matrix in gains), strict=True)
    heads_order = _assignment(_sum(between))
    return [of_heads(heads_order, orders[np.arange(heads), heads_order]) for orders in within]


def _orders_within(matrix: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """For each head of the rows with each of the columns: the order of units, and what it gains."""
    size = len(matrix) // heads
    blocks = matrix.reshape(heads, size, heads, size).transpose(0, 2, 1, 3)
    orders = np.array([[_assignment(block) for block in row] for row in blocks])
    return orders, np.take_along_axis(blocks, orders[..., None], axis=3).sum(axis=(2, 3))


def _assignment(gains: np.ndarray) -> np.ndarray:
    """For each row its column, with the largest sum of the numbers there."""
    from scipy.optimize import linear_sum_assignment  # it takes longer than the rest of the room

    return linear_sum_assignment(gains, maximize=True)[1]


def _product(place: Place, reference: np.ndarray, model: np.ndarray) -> np.ndarray:
    """(size, size): the inner products of the reference's units with the model's at a place.

    The place is on one of the last two axes.
    """
    units, last = _span(place.positions), place.axis == reference.ndim - 1
    if last:
        a, b = (x.reshape(-1, x.shape[-1])[:, units] for x in (reference, model))
        return a.T @ b
    # A product for each place in the window, not one of transposed copies.
    pairs = zip(*(x.reshape(-1, *x.shape[-2:])[:, units] for x in (reference, model)), strict=True)
    return _sum([a @ b.T for a, b in pairs])


def _gain(places: Sequence[Place], reference: _Model, model: _Model, order: np.ndarray) -> float:
    """What an order adds to the inner product of the reference and the model.

    In float64 and from differences, unlike `_product`: exchanging two equal units must have a
    gain of exactly zero, or the ascent would do so without end.
    """
    moved = np.flatnonzero(order != np.arange(len(order)))
    total = 0.0
    for place in places:
        path, axis = place.path, place.axis
        now, then = place.positions[moved], place.positions[order[moved]]
        a = np.take(reference[path], now, axis).astype(np.float64)
        b = np.take(model[path], then, axis).astype(np.float64)
        b -= np.take(model[path], now, axis)
        total += float(np.vdot(a, b))
    return total


def _reorder(model: _Model, places: Sequence[Place], order: np.ndarray) -> None:
    """Puts a space's units in another order at the given places, in place."""
    for place in places:
        array = model[place.path]
        units = (slice(None),) * place.axis + (_span(place.positions),)
        array[units] = np.take(array, place.positions[order], place.axis)


def _span(positions: np.ndarray) -> Any:
    """Positions as a slice if they are contiguous: a view, where an index would copy."""
    start, size = int(positions[0]), len(positions)
    if np.array_equal(positions, np.arange(start, start + size)):
        return slice(start, start + size)
    return positions


def _matched_places(spaces: Sequence[Space]) -> list[list[tuple[Place, frozenset[str]]]]:
    """For each space its places in "params", with the spaces on the other axes of the array."""
    axes: dict[str, dict[int, set[str]]] = {}
    for space in spaces:
        for place in space.places:
            axes.setdefault(place.path, {}).setdefault(place.axis, set()).add(space.name)

    def others(place: Place) -> frozenset[str]:
        by_axis = axes[place.path].items()
        return frozenset().union(*(names for axis, names in by_axis if axis != place.axis))

    return [
        [(place, others(place)) for place in space.places if place.path.startswith("params/")]
        for space in spaces
    ]


def _parameters(parents: Sequence[Tree]) -> list[_Model]:
    """The parents' parameters, checked."""
    check_variables(parents)
    flats = flatten_parents([{"params": parent["params"]} for parent in parents])
    # Not by JAX's promotion, which warns of float64 arrays from NumPy.
    dtypes = {
        path: np.float64 if any(flat[path].dtype == np.float64 for flat in flats) else np.float32
        for path in flats[0]
    }
    return [{path: np.asarray(flat[path], dtypes[path]) for path in dtypes} for flat in flats]


def _copied(model: _Model) -> _Model:
    return {path: np.array(array) for path, array in model.items()}


def _mean(models: Sequence[_Model]) -> _Model:
    return {path: _sum([model[path] for model in models]) / len(models) for path in models[0]}


def _sum(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return functools.reduce(np.add, arrays)
