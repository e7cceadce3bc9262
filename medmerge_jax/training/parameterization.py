"""What a stage trains: how trainable and frozen arrays make a model's parameters.

Every stage of this library runs the same step. Stages differ only in the pure function

    params = assemble(trainable, frozen)

and in whether batch norms use the statistics of the batch. Gradients are taken with respect to
`trainable` alone. Parameters are flat here, arrays by path; the step nests them once.

| stage              | trainable                       | frozen                 | assemble       |
|--------------------|---------------------------------|------------------------|----------------|
| fine-tune          | all, or the last blocks         | nothing, or the rest   | `put_together` |
| linear probe       | head (and batch norms)          | the rest               | `put_together` |
| merge linear probe | coefficients, head, batch norms | both parents' kernels  | `Blend(...)`   |
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from medmerge_jax import merging
from medmerge_jax.merging.coefficients import Tie, parent_weights, untied
from medmerge_jax.merging.trees import check_choice, flatten, without_head
from medmerge_jax.models.registry import leaf_role

Tree = dict[str, Any]
Flat = dict[str, Any]
Assemble = Callable[[Tree, Tree], Flat]
Role = Callable[[str, Any], str]

DECAYS = ("zero", "init", "none")
"""What the weight decay of coefficients pulls towards: zero, as AdamW's does, their values at the
start of the stage, or nothing, as there is none."""


@dataclasses.dataclass(frozen=True)
class Parameterization:
    """A point to start a stage from."""

    trainable: Tree  # {"params": {path: array}}, of a merge also "coefficients"; gets gradients
    # {"params": {path: array}}; of a merge also "parents", a tuple of kernels by path, and
    # "decay_to", what weight decay pulls parts of `trainable` towards where it is not zero; of
    # fine-tuning "rate_scale", a factor on the learning rate of each array of `trainable`.
    frozen: Tree
    assemble: Assemble  # pure and hashable; gives all parameters of the model by path
    batch_stats: Tree  # running statistics of the batch norms, nested
    # Whether batch statistics are used and running averages updated; otherwise the batch norms use
    # their running statistics, which stay as they are.
    train_batch_norm: bool
    still_norms: tuple[str, ...] = ()  # paths of batch norms for which it is False all the same
    opt_state: Any = None  # the optimiser's, of an earlier stage to go on from; None: a new one
    # Of parts of `trainable`, as "coefficients", that have another peak learning rate or weight
    # decay than the stage.
    learning_rate: Mapping[str, float] = dataclasses.field(default_factory=dict)
    weight_decay: Mapping[str, float] = dataclasses.field(default_factory=dict)


def fine_tune(variables: Tree, opt_state: Any = None) -> Parameterization:
    """Everything is trained; see `blocks.by_block` for less, and for rates by block."""
    params, stats = flatten(variables["params"]), variables.get("batch_stats", {})
    return dataclasses.replace(_probe(params, {}, stats, True), opt_state=opt_state)


NORMS = ("freeze", "drift", "train")
"""What a linear probe does with batch norms: nothing; normalise by the batch's statistics, so that
the running ones drift towards those of the new images; that, and train scales and biases."""


def linear_probe(
    variables: Tree, *, norms: str = "freeze", role: Role = leaf_role
) -> Parameterization:
    """The head is trained on a frozen backbone, whose batch norms do one of `NORMS`.

    "train" is the control of a merge linear probe: the same trainable batch norms and head, but
    one parent and no coefficients. "drift" is what a network in training mode does whose other
    parameters are frozen, as in FissionFusion's code. What each parameter is the role says, see
    `ModelSpec.role`.
    """
    trainable, frozen = _partition(flatten(variables["params"]), role, norms == "train")
    stats = variables.get("batch_stats", {})
    return _probe(trainable, frozen, stats, train_batch_norm=norms != "freeze")


def merge_linear_probe(
    parents: Sequence[Tree],
    head: Tree,
    *,
    granularity: str = "kernel",
    constraint: str = "none",
    train_batch_norm: bool = True,
    init: Sequence[float] = (),
    learning_rate: float = 0.0,
    decay_to: str = "zero",
    role: Role = leaf_role,
    tie: Tie = untied,
) -> Parameterization:
    """Stage 1 of MedMerge (arXiv 2403.11646): coefficients, batch norms and head are trained.

    The kernels are θ̂ = Σᵢ wᵢ θᵢ + (1 − Σᵢ wᵢ) θ_last with the parents' kernels θ constant and
    every w starting at 1/n. Batch norms start as the mean of the parents'.

    With `init = (1, 0)` the start is the first parent itself, number by number, and with
    `decay_to = "init"` weight decay holds it there: the extractor that version 2 of the paper
    keeps anchored during training.

    Args:
      parents: n ≥ 2 trees `{"params", "batch_stats"}` of one architecture; heads are ignored.
      head: Parameters of the new head, `{"kernel": (features, classes), "bias": (classes,)}`.
      granularity: "kernel" (one coefficient per output filter), "row", "layer", "slice" or
        "parameter", see `merging.init_coefficients`.
      constraint: "none" (the paper's), "clip" or "sigmoid".
      train_batch_norm: False freezes the averaged batch norms (the paper's ablation).
      init: The parents' weights at the start, of kernels and batch norms, see
        `merging.coefficients.start_values`; none: 1/n each.
      learning_rate: Peak rate of the coefficients, on the schedule of the stage; 0: the stage's.
      decay_to: What the weight decay of the coefficients pulls them towards, of `DECAYS`. With a
        constraint these are the trained numbers, not the weights that they stand for.
      role: What each parameter is, see `ModelSpec.role`.
      tie: Which kernels share coefficients, see `ModelSpec.tie`.
    """
    check_choice("decay_to", decay_to, DECAYS)
    backbones = [without_head(parent) for parent in parents]

    def is_kernel(path: str, leaf: Any) -> bool:
        return role(path, leaf) == "kernel"

    coefficients = merging.init_coefficients(
        backbones[0]["params"],
        num_parents=len(parents),
        init=init,
        granularity=granularity,
        constraint=constraint,
        is_kernel=is_kernel,
        tie=tie,
    )
    merged = merging.merge_variables(
        backbones, coefficients, constraint=constraint, is_kernel=is_kernel, tie=tie
    )
    if len(init) > 0:  # for all but the kernels, which only the assembly makes
        merged = merging.floor_variances(merging.weighted_average(backbones, init), backbones)
    params = flatten({**merged["params"], "head": head})
    rest = {path: leaf for path, leaf in params.items() if not is_kernel(path, leaf)}
    trainable, frozen = _partition(rest, role, train_batch_norm)
    kernels = [
        {path: leaf for path, leaf in flatten(backbone["params"]).items() if is_kernel(path, leaf)}
        for backbone in backbones
    ]
    start = {"coefficients": flatten(coefficients)}
    return Parameterization(
        trainable={**start, "params": trainable},
        frozen={
            "params": frozen,
            "parents": tuple(kernels),
            **({"decay_to": start} if decay_to == "init" else {}),
        },
        assemble=Blend(constraint, tie),
        batch_stats=merged.get("batch_stats", {}),
        train_batch_norm=train_batch_norm,
        learning_rate={"coefficients": learning_rate} if learning_rate else {},
        weight_decay={"coefficients": 0.0} if decay_to == "none" else {},
    )


def put_together(trainable: Tree, frozen: Tree) -> Flat:
    """Parameters of which each is either trainable or frozen."""
    return {**frozen["params"], **trainable["params"]}


@dataclasses.dataclass(frozen=True)
class Blend:
    """Kernels blended from the parents', then put together with the rest."""

    constraint: str
    tie: Tie = untied

    def weights(self, trainable: Tree, frozen: Tree) -> dict[str, np.ndarray]:
        """Of all parents by layer, (n, coefficients), see `merging.coefficients`."""
        count = len(frozen["parents"])
        raw = jax.device_get(trainable["coefficients"])
        effective = merging.effective_coefficients(raw, count, self.constraint)
        return {path: parent_weights(path, leaf, count) for path, leaf in effective.items()}

    def __call__(self, trainable: Tree, frozen: Tree) -> Flat:
        """The model's parameters for these coefficients."""
        kernels = merging.merge_kernels(
            frozen["parents"],
            trainable["coefficients"],
            constraint=self.constraint,
            is_kernel=lambda path, leaf: True,
            tie=self.tie,
        )
        return {**kernels, **put_together(trainable, frozen)}


def _probe(trainable: Flat, frozen: Flat, stats: Tree, train_batch_norm: bool) -> Parameterization:
    return Parameterization(
        trainable={"params": trainable},
        frozen={"params": frozen},
        assemble=put_together,
        batch_stats=stats,
        train_batch_norm=train_batch_norm,
    )


def _partition(params: Flat, role: Role, train_batch_norm: bool) -> tuple[Flat, Flat]:
    """What a probe trains, the head and on request the norms, and what it leaves as it is."""
    trained = ("head", "norm") if train_batch_norm else ("head",)
    trainable = {path: leaf for path, leaf in params.items() if role(path, leaf) in trained}
    return trainable, {path: leaf for path, leaf in params.items() if path not in trainable}
