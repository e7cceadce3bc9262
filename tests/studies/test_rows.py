"""The rows of a grid's table, made of results that no run has made."""

from pathlib import Path

import pytest

from medmerge_jax.config import Config, EvaluateOn, Soup
from medmerge_jax.evaluation.metrics import METRICS
from medmerge_jax.studies import grid
from medmerge_jax.studies.jobs import Job, Outcome
from medmerge_jax.studies.rows import summarise


def outcome(value, elsewhere, **more):
    """Of a run whose every metric is the value, and on another data set another."""
    metrics = dict.fromkeys(METRICS, value)
    results = {
        "val": metrics,
        "test": metrics,
        "evaluate_on": {"elsewhere": dict.fromkeys(METRICS, elsewhere)},
        "stages": [],
        "wall_seconds": 1.0,
        **more,
    }
    return Outcome(Job("", Config()), Path(), results)


@pytest.mark.parametrize("taken", ["averaged", "recalibrated"])
def test_elsewhere_a_soup_is_known_as_it_was_taken_only(taken):
    variants = {
        name: {"test": dict.fromkeys(METRICS, value)}
        for name, value in (("averaged", 0.3), ("recalibrated", 0.4))
    }
    told = {"chosen": ["a"], "members": {"a": 0.1, "b": 0.2}, "taken": taken, "variants": variants}
    outcomes = {
        grid.WARMUP: outcome(0.0, 0.0),
        "grid/a": outcome(0.1, 0.5),
        "grid/b": outcome(0.2, 0.6),
        "soups/uniform": outcome(0.3, 0.7, soup=told),
    }
    config = Config(soup=Soup(metric="accuracy"), evaluate_on={"elsewhere": EvaluateOn()})
    table = grid.table(config, outcomes, ["grid/a", "grid/b"])
    here, there = (
        {row["recipe"]: (row["start"], row["accuracy"]["mean"]) for row in rows}
        for rows in (table["table"], table["evaluate_on"]["elsewhere"])
    )
    singles = ("best single, by validation", "best single, by test")
    assert here == {
        **dict.fromkeys(singles, ("b", 0.2)),
        "uniform": ("1 of 2", 0.3),
        "uniform, recalibrated": ("1 of 2", 0.4),
    }
    title = "uniform" if taken == "averaged" else "uniform, recalibrated"
    assert there == {**dict.fromkeys(singles, ("b", 0.6)), title: ("1 of 2", 0.7)}


def test_a_row_of_a_single_run_has_the_interval_of_its_images():
    told = {"intervals": {"accuracy": {"low": 0.1, "high": 0.5}, "kappa": None}}
    facts = {"recipe": "ft", "start": "b", "seed": 0, "statistics": told}
    one, other = outcome(0.3, 0.7, **facts), outcome(0.4, 0.8, **facts)
    (single,), (both,) = summarise([one]), summarise([one, other])
    (elsewhere,) = summarise([one], "elsewhere")
    assert (single["accuracy"]["low"], single["accuracy"]["high"]) == (0.1, 0.5)
    for row in (both["accuracy"], elsewhere["accuracy"], single["macro_f1"]):
        assert set(row) == {"mean", "std", "values"}
