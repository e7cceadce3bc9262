"""How certain a metric and the difference of two recipes are: bootstrap over images and seeds.

Images are drawn with replacement, as many as there are (Efron and Tibshirani, "An Introduction to
the Bootstrap", 1993). Images of one patient or lesion say less than as many of different ones:
where groups are known, whole groups are drawn, as many as there are groups (the cluster bootstrap
of Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8).
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import norm

from medmerge_jax.errors import UserError
from medmerge_jax.evaluation.metrics import METRICS, Metric, exact
from medmerge_jax.evaluation.predictions import Predictions

RESAMPLES = 1000

METHODS = ("percentile", "bca")

_NUMBERS = 2**22
"""Counts that are in memory at once, of some resamples and all images."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A metric and how certain it is.

    Attributes:
      value: Of all images.
      low: The lower end of the interval.
      high: Its upper end.
      resamples: In which the metric is defined.
      undefined: Resamples in which it is not, as where a class is missing; they are left out.
    """

    value: float
    low: float
    high: float
    resamples: int
    undefined: int


@dataclasses.dataclass(frozen=True)
class Difference(Interval):
    """A difference of means over seeds: its value, its interval, and how likely it is by chance.

    Attributes:
      p: Two-sided, see `paired_difference`.
      seeds: How many.
    """

    p: float
    seeds: int


def metric_interval(
    metric: Metric,
    predictions: Predictions,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
    method: str = "percentile",
) -> Interval | None:
    """A bootstrap interval of a metric over the images that it was measured on.

    It says how much the metric would vary with other images of the same kind, the model being the
    same; not how much with another seed of its training.

    Args:
      metric: An entry of `METRICS`.
      predictions: Of the model.
      groups: (n,) names or numbers, drawn as a whole; by default `predictions.groups`, and where
        that is None every image is drawn by itself.
      seed: Of the draws.
      resamples: How many.
      confidence: Of the interval.
      method: "percentile", or "bca": bias-corrected and accelerated (Efron, "Better bootstrap
        confidence intervals", 1987), the acceleration from the jackknife over images or groups.

    Returns:
      None where the metric is undefined, of all images or in every resample.

    Raises:
      ValueError: An unknown method, or groups that are not one per image.
      FloatingPointError: A logit is NaN or infinite.

    >>> answers = np.eye(2)[[0, 1, 1, 0, 1, 0, 1, 1]]
    >>> found = metric_interval(METRICS["accuracy"], Predictions(answers, np.arange(8) % 2))
    >>> found.value, found.low < found.value < found.high
    (0.375, True)
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r}: one of {', '.join(METHODS)} is wanted")
    predictions = exact(predictions)
    value = metric(predictions)
    if value is None:
        return None
    units = _units([predictions], groups)
    draws = _draws(units, resamples, np.random.default_rng(seed))
    values = _values([metric], [predictions], draws)[0, 0]
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    tails = _tails(confidence)
    if method == "bca":
        without = _values([metric], [predictions], _without_one(units))[0, 0]
        tails = _corrected(tails, value, defined, without[~np.isnan(without)])
    low, high = np.quantile(defined, tails).tolist()
    return Interval(value, low, high, len(defined), resamples - len(defined))


