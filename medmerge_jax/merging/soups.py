"""Model soups: averages of many models that were fine-tuned from one start.

Uniform, greedy and learned soups are Wortsman et al. 2022's, "Model soups: averaging weights of
multiple fine-tuned models improves accuracy without increasing inference time" (arXiv 2203.05482);
hierarchical ones Sanjeev et al. 2024's, "FissionFusion" (arXiv 2403.13341).

*Ingredients* are trees of one architecture, `{"params": ..., "batch_stats": ...}` or any part of
it. There may be hundreds: a soup asks for them one at a time, by `ingredients[i]`, which may read a
file, and holds no more than one beside its running sum and the average to be scored. Everything is
averaged, running statistics too, as the papers' code does; better ones come from recalibration,
for which greedy and hierarchical soups take `finish`. A *score* is computed on held-out data, the
higher the better.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax.merging.trees import (
    at_least_float32,
    check_choice,
    check_finite,
    check_parents,
    flatten,
    nest_like,
)

Tree = Mapping[Any, Any]
Score = Callable[[dict[Any, Any]], Any]
Finish = Callable[[dict[Any, Any]], dict[Any, Any]]


class GreedySoup(NamedTuple):
    """What `greedy_soup` returns.

    Attributes:
      variables: The soup.
      chosen: Indices of the ingredients in it, in the order in which they were added.
      score: Of the soup.
    """

    variables: dict[Any, Any]
    chosen: tuple[int, ...]
    score: float


class LearnedSoup(NamedTuple):
    """What `learned_soup` returns.

    Attributes:
      variables: The soup.
      coefficients: By path, (n,) of each ingredient's share in that array, float64; sums to 1.
      beta: The factor of the logits, which is not part of the soup.
      losses: Before each step, (steps,).
    """

    variables: dict[Any, Any]
    coefficients: dict[str, np.ndarray]
    beta: float
    losses: np.ndarray


class HierarchicalSoup(NamedTuple):
    """What `hierarchical_soup` returns.

    Attributes:
      variables: The soup.
      members: Indices inside its group of each group's ingredients, for the groups in the soup, in
        the order in which they were added.
      score: Of the soup.
    """

    variables: dict[Any, Any]
    members: dict[int, tuple[int, ...]]
    score: float


def uniform_soup(ingredients: Sequence[Tree]) -> dict[Any, Any]:
    """The mean of all ingredients, read once, one at a time.

    Args:
      ingredients: At least one.

    Returns:
      A tree like the first, summed in float64, in the ingredients' dtype.

    Raises:
      ValueError: No ingredient; paths or shapes that differ; a leaf that is no floating-point array
        or holds NaN or infinity.
    """
    return _mean_of(ingredients.__getitem__, range(len(ingredients)))


def greedy_soup(
    ingredients: Sequence[Tree],
    score: Score,
    scores: Sequence[float] | None = None,
    *,
    finish: Finish | None = None,
) -> GreedySoup:
    """The best ingredient and, from the second best on, each that makes the average better.

    Ingredients are taken once, by falling score, the earlier one first among equals. One stays in
    the soup if the mean of all in it and this one is strictly better. So the soup is never worse
    on the held-out data than the best ingredient.

    Args:
      ingredients: At least one; each is read up to three times, once less if `scores` are given.
      score: `score(variables)`, a number. A soup of score NaN is not better.
      scores: Of the single ingredients, where they are known already.
      finish: Applied to every average before it is scored and to the one returned, for example
        `recalibrate`. What is averaged are ingredients as they are.

    Raises:
      ValueError: As for `uniform_soup`; scores that are too many, too few or NaN.
    """
    return _greedy(ingredients.__getitem__, len(ingredients), score, scores, finish)


def learned_soup(
    ingredients: Sequence[Tree],
    loss: Callable[[Any, Any, Any], Any],
    batches: Iterable[Any],
    *,
    learning_rate: float = 0.05,
    granularity: str = "tensor",
) -> LearnedSoup:
    """Σᵢ αᵢ θᵢ with α, one for each ingredient and array, trained on held-out data.

    α is the softmax over ingredients of free numbers that start at zero, at the uniform soup. They
    and β, a factor of the logits that starts at 1, are trained by Adam, as in the paper's appendix
    and its code (AdamW without weight decay, learning rate 0.05, 5 epochs).

    The gradient for α needs no more than one ingredient in memory: with G the gradient for the
    soup, that for the number behind αᵢ is αᵢ ⟨G, θᵢ - Σⱼ αⱼ θⱼ⟩. So every ingredient is read twice
    for each step; where all fit into memory, hand over a list of them.

    Args:
      ingredients: At least one.
      loss: `loss(variables, beta, batch)`, a scalar, differentiable by JAX: of the logits times
        `beta`, in evaluation mode. It is compiled anew in every call.
      batches: Of held-out data, one step each: repeat them for more epochs.
      learning_rate: Of Adam.
      granularity: "tensor", one α for each array; "model", one for all arrays together.

    Raises:
      ValueError: As for `uniform_soup`; or a loss that is not finite, or a granularity not above.
    """
    check_choice("granularity", granularity, ("tensor", "model"))
    checked = _Sum()
    for index in range(len(ingredients)):
        checked.flatten(ingredients[index], f"ingredient {index}")
    keys = {path: path if granularity == "tensor" else "" for path in checked.dtypes}
    raw = {"beta": np.ones(1), **{f"/{key}": np.zeros(len(ingredients)) for key in keys.values()}}
    means: dict[str, Any] = dict.fromkeys(raw, 0.0)
    squares = means.copy()
    differentiate = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    losses: list[float] = []
    for step, batch in enumerate(batches):
        shares = {path: _softmax(raw[f"/{key}"]) for path, key in keys.items()}
        soup = _mix(ingredients, shares)
        beta = jnp.asarray(raw["beta"][0], jnp.float32)
        value, (gradient, gradient_beta) = differentiate(soup, beta, batch)
        losses.append(float(value))
        if not math.isfinite(losses[-1]):
            raise ValueError(
                f"the loss in step {step} is {losses[-1]}; a smaller learning rate may help"
            )
        slopes = {name: np.zeros_like(numbers) for name, numbers in raw.items()}
        slopes["beta"][0] = float(gradient_beta)
        for index in range(len(ingredients)):
            for path, product in _inner(gradient, ingredients[index], soup).items():
                slopes[f"/{keys[path]}"][index] += shares[path][index] * float(product)
        for name, slope in slopes.items():  # Adam (Kingma & Ba 2015) with the usual β₁, β₂, ε
            means[name] = 0.9 * means[name] + 0.1 * slope
            squares[name] = 0.999 * squares[name] + 0.001 * slope**2
            mean = means[name] / (1 - 0.9 ** (step + 1))
            root = np.sqrt(squares[name] / (1 - 0.999 ** (step + 1)))
            raw[name] = raw[name] - learning_rate * mean / (root + 1e-8)
    shares = {path: _softmax(raw[f"/{key}"]) for path, key in keys.items()}
    variables = checked.cast(flatten(_mix(ingredients, shares)))
    return LearnedSoup(variables, shares, float(raw["beta"][0]), np.array(losses))


def hierarchical_soup(
    groups: Sequence[Sequence[Tree]],
    score: Score,
    level: str = "GoG",
    scores: Sequence[Sequence[float]] | None = None,
    *,
    finish: Finish | None = None,
) -> HierarchicalSoup:
    """A greedy soup over groups' soups.

    FissionFusion groups by learning rate. "GoU" is the greedy soup of the groups' uniform soups,
    "GoG" of their greedy soups. A group's soup counts as one, whatever the number of ingredients
    in it, and is averaged anew from them whenever it is needed, instead of being kept.

    Args:
      groups: At least one, each of at least one ingredient.
      score: As for `greedy_soup`.
      level: "GoU" or "GoG".
      scores: By group, of the single ingredients, where they are known. "GoU" needs none.
      finish: As for `greedy_soup`; groups' soups are averaged as they are too.

    Raises:
      ValueError: As for `greedy_soup`; no group, an empty one, or another level.
    """
    check_choice("level", level, ("GoU", "GoG"))
    if not len(groups):
        raise ValueError("0 groups; one or more are wanted")
    for index, group in enumerate(groups):
        if not len(group):
            raise ValueError(f"group {index} is empty")
    if scores is not None and len(scores) != len(groups):
        raise ValueError(f"scores of {len(scores)} groups for {len(groups)} groups")
    members = [tuple(range(len(group))) for group in groups]
    group_scores: list[float] | None = None
    if level == "GoG":
        group_scores = []
        for index, group in enumerate(groups):
            singles = None if scores is None else scores[index]
            try:
                soup = greedy_soup(group, score, singles, finish=finish)
            except ValueError as error:
                raise ValueError(f"group {index}: {error}") from error
            members[index] = soup.chosen
            group_scores.append(soup.score)

    def uniform(index: int) -> Tree:
        return _mean_of(groups[index].__getitem__, members[index], f" of group {index}")

    result = _greedy(uniform, len(groups), score, group_scores, finish)
    chosen = {group: members[group] for group in result.chosen}
    return HierarchicalSoup(result.variables, chosen, result.score)


def _greedy(
    read: Callable[[int], Tree],
    count: int,
    score: Score,
    scores: Sequence[float] | None,
    finish: Finish | None,
) -> GreedySoup:
    """`greedy_soup` of `count` ingredients, each read when it is wanted."""
    finish = finish or (lambda variables: variables)
    if scores is None:
        scores = [float(score(finish(_mean_of(read, [index])))) for index in range(count)]
    if not count:
        raise ValueError("0 ingredients; one or more are wanted")
    if len(scores) != count:
        raise ValueError(f"{len(scores)} scores for {count} ingredients")
    for index, single in enumerate(scores):
        if math.isnan(single):
            raise ValueError(f"the score of ingredient {index} is NaN; a number is wanted")
    first, *others = sorted(range(count), key=lambda index: -scores[index])
    chosen, best = [first], float(scores[first])
    soup = _Sum()
    soup.add(soup.flatten(read(first), f"ingredient {first}"))
    for index in others:
        # It is read again if it is taken, instead of being held while the average is scored.
        average = soup.mean(soup.flatten(read(index), f"ingredient {index}"))
        with_this = float(score(finish(average)))
        del average
        if with_this > best:
            soup.add(soup.flatten(read(index), f"ingredient {index}"))
            chosen, best = [*chosen, index], with_this
    return GreedySoup(finish(soup.mean()), tuple(chosen), best)


class _Sum:
    """A sum of trees in float64: exact enough for any number of them, and for identical ones."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, Any] = {}
        self._first = ""
        self._shapes: dict[str, jax.ShapeDtypeStruct] = {}
        self._like: dict[Any, Any] = {}
        self.dtypes: dict[str, Any] = {}

    def flatten(self, tree: Tree, name: str) -> dict[str, Any]:
        """Leaves by path, after they are checked against the first tree ever seen."""
        flat = flatten(tree)
        check_parents([self._shapes or flat, flat], names=[self._first or name, name])
        check_finite(flat, name)
        if not self._first:
            self._first, self._like = name, nest_like(dict.fromkeys(flat), tree)
            self._shapes = {p: jax.ShapeDtypeStruct(np.shape(x), x.dtype) for p, x in flat.items()}
        for path, leaf in flat.items():
            self.dtypes[path] = jnp.promote_types(self.dtypes.get(path, leaf.dtype), leaf.dtype)
        return flat

    def add(self, flat: dict[str, Any]) -> None:
        """Adds a tree, and empties `flat`, so that its arrays are let go of one by one."""
        while flat:
            path, leaf = flat.popitem()
            if path in self._sums:
                self._sums[path] += leaf
            else:
                self._sums[path] = np.array(leaf, np.float64)
        self._count += 1

    def mean(self, flat: dict[str, Any] | None = None) -> dict[Any, Any]:
        """The mean of all in the sum, and of `flat` if given, which is emptied as by `add`."""
        count = self._count + (flat is not None)
        if not count:
            raise ValueError("0 ingredients; one or more are wanted")
        means = {}
        for path, total in self._sums.items():
            more = 0.0 if flat is None else np.asarray(flat.pop(path), np.float64)
            mean = (total + more) / count
            # Rounded by NumPy: JAX would hold every wider array until it comes to round it.
            means[path] = jnp.asarray(mean.astype(self.dtypes[path]))
        return nest_like(means, self._like)

    def cast(self, flat: Mapping[str, Any]) -> dict[Any, Any]:
        """Nested like the first tree and in its dtypes."""
        leaves = {path: jnp.asarray(leaf, self.dtypes[path]) for path, leaf in flat.items()}
        return nest_like(leaves, self._like)


