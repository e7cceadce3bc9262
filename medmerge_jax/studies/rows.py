"""Rows of a study's table, made of the outcomes of its jobs."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medmerge_jax.evaluation.metrics import METRICS, mean_std
from medmerge_jax.studies.jobs import Outcome


def summarise(runs: Sequence[Outcome]) -> Iterator[dict[str, Any]]:
    """The row of runs that differ in their seed: mean and deviation of those that are finished."""
    finished = [run.results for run in runs if run.results is not None]
    if finished:
        names = [finished[0][key] for key in ("recipe", "method") if key in finished[0]]
        yield {
            "recipe": " ".join(names),
            "start": finished[0]["start"],
            "seeds": [run["seed"] for run in finished],
            **scores([run["test"] for run in finished]),
        }


def scores(tests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation of each metric; None where it is undefined in a run."""
    values = {name: [test[name] for test in tests] for name in METRICS}
    return {name: None if None in of else mean_std(of) for name, of in values.items()}