def paired_difference(
    metric: Metric,
    runs_a: Sequence[Predictions],
    runs_b: Sequence[Predictions],
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> Difference | None:
    """How much better a is than b: a's mean over seeds minus b's, on the same seeds and images.

    In each resample, the images (or groups) are drawn once for all runs of both, and the seeds once
    for both, so that what makes an image hard or a seed lucky for both cancels. The interval is of
    percentiles. The two-sided p is the smallest at which an interval of this kind leaves out zero:
    twice the smaller one of the shares of resamples ≤ 0 and ≥ 0, zero itself counted among the
    resamples, (1 + count) / (1 + resamples), and 1 at most.

    A bootstrap of n seeds knows (n - 1) / n of the variance between seeds, and with one seed
    nothing of it: with few seeds that differ much, intervals are too short and p is too small.

    Args:
      metric: An entry of `METRICS`.
      runs_a: Predictions of a run for each seed.
      runs_b: Of the same seeds, in the same order.
      groups: As in `metric_interval`, of the images of all runs.
      seed: Of the draws.
      resamples: How many.
      confidence: Of the interval.

    Returns:
      None where the metric is undefined for a run, or in every resample.

    Raises:
      UserError: The runs are not of the same images, labels and number of seeds.
      FloatingPointError: A logit is NaN or infinite.
    """
    settings = _Settings(seed, resamples, confidence)
    return _differences([metric], runs_b, [runs_a], groups, settings)[0][0]


def paired_rows(
    reference: Sequence[Predictions],
    others: Mapping[str, Sequence[Predictions]],
    metrics: Sequence[str] | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    confidence: float = 0.95,
) -> dict[str, dict[str, dict[str, float] | None]]:
    """By how much each row of a comparison is above its reference, see `paired_difference`.

    Args:
      reference: Predictions of a run for each seed, as `Predictions.load` reads them.
      others: Likewise, of the same seeds in the same order, by the names of the rows.
      metrics: Names of some of `METRICS`; None: all that are compared.
      seed: Of the draws, which are the same for all rows and metrics.
      resamples: How many.
      confidence: Of the intervals.

    Returns:
      For JSON: by row and metric `{"difference", "low", "high", "p", "seeds", "resamples",
      "undefined"}`, the difference being the row's mean minus the reference's; None where the
      metric is undefined.

    Raises:
      UserError: The runs are not of the same images, labels and number of seeds; names the row.
    """
    compared = [name for name, entry in METRICS.items() if entry.compared]
    names = compared if metrics is None else list(metrics)
    rows = _differences(
        [METRICS[name] for name in names],
        reference,
        list(others.values()),
        None,
        _Settings(seed, resamples, confidence),
        list(others),
    )
    return {
        row: {name: _as_json(found) for name, found in zip(names, of_row, strict=True)}
        for row, of_row in zip(others, rows, strict=True)
    }


@dataclasses.dataclass(frozen=True)
class _Settings:
    seed: int
    resamples: int
    confidence: float


def _differences(
    metrics: Sequence[Metric],
    reference: Sequence[Predictions],
    others: Sequence[Sequence[Predictions]],
    groups: Sequence[Any] | np.ndarray | None,
    settings: _Settings,
    names: Sequence[str] = ("the other",),
) -> list[list[Difference | None]]:
    """Of each of the others and each metric; the runs of all are resampled together."""
    for name, runs in zip(names, others, strict=True):
        _check_pairs(name, reference, runs)
    runs = [exact(one) for part in (reference, *others) for one in part]
    units, seeds = _units(runs, groups), len(reference)
    # Of their own, so that the same images are drawn however many seeds there are.
    for_images, for_seeds = np.random.default_rng(settings.seed).spawn(2)
    values = _values(metrics, runs, _draws(units, settings.resamples, for_images))
    drawn = for_seeds.integers(seeds, size=(settings.resamples, seeds))
    everything = np.array([[_or_nan(metric(run)) for run in runs] for metric in metrics])
    return [
        [
            _difference(
                everything[index, of_row] - everything[index, :seeds],
                values[index, of_row] - values[index, :seeds],
                drawn,
                settings.confidence,
            )
            for index in range(len(metrics))
        ]
        for of_row in (slice(seeds * row, seeds * (row + 1)) for row in range(1, len(others) + 1))
    ]


def _difference(
    of_all: np.ndarray, values: np.ndarray, drawn: np.ndarray, confidence: float
) -> Difference | None:
    """From the differences of each seed: (seeds,) of all images, (seeds, resamples) of some."""
    resampled = np.take_along_axis(values.T, drawn, axis=1).mean(axis=1)
    defined = resampled[~np.isnan(resampled)]
    if np.isnan(of_all).any() or not len(defined):
        return None
    low, high = np.quantile(defined, _tails(confidence)).tolist()
    fewer = min(int(np.sum(defined <= 0)), int(np.sum(defined >= 0)))
    p = min(1.0, 2 * (1 + fewer) / (1 + len(defined)))
    undefined = len(resampled) - len(defined)
    return Difference(
        float(of_all.mean()), low, high, len(defined), undefined, p=p, seeds=len(of_all)
    )


def _as_json(found: Difference | None) -> dict[str, float] | None:
    if found is None:
        return None
    values = dataclasses.asdict(found)
    return {"difference": values.pop("value"), **values}


def _check_pairs(name: str, ours: Sequence[Predictions], theirs: Sequence[Predictions]) -> None:
    if not ours or len(ours) != len(theirs):
        raise UserError(
            f"{name} has {len(theirs)} runs, and what it is compared with has {len(ours)}: one or "
            "more are wanted, of the same seeds"
        )
    first = ours[0]
    for index, run in enumerate([*ours, *theirs]):
        which = f"run {index % len(ours)} of {name if index >= len(ours) else 'the reference'}"
        if len(run) != len(first) or run.ids != first.ids:
            pairs = zip(run.ids, first.ids, strict=False)
            other = next((f": {a} in place of {b}" for a, b in pairs if a != b), "")
            raise UserError(
                f"{which} is of {len(run)} other images than the {len(first)} of the first "
                f"run{other}; compare runs on the same data and splits"
            )
        if run.logits.shape != first.logits.shape or not np.array_equal(
            run.labels, first.labels, equal_nan=run.multilabel
        ):
            raise UserError(
                f"{which} has other labels or classes than the first run; compare runs on the "
                "same data and classes"
            )


def _units(runs: Sequence[Predictions], groups: Sequence[Any] | np.ndarray | None) -> np.ndarray:
    """Int (n,): the number of what each image is drawn with, from 0 without a gap."""
    count = len(runs[0])
    known = runs[0].groups if groups is None else groups
    if known is None:
        return np.arange(count)
    if len(known) != count:
        raise ValueError(f"{len(known)} groups of {count} images; one per image is wanted")
    numbers: np.ndarray = np.unique(np.asarray(known), return_inverse=True)[1]
    return numbers.reshape(-1)


def _draws(units: np.ndarray, resamples: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """How often each image is in each resample, float64 (some resamples, n) at a time."""
    total = int(units.max()) + 1
    for size in _chunks(resamples, len(units)):
        drawn = rng.integers(total, size=(size, total)) + total * np.arange(size)[:, None]
        counts = np.bincount(drawn.reshape(-1), minlength=size * total).reshape(size, total)
        yield counts[:, units].astype(np.float64)


def _without_one(units: np.ndarray) -> Iterator[np.ndarray]:
    """Likewise of the jackknife: all images but those of one unit, for each unit."""
    start = 0
    for size in _chunks(int(units.max()) + 1, len(units)):
        left_out = np.arange(start, start + size)[:, None]
        yield (units[None, :] != left_out).astype(np.float64)
        start += size


def _chunks(rows: int, columns: int) -> Iterator[int]:
    size = max(1, _NUMBERS // columns)
    yield from (min(size, rows - start) for start in range(0, rows, size))


def _values(
    metrics: Sequence[Metric], runs: Sequence[Predictions], draws: Iterator[np.ndarray]
) -> np.ndarray:
    """(metrics, runs, resamples), NaN where undefined."""
    parts = [
        [[metric.resampled(run, counts) for run in runs] for metric in metrics] for counts in draws
    ]
    return np.concatenate([np.asarray(part) for part in parts], axis=-1)


def _tails(confidence: float) -> np.ndarray:
    return np.array([(1 - confidence) / 2, (1 + confidence) / 2])


def _corrected(
    tails: np.ndarray, value: float, resampled: np.ndarray, without: np.ndarray
) -> np.ndarray:
    """The tails of the BCa interval; those of the percentiles where the jackknife says nothing."""
    below = np.mean(resampled < value) / 2 + np.mean(resampled <= value) / 2
    spread = without.mean() - without
    scale = 6 * np.sum(spread**2) ** 1.5
    if not 0 < below < 1 or not scale > 0:
        return tails
    bias, acceleration = norm.ppf(below), np.sum(spread**3) / scale
    shifted = bias + norm.ppf(tails)
    return np.asarray(norm.cdf(bias + shifted / (1 - acceleration * shifted)))


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value
