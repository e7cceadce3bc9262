"""Every merger by its name: `merge("zipit", "resnet50", (vars_a, vars_b), images)`.

What `medmerge_jax.merging` has as separate functions, on the registered architectures, with one
way to give parents, calibration images and options. MedMerge is not among them: its coefficients
are trained, see the recipe `medmerge`.
"""

import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from medmerge_jax import merging
from medmerge_jax.merging.spaces import refuse_heads
from medmerge_jax.merging.trees import (
    check_choice,
    check_finite,
    check_one_each,
    check_parents,
    check_shares,
    check_variables,
    check_weights,
    flatten,
    parent_names,
    without_head,
)
from medmerge_jax.merging.zipit import ALPHA, BETA
from medmerge_jax.models import create_model, get_spec
from medmerge_jax.models.statistics import checked_images, even_batches, recalibrated, repaired
from medmerge_jax.models.taps import collect_moments
from medmerge_jax.registry import Decorator, Registry, summary

Tree = Mapping[Any, Any]
Variables = dict[Any, Any]

HEADS = ("merge", "drop")

FROM_PARENTS = ("ancestor", "multilabel")
"""Options that are a model or a fact of the parents: whoever loads these passes them on, and no
config field or command-line flag of that name is an option's."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What a merger gets beside its options.

    Attributes:
      architecture: Of the parents.
      parents: With their heads, if they have any.
      keep_heads: Whether the merged model shall have a head.
      images: float32 (n, h, w, 3), normalised, or None.
      batch_size: Images at a time, at most.
    """

    architecture: str
    parents: Sequence[Tree]
    keep_heads: bool
    images: np.ndarray | None
    batch_size: int

    def to_merge(self) -> Sequence[Tree]:
        """The parents, without heads if those shall be left out."""
        return self.parents if self.keep_heads else [without_head(one) for one in self.parents]

    def of_ancestor(self, ancestor: Tree) -> Tree:
        """An ancestor: what is new in a head is no difference to one with other classes."""
        return ancestor if self.keep_heads else without_head(ancestor)

    def spaces(self) -> tuple[merging.Space, ...]:
        """The hidden units of what is to be merged."""
        find = get_spec(self.architecture).spaces
        if find is None:
            raise ValueError(unknown_units(self.architecture, "units"))
        return find(self.to_merge()[0])

    def batches(self) -> Iterator[np.ndarray]:
        """The images in order, in batches of nearly one size: a last one of few would vary less."""
        if self.images is None:
            raise ValueError("calibration images are wanted")
        yield from even_batches(self.images, self.batch_size)


@functools.cache
def unknown_units(architecture: str, permutes: str) -> str:
    """Why a merger cannot put units in another order; "" if it can, or does not, see `Merger`."""
    spec = get_spec(architecture)
    if not permutes:
        return ""
    if spec.spaces is None:
        return (
            f"the hidden units of {architecture} are not known, its ModelSpec has no `spaces`; "
            "take a merger that does not permute units"
        )
    if permutes == "units":
        try:
            refuse_heads(spec.spaces(spec.shapes()))
        except ValueError as error:
            return f"{error}; take weight_matching or activation_matching"
    return ""


class Aligned(NamedTuple):
    """What a merger returns that has permuted the parents.

    Attributes:
      variables: Of the merged model.
      parents: Variables of the parents in its order of units, which is what REPAIR compares.
    """

    variables: Variables
    parents: Sequence[Tree]


@dataclasses.dataclass(frozen=True)
class Merger:
    """A method of `merge`.

    Attributes:
      function: Called with a `Task` and the options, its keyword-only arguments. An option named as
        in `FROM_PARENTS` is filled in by those who load the parents.
      needs_images: Whether it looks at activations or gradients.
      needs_heads: Whether every parent must have been trained.
      permutes: What it puts in another order, so that `ModelSpec.spaces` is wanted: "units" one by
        one, also "heads" of transformers, each as a whole; or "", nothing.
      check: Called before there are parents, with stand-ins for them, {"x": a number}, and the
        options. It raises a ValueError if no parents can be merged so.
    """

    function: Callable[..., Variables | Aligned]
    needs_images: bool = False
    needs_heads: bool = False
    permutes: str = ""
    check: Callable[..., object] | None = None


