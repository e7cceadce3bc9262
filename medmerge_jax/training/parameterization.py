"""What a stage trains: how trainable and frozen arrays make a model's parameters.

Every stage of this library runs the same step. Stages differ only in the pure function

    params = assemble(trainable, frozen)

and in whether batch norms use the statistics of the batch. Gradients are taken with respect to
`trainable` alone.

| stage              | trainable                       | frozen                 | assemble       |
|--------------------|---------------------------------|------------------------|----------------|
| fine-tune          | all                             | nothing                | `put_together` |
| linear probe       | head (and batch norms)          | the rest               | `put_together` |
| merge linear probe | coefficients, head, batch norms | both parents' kernels  | `Blend(...)`   |
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from medmerge_jax.merging import init_coefficients, is_conv_kernel, merge_kernels, merge_variables
from medmerge_jax.merging.trees import flatten, unflatten, without_head

Tree = dict[str, Any]
Assemble = Callable[[Tree, Tree], Tree]


@dataclasses.dataclass(frozen=True)
class Parameterization:
    """A point to start a stage from.

    Attributes:
      trainable: `{"params": ...}`, for a merge also `"coefficients"`; gets gradients.
      frozen: `{"params": ...}`, for a merge also `"parents"`, a tuple of trees of kernels.
      assemble: `assemble(trainable, frozen) -> params` of the model; pure and hashable.
      batch_stats: running statistics of the batch norms.
      train_batch_norm: Batch statistics are used and running averages updated; otherwise the
        batch norms use their running statistics, which stay as they are.
    """

    trainable: Tree
    frozen: Tree
    assemble: Assemble
    batch_stats: Tree
    train_batch_norm: bool


def fine_tune(variables: Tree) -> Parameterization:
    """Everything is trained."""
    return Parameterization(
        trainable={"params": variables["params"]},
        frozen={"params": {}},
        assemble=put_together,
        batch_stats=variables.get("batch_stats", {}),
        train_batch_norm=True,
    )


def linear_probe(variables: Tree, *, train_batch_norm: bool = False) -> Parameterization:
    """The head is trained on a frozen backbone; optionally the batch norms with it.

    With `train_batch_norm` this is the control of a merge linear probe: the same trainable
    batch norms and head, but one parent and no coefficients.
    """
    params = flatten(variables["params"])
    trainable, frozen = _partition(params, lambda path: _is_trained(path, train_batch_norm))
    return Parameterization(
        trainable={"params": unflatten(trainable)},
        frozen={"params": unflatten(frozen)},
        assemble=put_together,
        batch_stats=variables.get("batch_stats", {}),
        train_batch_norm=train_batch_norm,
    )


def merge_linear_probe(
    parents: Sequence[Tree],
    head: Tree,
    *,
    granularity: str = "kernel",
    constraint: str = "none",
    train_batch_norm: bool = True,
) -> Parameterization:
    """Stage 1 of MedMerge (arXiv 2403.11646): coefficients, batch norms and head are trained.

    The kernels are θ̂ = Σᵢ wᵢ θᵢ + (1 − Σᵢ wᵢ) θ_last with the parents' kernels θ constant and
    every w starting at 1/n. Batch norms start as the mean of the parents'.

    Args:
      parents: n ≥ 2 trees `{"params", "batch_stats"}` of one architecture; heads are ignored.
      head: Parameters of the new head, `{"kernel": (features, classes), "bias": (classes,)}`.
      granularity: "kernel" (one coefficient per output filter), "layer", "slice", "parameter".
      constraint: "none" (the paper's), "clip" or "sigmoid".
      train_batch_norm: False freezes the averaged batch norms (the paper's ablation).
    """
    backbones = [without_head(parent) for parent in parents]
    coefficients = init_coefficients(
        backbones[0]["params"],
        num_parents=len(parents),
        granularity=granularity,
        constraint=constraint,
    )
    merged = merge_variables(backbones, coefficients, constraint=constraint)
    params = flatten({**merged["params"], "head": head})
    rest = {path: leaf for path, leaf in params.items() if not _is_merged(path, leaf)}
    trainable, frozen = _partition(rest, lambda path: _is_trained(path, train_batch_norm))
    return Parameterization(
        trainable={"coefficients": coefficients, "params": unflatten(trainable)},
        frozen={
            "params": unflatten(frozen),
            "parents": tuple(_kernels(backbone["params"]) for backbone in backbones),
        },
        assemble=Blend(constraint),
        batch_stats=merged.get("batch_stats", {}),
        train_batch_norm=train_batch_norm,
    )


def put_together(trainable: Tree, frozen: Tree) -> Tree:
    """Parameters whose trainable and frozen parts are disjoint sub-trees."""
    return unflatten({**flatten(frozen["params"]), **flatten(trainable["params"])})


@dataclasses.dataclass(frozen=True)
class Blend:
    """Kernels blended from the parents', then put together with the rest."""

    constraint: str

    def __call__(self, trainable: Tree, frozen: Tree) -> Tree:
        """The model's parameters for these coefficients."""
        kernels = merge_kernels(
            frozen["parents"], trainable["coefficients"], constraint=self.constraint
        )
        rest = {"params": {**flatten(frozen["params"]), **flatten(kernels)}}
        return put_together(trainable, {"params": unflatten(rest["params"])})


def _is_merged(path: str, leaf: jax.Array) -> bool:
    return not path.startswith("head/") and is_conv_kernel(path, leaf)


def _kernels(params: Tree) -> Tree:
    return unflatten({p: leaf for p, leaf in flatten(params).items() if _is_merged(p, leaf)})


def _is_trained(path: str, train_batch_norm: bool) -> bool:
    """Whether a probe trains this parameter: the head's, and on request the batch norms'."""
    is_norm = path.rsplit("/", 1)[-1] in ("scale", "bias") and not path.startswith("head/")
    return path.startswith("head/") or (train_batch_norm and is_norm)


def _partition(
    flat: dict[str, Any], condition: Callable[[str], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    inside = {path: leaf for path, leaf in flat.items() if condition(path)}
    return inside, {path: leaf for path, leaf in flat.items() if path not in inside}
