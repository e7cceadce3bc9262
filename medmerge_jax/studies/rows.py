"""Rows of a study's table, made of the outcomes of its jobs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medmerge_jax.evaluation.bootstrap import paired_rows
from medmerge_jax.evaluation.metrics import METRICS, mean_std
from medmerge_jax.evaluation.predictions import Predictions
from medmerge_jax.studies.jobs import Outcome


def summarise(runs: Sequence[Outcome], further: str = "") -> Iterator[dict[str, Any]]:
    """The row of runs that differ in their seed: mean and deviation of those that are finished.

    Of their test images, or of one of the further data sets that they were evaluated on.
    """
    finished = [run.results for run in runs if run.results is not None]
    if finished:
        single = finished[0] if len(finished) == 1 and not further else None
        yield {
            **_named(runs),
            "seeds": [run["seed"] for run in finished],
            **scores([evaluated(run, further) for run in finished], single),
        }


def evaluated(results: Mapping[str, Any], further: str = "") -> dict[str, Any]:
    """The metrics of a run on its test images, or on one of the further data sets."""
    found: dict[str, Any] = results["evaluate_on"][further] if further else results["test"]
    return found


def differences(
    rows: Mapping[str, Sequence[Outcome]], reference: str, metric: str
) -> dict[str, Any] | None:
    """By how much rows differ from one of them on the same seeds and images, for results.json.

    Rows of which a seed is missing are left out; None if the reference is one of these.

    Args:
      rows: Runs by the name of their row, each of the same seeds.
      reference: The name of one.
      metric: Shown of all that are computed.
    """
    whole = {name: runs for name, runs in rows.items() if all(run.results for run in runs)}
    if reference not in whole or len(whole) < 2:
        return None
    said = {
        name: [Predictions.load(run.folder / "predictions.npz") for run in runs]
        for name, runs in whole.items()
    }
    found = paired_rows(said.pop(reference), said)
    title = _named(whole[reference])
    return {
        "reference": f"{title['recipe']} from {title['start']}",
        "metric": metric,
        "rows": [{**_named(whole[name]), **of_row} for name, of_row in found.items()],
    }


def _named(runs: Sequence[Outcome]) -> dict[str, str]:
    """Recipe and start of runs, as a row names them."""
    results = next(run.results for run in runs if run.results is not None)
    names = [results[key] for key in ("recipe", "method") if key in results]
    return {"recipe": " ".join(names), "start": results["start"]}


def scores(
    tests: Sequence[Mapping[str, Any]], single: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Mean and standard deviation of each metric; None where it is undefined in a run.

    Args:
      tests: Metrics of each run.
      single: The results of the only run, whose bootstrap interval is that of the row.
    """
    values = {name: [test[name] for test in tests] for name in METRICS}
    found = {name: None if None in of else mean_std(of) for name, of in values.items()}
    intervals = ((single or {}).get("statistics") or {}).get("intervals", {})
    for name, interval in intervals.items():
        value = found.get(name)
        if interval is not None and value is not None:
            value.update(low=interval["low"], high=interval["high"])
    return found