MERGERS: Registry[Merger] = Registry("merger")


merger = Decorator(MERGERS, Merger)
"""Registers a function under its name as a method of `merge`.

The function takes a `Task` and returns variables, or `Aligned` if it permutes the parents. Its
keyword-only arguments are the options: of type float, int (from 0 on), bool or str, or a
`Sequence[float]` with a number for each parent. Fields of the config and command-line flags are
named after them, and the first line of its docstring says what it does. Facts: see `Merger`.
"""


def merge(
    method: str,
    architecture: str,
    parents: Sequence[Tree],
    images: Any = None,
    *,
    heads: str = "merge",
    recalibrate: bool = False,
    repair: bool = False,
    batch_size: int = 32,
    **options: Any,
) -> Variables:
    """Merges n ≥ 1 parents without training.

    Methods, in `list_mergers()`, and their options:

    {mergers}

    Where units are permuted, the result has the order of the first parent's.

    Args:
      method: One of `list_mergers()`.
      architecture: One of `list_models()`.
      parents: `{"params": ..., "batch_stats": ...}` of that architecture. One parent is returned as
        it is, up to rounding, but by `ties` and `dare`, which drop some of what it differs by.
      images: float (num_images, h, w, 3), normalised as `model.apply` wants them, for methods that
        look at activations or gradients and for `recalibrate`; no labels are needed.
      heads: "merge" if all heads are of the same classes, or "drop" them.
      recalibrate: Whether to re-estimate the running statistics of the merged model's batch norms
        on the images, see `merging.recalibrate`. Recommended after every merger.
      repair: Whether to rescale the linear layers of a transformer on the images so that their
        outputs vary as the parents' do, see `merging.repair`.
      batch_size: Of images.
      **options: Of the method.

    Returns:
      Variables of one model, in the parents' dtype.

    Raises:
      ValueError: No such method, architecture or option; parents that are not of the architecture,
        that differ in classes while heads are to be merged, or that hold NaN or integers; images
        that are missing or of another shape. It names the parent and the path.
    """
    entry = _merger(method, options)
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; at least 1 is wanted")
    if why := unknown_units(architecture, entry.permutes):
        raise ValueError(why)
    task = Task(
        architecture,
        _checked_parents(architecture, parents, heads),
        heads == "merge",
        None if images is None else checked_images(images),
        batch_size,
    )
    if task.images is None and (recalibrate or repair or entry.needs_images):
        what = f"the merger {method!r}"
        what = "recalibration" if recalibrate else "REPAIR" if repair else what
        raise ValueError(f"{what} wants images: float (n, h, w, 3), normalised")
    if repair and (why := repair_refusal(method, architecture)):
        raise ValueError(why)
    made = entry.function(task, **options)
    merged, aligned = made if isinstance(made, Aligned) else (made, task.parents)
    if recalibrate:
        merged = recalibrated(architecture, merged, task.batches())
    if repair:
        assert task.images is not None
        weights = options.get("weights")
        merged = repaired(
            architecture, merged, aligned, task.images, weights, batch_size=batch_size
        )
    return merged


def repair_refusal(method: str, architecture: str) -> str:
    """Why what a merger makes cannot be repaired; "" if it can."""
    if "batch_stats" in get_spec(architecture).shapes():
        return f"{architecture} has batch norms: it is not repaired but recalibrated"
    if MERGERS[method].permutes == "units":
        return f"{method} moves units; REPAIR wants them where the parents have theirs"
    return ""


def list_mergers() -> list[str]:
    """Names of all methods of `merge`, simple ones first."""
    return list(MERGERS)