def _mean_of(
    read: Callable[[int], Tree], indices: Iterable[int], where: str = ""
) -> dict[Any, Any]:
    total = _Sum()
    for index in indices:
        total.add(total.flatten(read(index), f"ingredient {index}{where}"))
    return total.mean()


def _mix(ingredients: Sequence[Tree], shares: Mapping[str, np.ndarray]) -> dict[Any, Any]:
    """Σᵢ αᵢ θᵢ in at least float32, nested as the first."""
    soup: dict[Any, Any] | None = None
    for index in range(len(ingredients)):
        ours = {path: share[index] for path, share in shares.items()}
        # Waited for, so that ingredients are let go of one by one.
        soup = jax.block_until_ready(_add_share(soup, ingredients[index], ours))
    if soup is None:
        raise ValueError("0 ingredients; one or more are wanted")
    return soup


@functools.partial(jax.jit, donate_argnums=0)
def _add_share(soup: Any, ingredient: Tree, shares: Mapping[str, Any]) -> dict[Any, Any]:
    sums = {} if soup is None else flatten(soup)
    for path, leaf in flatten(ingredient).items():
        leaf = at_least_float32(jnp.asarray(leaf))
        share = jnp.asarray(shares[path], leaf.dtype) * leaf
        sums[path] = sums[path] + share if path in sums else share
    return nest_like(sums, ingredient)


@jax.jit
def _inner(gradient: Tree, ingredient: Tree, soup: Tree) -> dict[str, jax.Array]:
    """⟨G, θᵢ - soup⟩ by path; of the difference, since the products themselves nearly cancel."""
    leaves, slopes = flatten(ingredient), flatten(gradient)
    return {
        path: jnp.sum(slopes[path] * (jnp.asarray(leaves[path]).astype(mixed.dtype) - mixed))
        for path, mixed in flatten(soup).items()
    }


def _softmax(numbers: np.ndarray) -> np.ndarray:
    exponentials = np.exp(numbers - numbers.max())
    return exponentials / exponentials.sum()
