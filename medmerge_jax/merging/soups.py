"""Model soups: averages of many models that were fine-tuned from one start.

Uniform, greedy and learned soups are Wortsman et al. 2022's, "Model soups: averaging weights of
multiple fine-tuned models improves accuracy without increasing inference time" (arXiv 2203.05482);
hierarchical ones Sanjeev et al. 2024's, "FissionFusion" (arXiv 2403.13341).

*Ingredients* are trees of one architecture, `{"params": ..., "batch_stats": ...}` or any part of
it. There may be hundreds, in files: a leaf may be any array with a shape and a dtype that NumPy can
ask for, by `__array__`, such as a dataset of h5py or what `weights.open_parent` gives. It is read
whenever it is averaged and not kept, so that a soup takes the memory of one model and one leaf.
Everything is averaged, running statistics too, as the papers' code does; better ones come from
recalibration, for which greedy and hierarchical soups take `finish`. A *score* is computed on
held-out data, the higher the better.
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
    """The mean of all ingredients, each read once.

    Args:
      ingredients: At least one.

    Returns:
      A tree like the first, summed in float64, in the ingredients' dtype.

    Raises:
      ValueError: No ingredient; paths or shapes that differ; a leaf that is no floating-point array
        or holds NaN or infinity.
    """
    return _computed(_mean(_named(ingredients)))


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
      ingredients: At least one. Whenever one is tried, those in the soup are read again: no sum is
        held while an average is scored.
      score: `score(variables)`, a number. A soup of score NaN is not better.
      scores: Of the single ingredients, where they are known already.
      finish: Applied to every average before it is scored and to the one returned, for example
        `recalibrate`. What is averaged are ingredients as they are.

    Raises:
      ValueError: As for `uniform_soup`; scores that are too many, too few or NaN.
    """
    return _greedy(_named(ingredients), score, scores, finish)


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
    forms = {}
    for name, tree in _named(ingredients).items():
        flat = flatten(tree)
        check_finite(flat, name)
        forms[name] = {path: _form([leaf]) for path, leaf in flat.items()}
    if not forms:
        raise ValueError("0 ingredients; one or more are wanted")
    check_parents(list(forms.values()), names=list(forms))
    of_all = {
        path: _form([one[path] for one in forms.values()]) for path in next(iter(forms.values()))
    }
    keys = {path: path if granularity == "tensor" else "" for path in of_all}
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
            for path, product in _inner(gradient, _arrays(ingredients[index]), soup).items():
                slopes[f"/{keys[path]}"][index] += shares[path][index] * float(product)
        for name, slope in slopes.items():  # Adam (Kingma & Ba 2015) with the usual β₁, β₂, ε
            means[name] = 0.9 * means[name] + 0.1 * slope
            squares[name] = 0.999 * squares[name] + 0.001 * slope**2
            mean = means[name] / (1 - 0.9 ** (step + 1))
            root = np.sqrt(squares[name] / (1 - 0.999 ** (step + 1)))
            raw[name] = raw[name] - learning_rate * mean / (root + 1e-8)
    shares = {path: _softmax(raw[f"/{key}"]) for path, key in keys.items()}
    soup = flatten(_mix(ingredients, shares))
    leaves = {path: soup[path].astype(form.dtype) for path, form in of_all.items()}
    variables = nest_like(leaves, ingredients[0])
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

    soups = {
        f"group {index}": _mean(
            {f"ingredient {one} of group {index}": groups[index][one] for one in members[index]}
        )
        for index in range(len(groups))
    }
    result = _greedy(soups, score, group_scores, finish)
    chosen = {group: members[group] for group in result.chosen}
    return HierarchicalSoup(result.variables, chosen, result.score)


