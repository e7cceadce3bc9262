"""Loss and metrics between trained models: along a segment, and on a plane.

Along the segment between two models: whether the loss rises on the way is whether they are linearly
connected (Frankle et al. 2020, arXiv 1912.05671). On the plane through three models: Garipov et al.
2018, arXiv 1802.10026; version 2 of MedMerge (arXiv 2403.11646) draws its parents and the merged
model so.

A point is a weighted sum of whole models, heads and running statistics too, with weights that sum
to 1, accumulated in float64. The models themselves are such points, and come out to the bit. What
is measured there is up to the caller; `measurement` gives loss and a metric on splits of a data
set.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from medmerge_jax.data.batches import Batches
from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.predict import evaluate
from medmerge_jax.merging import floor_variances, recalibrate
from medmerge_jax.merging.trees import check_parents, flatten, nest_like
from medmerge_jax.models.network import Network
from medmerge_jax.models.norm import batch_statistics
from medmerge_jax.runtime import preemption
from medmerge_jax.runtime.progress import Bar, say
from medmerge_jax.storage import atomic

Tree = Mapping[Any, Any]
Measure = Callable[[Tree], Mapping[str, float | None]]
"""Numbers by name of a model's variables; None where one is undefined."""

RECALIBRATED = "recalibrated_"
"""Before the names of numbers of models whose batch norms were recalibrated."""

_SECONDS = 10.0
"""After which the points measured since are written: so much is lost if the process is killed."""


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """What was measured between two models.

    Attributes:
      shares: (points,) of the second model, from 0 to 1.
      distance: Of the models, the L2 norm over all parameters.
      values: (points,) float64 of each number by name; NaN where it is undefined.
    """

    shares: np.ndarray
    distance: float
    values: dict[str, np.ndarray]

    def barrier(self, name: str) -> tuple[float, float] | None:
        """The height of the barrier in a loss, and at which share of the second model it is.

            max over t of L((1 − t) θ₁ + t θ₂) − ((1 − t) L(θ₁) + t L(θ₂))

        Entezari et al. 2022, arXiv 2110.06296; Frankle et al. take the mean of the two ends'
        losses in place of their interpolation. Never below 0, which it is at both ends. None if
        the loss is undefined anywhere.
        """
        losses = self.values[name]
        above = losses - ((1 - self.shares) * losses[0] + self.shares * losses[-1])
        if not np.isfinite(above).all():
            return None
        highest = int(np.argmax(above))
        return float(above[highest]), float(self.shares[highest])


@dataclasses.dataclass(frozen=True, eq=False)
class Plane:
    """What was measured on the plane through three models.

    Attributes:
      x: (columns,) coordinates along the line from the first model to the second, in units of the
        L2 norm over all parameters.
      y: (rows,) coordinates at a right angle to it, towards the third.
      corners: (3, 2) coordinates of the models; the first's are zero.
      values: (rows, columns) float64 of each number by name; NaN where it is undefined.
      at_models: (3,) likewise, of the models themselves.
    """

    x: np.ndarray
    y: np.ndarray
    corners: np.ndarray
    values: dict[str, np.ndarray]
    at_models: dict[str, np.ndarray]


def segment(
    models: Sequence[Tree],
    measure: Measure,
    *,
    points: int = 21,
    file: Path | None = None,
    key: str = "",
) -> Segment:
    """Measures at evenly spaced points from the first of two models to the second.

    Args:
      models: Variables of one architecture with heads of one size.
      measure: What is measured.
      points: 2 or more, the two ends among them.
      file: JSON, where the points that are measured are kept: the same call goes on from there,
        with the numbers that it would have had. None: nowhere.
      key: Of all that decides what is measured beside the points, kept in the file.

    Raises:
      ValueError: There are not two different models, or not enough points.
      UserError: The file holds something else.
    """
    distance, _ = _corners(models, 2)
    _check_points(points)
    shares = np.linspace(0, 1, points)
    weights = np.stack([1 - shares, shares], axis=1)
    return Segment(shares, float(distance[1, 0]), _measure_all(models, weights, measure, file, key))


def plane(
    models: Sequence[Tree],
    measure: Measure,
    *,
    points: int = 21,
    margin: float = 0.25,
    file: Path | None = None,
    key: str = "",
) -> Plane:
    """Measures at three models and on an even grid on the plane through them.

    The origin is the first model; the axes are orthonormal, made of the differences of the second
    and the third to it by Gram and Schmidt (Garipov et al. 2018, appendix A.1).

    Args:
      models: Three, as for `segment`.
      measure: What is measured.
      points: In each direction, 2 or more.
      margin: By how much of the models' greater extent the grid goes beyond them, on each side.
      file: As for `segment`.
      key: As for `segment`.

    Raises:
      ValueError: There are not three models, two are the same, all lie on one line, or there are
        not enough points.
      UserError: The file holds something else.
    """
    corners, (length, height) = _corners(models, 3)
    _check_points(points)
    low, high = corners.min(axis=0), corners.max(axis=0)
    room = margin * max(high - low)  # the same for both, so that no narrow triangle fills a strip
    x, y = np.linspace(low - room, high + room, points).T
    grid_x, grid_y = (one.ravel() for one in np.meshgrid(x, y))
    third = grid_y / height
    second = (grid_x - third * corners[2, 0]) / length
    weights = np.stack([1 - second - third, second, third], axis=1)
    # The models' own weights are exact, and not what rounding makes of their coordinates.
    values = _measure_all(models, np.concatenate([np.eye(3), weights]), measure, file, key)
    return Plane(
        x,
        y,
        corners,
        {name: of_all[3:].reshape(points, points) for name, of_all in values.items()},
        {name: of_all[:3] for name, of_all in values.items()},
    )


