"""Orders of hidden units, and networks with their units in another order.

Permutations are dicts by the names of spaces (see `spaces.find_spaces`), `p[i]` being the unit of
the given model that becomes unit i. Which of them bring two networks near each other, `alignment`
finds.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.merging.spaces import Space, Tree, exchanged_together, find_spaces
from medmerge_jax.merging.trees import array_module, as_jax, flatten, nest_like

Permutations = dict[str, np.ndarray]
# Positions of units on an axis, and their new order.
_Move = tuple[np.ndarray, Any]


def identity_permutations(spaces: Sequence[Space]) -> Permutations:
    """The permutations that leave every unit where it is."""
    return {space.name: np.arange(space.size) for space in spaces}


def random_permutations(spaces: Sequence[Space], seed: int) -> Permutations:
    """A uniformly random order for every space; the same seed and spaces give the same orders."""
    rng = np.random.default_rng(seed)
    permutations: Permutations = {}
    for group in exchanged_together(spaces):
        heads = rng.permutation(group[0].heads) if group[0].heads > 1 else np.arange(1)
        for space in group:
            within = [rng.permutation(space.size // space.heads) for _ in heads]
            permutations[space.name] = of_heads(heads, within)
    return permutations


def of_heads(heads: np.ndarray, within: Iterable[np.ndarray]) -> np.ndarray:
    """The order of all units: head i is head `heads[i]`, its units ordered by `within[i]`."""
    orders = np.stack(list(within))
    return (heads[:, None] * orders.shape[1] + orders).ravel()


def invert_permutations(permutations: Mapping[str, np.ndarray]) -> Permutations:
    """The permutations that undo the given ones."""
    return {name: np.argsort(order) for name, order in permutations.items()}


def compose_permutations(
    first: Mapping[str, np.ndarray], then: Mapping[str, np.ndarray]
) -> Permutations:
    """The permutations that do what `first` does to a model, and `then` to what comes out."""
    return {name: order[then[name]] for name, order in first.items()}


def permute_variables(
    variables: Tree,
    permutations: Mapping[str, Any],
    spaces: Sequence[Space] | None = None,
) -> dict[Any, Any]:
    """The same network with its hidden units in another order.

    It computes the same function, up to the rounding of sums in another order. Running
    statistics and the head's rows go along with the units.

    Args:
      variables: `{"params": ..., "batch_stats": ...}`.
      permutations: Unit i of the result is unit `permutations[name][i]` of `variables`. Spaces
        that are left out keep their order. May be traced by `jax.jit`, as may `variables`.
      spaces: Of these very variables; found if they are not given.

    Returns:
      A tree like `variables`; no number is changed.

    Raises:
      ValueError: An order is not that of a known space's units.
    """
    spaces = find_spaces(variables) if spaces is None else spaces
    _check_permutations(permutations, spaces)
    flat = flatten(variables)
    moves: dict[tuple[str, int], list[_Move]] = {}
    for space in spaces:
        for place in space.places if space.name in permutations else ():
            if place.path not in flat:
                raise ValueError(f"{place.path} is absent, but has units of {space.name}")
            move = (place.positions, permutations[space.name])
            moves.setdefault((place.path, place.axis), []).append(move)
    for (path, axis), at_axis in moves.items():
        flat[path] = _reordered(flat[path], axis, at_axis)
    return nest_like(flat, variables)


def _check_permutations(permutations: Mapping[str, Any], spaces: Sequence[Space]) -> None:
    sizes = {space.name: space.size for space in spaces}
    for name, order in permutations.items():
        if name not in sizes:
            raise ValueError(
                f"this network has no hidden units named {name!r}; it has {', '.join(sizes)}"
            )
        if np.shape(order) != (sizes[name],):
            raise ValueError(
                f"the permutation of {name} has shape {np.shape(order)}; ({sizes[name]},) is wanted"
            )
        if isinstance(order, jax.core.Tracer):
            continue
        if not np.array_equal(np.sort(order), np.arange(sizes[name])):
            raise ValueError(
                f"the permutation of {name} is not an order of the numbers 0 to {sizes[name] - 1}"
            )
    for group in exchanged_together(spaces):
        if group[0].heads > 1:
            _check_heads(permutations, group)


def _check_heads(permutations: Mapping[str, Any], group: Sequence[Space]) -> None:
    """Refuses orders that take heads apart, or exchange others in one space than in the next."""
    first, heads = group[0].name, np.arange(group[0].heads)
    for space in group:
        order = permutations.get(space.name, np.arange(space.size))
        if isinstance(order, jax.core.Tracer):
            return
        of_units = np.asarray(order).reshape(space.heads, -1) // (space.size // space.heads)
        if np.ptp(of_units, axis=1).any():
            raise ValueError(
                f"the permutation of {space.name} takes units of its {space.heads} heads apart"
            )
        if space.name == first:
            heads = of_units[:, 0]
        elif not np.array_equal(heads, of_units[:, 0]):
            raise ValueError(
                f"the permutations of {first} and {space.name} exchange different heads"
            )


def _reordered(leaf: Any, axis: int, moves: Sequence[_Move]) -> Any:
    """The leaf with units of one of its axes in another order; NumPy's stays NumPy's."""
    source: Any = np.arange(np.shape(leaf)[axis])
    if array_module(order for _, order in moves) is jnp:
        source = jnp.asarray(source)
        for positions, order in moves:
            source = source.at[positions].set(jnp.asarray(positions)[order])
    else:
        for positions, order in moves:
            source[positions] = positions[np.asarray(order)]
    module = array_module([leaf, source])
    taken = module.take(module.asarray(leaf), source, axis)
    return as_jax(taken) if isinstance(leaf, jax.Array) else taken