def _greedy(
    ingredients: Mapping[str, Tree],
    score: Score,
    scores: Sequence[float] | None,
    finish: Finish | None,
) -> GreedySoup:
    """`greedy_soup` of ingredients by name."""
    names = list(ingredients)

    def average(indices: Iterable[int]) -> dict[Any, Any]:
        mean = _computed(_mean({names[index]: ingredients[names[index]] for index in indices}))
        return finish(mean) if finish else mean

    if scores is None:
        scores = [float(score(average([index]))) for index in range(len(names))]
    if len(scores) != len(names):
        raise ValueError(f"{len(scores)} scores for {len(names)} ingredients")
    for name, single in zip(names, scores, strict=True):
        if math.isnan(single):
            raise ValueError(f"the score of {name} is NaN; a number is wanted")
    if not names:
        raise ValueError("0 ingredients; one or more are wanted")
    first, *others = sorted(range(len(names)), key=lambda index: -scores[index])
    chosen, best = [first], float(scores[first])
    for index in others:
        with_this = float(score(average([*chosen, index])))
        if with_this > best:
            chosen, best = [*chosen, index], with_this
    return GreedySoup(average(chosen), tuple(chosen), best)


def _named(ingredients: Sequence[Tree]) -> dict[str, Tree]:
    """By what they are called in messages."""
    return {f"ingredient {index}": ingredients[index] for index in range(len(ingredients))}


class _Mean:
    """The mean of arrays of one shape, which is a leaf itself: computed when NumPy asks for it.

    In float64, which is exact enough for any number of arrays, and for identical ones.
    """

    def __init__(self, path: str, leaves: Mapping[str, Any]) -> None:
        form = _form(list(leaves.values()))
        self.shape, self.dtype = form.shape, form.dtype
        self._path, self._leaves = path, leaves

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        total: np.ndarray = np.zeros(self.shape)
        for name, leaf in self._leaves.items():
            array = np.asarray(leaf, np.float64)
            check_finite({self._path: array}, name)
            total += array
        return np.asarray(total / len(self._leaves), dtype or self.dtype)


def _mean(ingredients: Mapping[str, Tree]) -> dict[Any, Any]:
    """A tree like the first, of `_Mean`s."""
    if not ingredients:
        raise ValueError("0 ingredients; one or more are wanted")
    flats = {name: flatten(tree) for name, tree in ingredients.items()}
    check_parents(list(flats.values()), names=list(flats))
    like = next(iter(ingredients.values()))
    means = {
        path: _Mean(path, {name: flat[path] for name, flat in flats.items()})
        for path in flatten(like)
    }
    return nest_like(means, like)


def _computed(mean: dict[Any, Any]) -> dict[Any, Any]:
    """The tree with JAX's arrays."""
    # Copied: of an array that it shares with NumPy, JAX lets go in its next call only.
    leaves = {
        path: jax.device_put(np.asarray(leaf), may_alias=False)
        for path, leaf in flatten(mean).items()
    }
    return nest_like(leaves, mean)


def _form(leaves: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """The shape of them, and the dtype of their average."""
    dtype = functools.reduce(jnp.promote_types, [leaf.dtype for leaf in leaves])
    return jax.ShapeDtypeStruct(np.shape(leaves[0]), dtype)


def _mix(ingredients: Sequence[Tree], shares: Mapping[str, np.ndarray]) -> dict[Any, Any]:
    """Σᵢ αᵢ θᵢ in at least float32, nested as the first."""
    soup: dict[Any, Any] | None = None
    for index in range(len(ingredients)):
        ours = {path: share[index] for path, share in shares.items()}
        # Waited for, so that ingredients are let go of one by one.
        soup = jax.block_until_ready(_add_share(soup, _arrays(ingredients[index]), ours))
    if soup is None:
        raise ValueError("0 ingredients; one or more are wanted")
    return soup


def _arrays(tree: Tree) -> dict[Any, Any]:
    """The tree with arrays that JAX takes."""
    kinds = (np.ndarray, jax.Array)
    leaves = {p: x if isinstance(x, kinds) else np.asarray(x) for p, x in flatten(tree).items()}
    return nest_like(leaves, tree)


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