def combine(models: Sequence[Tree], weights: Sequence[float]) -> Tree:
    """Σᵢ wᵢ θᵢ, accumulated in float64; a model with the weight 1 alone comes out to the bit.

    Running variances do not fall below the smallest of the models': outside of the models, the
    sum may make them negative.
    """
    flats = [flatten(model) for model in models]
    parts = [(float(w), flat) for w, flat in zip(weights, flats, strict=True) if w != 0]
    point = {}
    for path, leaf in flats[0].items():
        total = sum(weight * np.asarray(flat[path], np.float64) for weight, flat in parts)
        point[path] = np.asarray(total, leaf.dtype)
    return floor_variances(nest_like(point, models[0]), models)


def measurement(
    network: Network,
    splits: Mapping[str, Batches],
    *,
    multilabel: bool,
    ordinal: bool = False,
    metric: str = "macro_f1",
    recalibrate_on: Batches | None = None,
) -> Measure:
    """Loss and a metric of a model on splits of a data set, as `segment` and `plane` want them.

    Args:
      network: The models', with their head.
      splits: Images by the split's name, "test", which begins the numbers' names, "test_loss".
      multilabel: Whether an image has any number of the classes.
      ordinal: Whether the order of the classes means something.
      metric: Beside the loss, of `evaluation.metrics.METRICS`.
      recalibrate_on: Images on which the running statistics are estimated anew at every point; the
        numbers then are there twice, those of the recalibrated model as `RECALIBRATED` and name.
    """

    def of_model(variables: Tree, prefix: str) -> dict[str, float | None]:
        numbers: dict[str, float | None] = {}
        for split, batches in splits.items():
            try:
                found = evaluate(network, dict(variables), batches, multilabel, ordinal)
            except FloatingPointError:  # far from the models, logits may be too large
                found = {}
            for name in dict.fromkeys(("loss", metric)):
                numbers[f"{prefix}{split}_{name}"] = found.get(name)
        return numbers

    def measure(variables: Tree) -> dict[str, float | None]:
        numbers = of_model(variables, "")
        if recalibrate_on is not None:
            renewed = _recalibrated(network, variables, recalibrate_on)
            numbers |= of_model(renewed, RECALIBRATED)
        return numbers

    return measure


def _recalibrated(network: Network, variables: Tree, images: Batches) -> Tree:
    def statistics(variables: Tree, inputs: jax.Array) -> Tree:
        renewed: Tree = batch_statistics(network.model, variables, network.normalise(inputs))
        return renewed

    inputs = (batch["inputs"][:valid] for batch, valid in images.ordered())
    return recalibrate(statistics, variables, inputs)


def _corners(models: Sequence[Tree], wanted: int) -> tuple[np.ndarray, tuple[float, float]]:
    """Coordinates of the models, (n, 2), and the lengths of the two axes before they are scaled."""
    if len(models) != wanted:
        raise ValueError(f"{len(models)} models; {wanted} are wanted")
    flats = [flatten(model) for model in models]
    check_parents(flats, names=[f"model {number + 1}" for number in range(wanted)])
    first, *others = [
        {p: np.asarray(x, np.float64) for p, x in flat.items() if p.startswith("params/")}
        for flat in flats
    ]
    u, *rest = [{path: other[path] - first[path] for path in first} for other in others]
    length, corners = math.sqrt(_inner(u, u)), np.zeros((wanted, 2))
    if length == 0:
        raise ValueError("model 1 and model 2 have the same parameters; give different models")
    corners[1, 0], height = length, 0.0
    for v in rest:
        along = _inner(u, v) / length
        across = {path: v[path] - along / length * u[path] for path in v}
        height = math.sqrt(_inner(across, across))
        if height <= 1e-6 * math.sqrt(_inner(v, v)):
            raise ValueError(
                "the three models lie on one line, as a plain average of two does with them, and "
                "span no plane; take the segment between two of them"
            )
        corners[2] = along, height
    return corners, (length, height)


def _inner(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> float:
    return math.fsum(float(np.vdot(a[path], b[path])) for path in a)


def _check_points(points: int) -> None:
    if points < 2:
        raise ValueError(f"{points} points; 2 or more are wanted")


def _measure_all(
    models: Sequence[Tree], weights: np.ndarray, measure: Measure, file: Path | None, key: str
) -> dict[str, np.ndarray]:
    """Numbers (points,) by name at all points (points, models), of which the file may have some."""
    key = hashlib.sha256(key.encode() + weights.tobytes()).hexdigest()
    rows = [] if file is None else _read(file, key)

    def save() -> None:
        if file is not None:
            atomic.write_json(file, {"key": key, "points": rows})

    known = len(rows)
    if known:
        say(f"{file}: {known} of {len(weights)} points are measured already")
    with preemption.deferred(), Bar("surface", len(weights), "points", "compiling") as bar:
        bar.skip(known)
        saved = time.monotonic()
        try:
            for point in weights[known:]:
                preemption.check()
                numbers = measure(combine(models, point.tolist()))
                rows.append({name: _finite(value) for name, value in numbers.items()})
                bar.advance(1)
                if time.monotonic() - saved > _SECONDS:
                    save()
                    saved = time.monotonic()
        finally:
            if len(rows) > known:
                save()
    return {name: np.array([row[name] for row in rows], np.float64) for name in rows[0]}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _read(file: Path, key: str) -> list[dict[str, float | None]]:
    if not file.exists():
        return []
    try:
        kept = atomic.read_json(file)
        same, rows = kept["key"] == key, list(kept["points"])
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{file}: holds no measured points ({error}); remove it") from error
    if not same:
        raise UserError(
            f"{file}: holds points of other models, images or settings; choose another folder, or "
            "remove this file"
        )
    return rows