def merger_options(method: str) -> dict[str, Any]:
    """The options of a method and their defaults; `inspect.Parameter.empty` where there is none."""
    parameters = inspect.signature(MERGERS[method].function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(method: str, num_parents: int, options: Mapping[str, Any]) -> None:
    """Raises what `merge` would raise on account of these options, whatever the parents are.

    So that a run is refused before its parents are trained, and not when they are merged. The
    number of parents is that without an ancestor, the options those without `FROM_PARENTS`.

    Raises:
      ValueError: An option is unknown or missing, is not of the type that the merger's signature
        says, is no finite number, or is out of its range; or the method does not merge so many
        parents.
    """
    filled = dict.fromkeys(merger_options(method).keys() & FROM_PARENTS)
    entry = _merger(method, {**filled, **options})
    kinds = typing.get_type_hints(entry.function)
    for name, value in options.items():
        _check_option(name, value, kinds[name])
    if entry.check is not None:
        entry.check([{"x": np.ones(1, np.float32)}] * num_parents, **options)


def _check_option(name: str, value: Any, kind: Any) -> None:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(value) in {str, bool}.intersection(kinds):
        return
    sequence = any(typing.get_origin(one) is Sequence for one in kinds)
    number = bool({int, float}.intersection(kinds))
    if not (sequence if isinstance(value, Sequence) else number):
        what = "a sequence with one number for each parent" if sequence else "one number"
        what = what if sequence or number else kinds[0].__name__
        raise ValueError(f"the option {name!r} is {value!r}; {what} is wanted")
    whole = int in kinds and float not in kinds
    for one in value if isinstance(value, Sequence) else [value]:
        if not _is_number(one) or (whole and not (isinstance(one, int) and one >= 0)):
            what = "a whole number from 0 on, such as 3" if whole else "finite numbers"
            raise ValueError(f"the option {name!r} is {value!r}; wanted: {what}")


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and abs(value) <= sys.float_info.max


def align(
    architecture: str,
    reference: Tree,
    variables: Tree,
    images: Any = None,
    *,
    seed: int = 0,
    heads: str = "drop",
) -> Variables:
    """The same network as `variables`, its hidden units in the order that fits the reference best.

    By weight matching, whose search has the seed, or by activation matching if there are images,
    float (n, h, w, 3), normalised. Heads do not count and are left out, or are those of the same
    classes and count too ("merge").
    """
    check_choice("heads", heads, HEADS)
    images = None if images is None else checked_images(images)
    task = Task(architecture, [reference, variables], heads == "merge", images, batch_size=32)
    models = task.to_merge()
    if images is None:
        order = merging.weight_matching(*models, seed=seed, spaces=task.spaces())
    else:
        order = _match_to_first(task)[1]
    return merging.permute_variables(models[1], order, task.spaces())


def _check_weights(parents: Sequence[Tree], weights: Any = None, **_: Any) -> None:
    if weights is not None:
        check_weights(weights, len(parents))


def _check_task_arithmetic(parents: Sequence[Tree], scale: Any = 1.0) -> None:
    merging.task_arithmetic(parents[0] if parents else {}, parents, scale)


def _check_zipit(parents: Sequence[Tree], **options: Any) -> None:
    merging.match_features(np.eye(len(parents)), len(parents), 1, **options)


@merger
def uniform(task: Task) -> Variables:
    """The mean."""
    return merging.uniform_average(task.to_merge())


@merger(check=merging.weighted_average)
def weighted(task: Task, *, weights: Sequence[float]) -> Variables:
    """The mean by `weights`, one for each parent, of sum 1."""
    return merging.weighted_average(task.to_merge(), weights)


@merger(check=lambda parents, t=0.5: len(parents) == 1 or merging.slerp(parents, t))
def slerp(task: Task, *, t: float = 0.5) -> Variables:
    """Spherical interpolation, tensor by tensor, from the first of two parents to the second."""
    if len(task.parents) == 1:
        return merging.uniform_average(task.to_merge())
    return merging.slerp(task.to_merge(), t)


@merger(check=_check_task_arithmetic)
def task_arithmetic(
    task: Task, *, ancestor: Tree, scale: float | Sequence[float] | None = None
) -> Variables:
    """Differences to a common ancestor, times `scale` (1/n), added (Ilharco et al., 2022)."""
    scale = 1 / len(task.parents) if scale is None else scale
    return merging.task_arithmetic(task.of_ancestor(ancestor), task.to_merge(), scale)


def _check_ties(parents: Sequence[Tree], **options: Any) -> None:
    merging.ties(parents[0] if parents else {}, parents, **options)


@merger(check=_check_ties)
def ties(task: Task, *, ancestor: Tree, density: float = 0.2, scale: float = 1.0) -> Variables:
    """The largest differences to an ancestor, where signs agree (Yadav et al., 2023)."""
    start = task.of_ancestor(ancestor)
    return merging.ties(start, task.to_merge(), density=density, scale=scale)


def _check_dare(parents: Sequence[Tree], **options: Any) -> None:
    merging.dare(parents[0] if parents else {}, parents, **options)


@merger(check=_check_dare)
def dare(
    task: Task,
    *,
    ancestor: Tree,
    drop: float = 0.9,
    scale: float | Sequence[float] | None = None,
    seed: int = 0,
) -> Variables:
    """As `task_arithmetic`, but differences are dropped at random (Yu et al., 2023)."""
    start = task.of_ancestor(ancestor)
    return merging.dare(start, task.to_merge(), drop=drop, scale=scale, seed=seed)


@merger(
    needs_images=True,
    needs_heads=True,
    check=lambda parents, **options: merging.fisher_average(parents, parents, **options),
)
def fisher(
    task: Task,
    *,
    coefficients: Sequence[float] | None = None,
    floor: float = 1e-6,
    multilabel: Sequence[bool] | None = None,
) -> Variables:
    """Average weighted by the exact diagonal Fisher (Matena & Raffel, 2022).

    `multilabel` says for each parent whether its classes do not exclude each other.
    """
    fishers = []
    multilabel = [False] * len(task.parents) if multilabel is None else multilabel
    check_one_each("of multilabel", multilabel, len(task.parents))
    for index, parent in enumerate(task.parents):
        if "head" not in parent["params"]:
            raise ValueError(f"parent {index} has no head, of whose classes the Fisher is wanted")
        num_classes = len(parent["params"]["head"]["bias"])
        function = _log_probs(task.architecture, num_classes, bool(multilabel[index]))
        log_probs = jax.tree_util.Partial(function, parent.get("batch_stats", {}))
        tree = {"params": merging.diagonal_fisher(log_probs, parent["params"], task.batches())}
        fishers.append(tree if task.keep_heads else without_head(tree))
    return merging.fisher_average(task.to_merge(), fishers, coefficients, floor=floor)


@merger(permutes="heads", check=_check_weights)
def weight_matching(
    task: Task, *, weights: Sequence[float] | None = None, seed: int = 0
) -> Aligned:
    """Hidden units permuted until their weights fit, then averaged (Ainsworth et al., 2022).

    Of more than two parents each is permuted to the mean of the others; `seed` is of the search.
    """
    permutations = merging.align_to_mean(task.to_merge(), seed, spaces=task.spaces())
    return _average_of_permuted(task, permutations, weights)


@merger(needs_images=True, permutes="heads", check=_check_weights)
def activation_matching(task: Task, *, weights: Sequence[float] | None = None) -> Aligned:
    """Likewise, until their activations fit those of the first parent (Ainsworth et al., 2022)."""
    return _average_of_permuted(task, _match_to_first(task), weights)


@merger(needs_images=True, permutes="units", check=_check_zipit)
def zipit(task: Task, *, alpha: float = ALPHA, beta: float = BETA) -> Variables:
    """Hidden units merged across and within models (Stoica et al., 2023)."""
    parents, spaces = task.to_merge(), task.spaces()
    return merging.zipit(parents, _correlations(task), alpha=alpha, beta=beta, spaces=spaces)


def _check_shares(parents: Sequence[Tree], weights: Any = None) -> None:
    if weights is not None:
        check_shares(weights, len(parents))


@merger(permutes="units", check=_check_shares)
def matched_averaging(task: Task, *, weights: Sequence[float] | None = None) -> Variables:
    """Layer by layer matched and averaged, as FedMA (Wang et al., 2020)."""
    return merging.matched_averaging(task.to_merge(), weights, spaces=task.spaces())


def describe_merger(method: str) -> tuple[str, str]:
    """What a method does, and its options with their defaults: ("The mean.", "")."""
    defaults = merger_options(method).items()
    options = [n if d in (None, inspect.Parameter.empty) else f"{n}={d}" for n, d in defaults]
    return summary(MERGERS[method].function), ", ".join(options)


if merge.__doc__:  # one text for `help`, the README and those who read the function
    merge.__doc__ = merge.__doc__.replace(
        "{mergers}",
        "\n    ".join(
            f"- `{name}` ({options}): {text}" if options else f"- `{name}`: {text}"
            for name in MERGERS
            for text, options in [describe_merger(name)]
        ),
    )


def _average_of_permuted(
    task: Task,
    permutations: Sequence[Mapping[str, np.ndarray]],
    weights: Sequence[float] | None,
) -> Aligned:
    permuted = [
        merging.permute_variables(parent, order, task.spaces())
        for parent, order in zip(task.to_merge(), permutations, strict=True)
    ]
    return Aligned(merging.weighted_average(permuted, weights), permuted)


def _correlations(task: Task) -> dict[str, np.ndarray]:
    """Of all parents' units with each other, by space."""
    assert task.images is not None
    moments = collect_moments(
        task.architecture, task.parents, task.spaces(), task.images, task.batch_size
    )
    return {name: merging.correlation(part) for name, part in moments.items()}


def _match_to_first(task: Task) -> list[dict[str, np.ndarray]]:
    correlations = _correlations(task)
    permutations = []
    for index in range(len(task.parents)):
        blocks = {}
        for name, matrix in correlations.items():
            size = len(matrix) // len(task.parents)
            blocks[name] = matrix[:size, index * size : (index + 1) * size]
        permutations.append(merging.activation_matching(blocks, task.spaces()))
    return permutations


@functools.cache  # or parents of the same classes would be compiled one by one
def _log_probs(architecture: str, num_classes: int, multilabel: bool) -> Callable[..., jax.Array]:
    model = create_model(architecture, num_classes=num_classes)

    def log_probs(statistics: Tree, params: Tree, images: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params, "batch_stats": statistics}, images)
        if multilabel:  # of each label, that it is not there and that it is
            return jax.nn.log_sigmoid(jnp.stack([-logits, logits], axis=-1))
        return jax.nn.log_softmax(logits)

    return log_probs


