"""What MedMerge's coefficients say, layer by layer: of several runs, and over training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.merging.coefficients import parent_weights
from medmerge_jax.merging.trees import network_order


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """Merges of the same parents for the same target, that differ in their seed.

    Attributes:
      label: For figures.
      parents: Names in merging order.
      runs: Effective coefficients by layer of each seed, see `merging.effective_coefficients`.
    """

    label: str
    parents: tuple[str, ...]
    runs: tuple[Mapping[str, np.ndarray], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Depth:
    """Weights of parents by depth: a row for each target, or for each of its parents.

    Of two parents only the first has rows, because the other's weights are one minus its.

    Attributes:
      rows: Labels.
      parents: Of each row, the parent that it is of.
      layers: Paths of the kernels, in network order.
      mean: (rows, layers) mean weight over kernels and seeds; NaN where a row lacks the layer.
      inside: (rows, layers) standard deviation over the kernels of a layer, of the same seed: the
        root of the seeds' mean variance.
      between: (rows, layers) sample standard deviation of the layer's mean over seeds; NaN of one.
      seeds: Of each row, how many.
      num_parents: n.
    """

    rows: list[str]
    parents: list[str]
    layers: list[str]
    mean: np.ndarray
    inside: np.ndarray
    between: np.ndarray
    seeds: list[int]
    num_parents: int


def depth(targets: Sequence[Target]) -> Depth:
    """The rows of all targets.

    Args:
      targets: One or more, of the same number of parents; layers may differ.

    Raises:
      UserError: They have another number of parents, or a target's coefficients do not fit it.
    """
    counts = {len(target.parents) for target in targets}
    if len(counts) != 1:
        lines = ", ".join(f"{one.label}: {', '.join(one.parents)}" for one in targets)
        raise UserError(
            f"the runs merge different numbers of parents ({lines}); draw them one at a time"
        )
    (num_parents,) = counts
    layers = sorted({p for one in targets for run in one.runs for p in run}, key=network_order)
    if not layers:
        raise UserError(f"{targets[0].label}: there are no coefficients of any layer")
    shown = range(1 if num_parents == 2 else num_parents)
    labels, parents, found = list[str](), list[str](), list[np.ndarray]()
    for target in targets:
        moments = np.stack([_moments(target, run, layers) for run in target.runs])
        for number in shown:
            name = target.parents[number]
            labels.append(target.label if num_parents == 2 else f"{target.label}: {name}")
            parents.append(name)
            found.append(_over_seeds(moments[:, :, number]))
    mean, inside, between = np.stack(found, axis=1)
    seeds = [len(target.runs) for target in targets for _ in shown]
    return Depth(labels, parents, layers, mean, inside, between, seeds, num_parents)


def _moments(target: Target, run: Mapping[str, np.ndarray], layers: Sequence[str]) -> np.ndarray:
    """(2, n, layers): mean and variance over the kernels."""
    result = np.full((2, len(target.parents), len(layers)), np.nan)
    for column, path in enumerate(layers):
        if path in run:
            try:
                weights = parent_weights(path, run[path], len(target.parents))
            except ValueError as error:
                raise UserError(f"{target.label}: {error}") from error
            if not weights.size or not np.isfinite(weights).all():
                raise UserError(
                    f"{target.label}: coefficients of {path}: {weights.size} numbers, not all "
                    "finite; restore coefficients.npz, or run the merge again"
                )
            result[:, :, column] = weights.mean(axis=1), weights.var(axis=1)
    return result


def _over_seeds(moments: np.ndarray) -> np.ndarray:
    """Of (seeds, 2, layers), (3, layers): mean, deviation inside of layers and between seeds."""
    means, variances = moments[:, 0], moments[:, 1]
    between = means.std(axis=0, ddof=1) if len(means) > 1 else np.full(means.shape[1], np.nan)
    return np.stack([means.mean(axis=0), np.sqrt(variances.mean(axis=0)), between])


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """Weights over the epochs of one run's merge.

    Attributes:
      label: Of the run.
      parents: Names in merging order.
      epochs: int (epochs,), from 1.
      layers: Paths of the kernels, in network order.
      values: (4, epochs, layers, n): mean, standard deviation, least and greatest weight over the
        kernels of a layer, after an epoch, of a parent.
    """

    label: str
    parents: tuple[str, ...]
    epochs: np.ndarray
    layers: list[str]
    values: np.ndarray


def trajectory(
    label: str, parents: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> Trajectory:
    """What a run has recorded.

    Args:
      label: Of the run.
      parents: Names in merging order.
      records: Lines of coefficients.jsonl: "epoch" and "layers", four numbers for each parent by
        layer.

    Raises:
      UserError: The records are not as this program writes them.
    """
    try:
        layers = sorted(records[0]["layers"], key=network_order)
        values = np.array([[record["layers"][p] for p in layers] for record in records], float)
        epochs = np.array([record["epoch"] for record in records], int)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise _damaged(label, f"{type(error).__name__}: {error}") from error
    if values.shape != (len(records), len(layers), len(parents), 4):
        raise _damaged(label, f"numbers of shape {values.shape} for {len(parents)} parents")
    if not values.size or not np.isfinite(values).all():
        raise _damaged(label, f"{values.size} numbers, not all finite")
    return Trajectory(label, tuple(parents), epochs, layers, np.moveaxis(values, -1, 0))


def _damaged(label: str, what: str) -> UserError:
    return UserError(
        f"{label}: coefficients.jsonl is not as this program writes it ({what}); restore it, or "
        "run the merge again"
    )