def _merger(method: str, options: Mapping[str, Any]) -> Merger:
    defaults = merger_options(method)
    for name in options:
        if name not in defaults:
            options_are = f"its options are {', '.join(defaults)}" if defaults else "it has none"
            raise ValueError(f"the merger {method!r} has no option {name!r}; {options_are}")
    for name, default in defaults.items():
        if default is inspect.Parameter.empty and name not in options:
            raise ValueError(f"the merger {method!r} wants the option {name!r}")
    return MERGERS[method]


def _checked_parents(architecture: str, parents: Sequence[Tree], heads: str) -> list[Tree]:
    check_choice("heads", heads, HEADS)
    if isinstance(parents, Mapping):
        raise ValueError("parents is a mapping; a sequence of variables is wanted")
    if not parents:
        raise ValueError("0 parents; one or more are wanted")
    expected = _shapes_of(architecture)
    check_variables(parents)
    for name, parent in zip(parent_names(parents), parents, strict=True):
        backbone = flatten(without_head(parent))
        check_parents([expected, backbone], names=[architecture, name])
        check_finite(flatten(parent), name)
    if heads == "merge":
        _check_heads(parents)
    return list(parents)


def _check_heads(parents: Sequence[Tree]) -> None:
    flats = [flatten(parent["params"].get("head", {})) for parent in parents]
    classes = [len(flat["bias"]) if "bias" in flat else 0 for flat in flats]
    if len(set(classes)) > 1:
        heads_text = ", ".join(
            f"parent {index} has {f'{count} classes' if count else 'no head'}"
            for index, count in enumerate(classes)
        )
        raise ValueError(
            f"the heads differ: {heads_text}; to merge the backbones alone, "
            "drop the heads (heads='drop', or --heads drop)"
        )
    check_parents(flats, "params/head/")


@functools.cache
def _shapes_of(architecture: str) -> dict[str, jax.ShapeDtypeStruct]:
    return flatten(get_spec(architecture).shapes())
