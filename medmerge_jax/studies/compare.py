"""The comparison: every recipe on the same parents, splits and seeds, in one table."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from medmerge_jax.config import Config
from medmerge_jax.errors import nearest
from medmerge_jax.evaluation.metrics import METRICS
from medmerge_jax.recipes.recipes import RECIPES
from medmerge_jax.studies.jobs import Job, Outcomes, different, study
from medmerge_jax.studies.rows import differences, summarise


def _rows(config: Config) -> dict[str, Config]:
    """The config of each line of the table, but for its seeds, by the folder of its runs.

    There is a line for each trained parent of a recipe with one parent, and for each merger of a
    recipe that merges without training.
    """
    trained = [name for name, value in sorted(config.parents.items()) if value != "zeros"]
    rows = {}
    for recipe in config.compare.recipes:
        for start in trained if RECIPES[recipe].one_parent else [""]:
            for method in config.compare.mergers if RECIPES[recipe].merges else [""]:
                merge_ft = config.merge_ft
                if method:
                    merge_ft = dataclasses.replace(merge_ft, method=method)
                rows["-".join(filter(None, (recipe, start, method)))] = dataclasses.replace(
                    config, recipe=recipe, start=start or config.start, merge_ft=merge_ft
                )
    return rows


def _reduce(config: Config, outcomes: Outcomes) -> dict[str, Any]:
    runs = {
        folder: [outcomes[f"{folder}/seed{seed}"] for seed in config.compare.seeds]
        for folder in _rows(config)
    }
    metric = config.select.metric
    if not METRICS[metric].compared:
        metric = next(name for name, one in METRICS.items() if one.compared)
    found = differences(runs, _reference(config), metric)
    return {
        "seeds": list(config.compare.seeds),
        "table": [row for one in runs.values() for row in summarise(one)],
        "evaluate_on": {
            name: [row for one in runs.values() for row in summarise(one, name)]
            for name in config.evaluate_on
        },
        **({"differences": found} if found else {}),
    }


def _reference(config: Config) -> str:
    """The row that all are compared with: the control of a merge, if it is there."""
    names, wanted = list(_rows(config)), config.compare.reference
    control = f"lp_bn_ft-{config.start}"
    return wanted or (control if control in names else names[0])


def _mistakes(config: Config) -> Iterator[str]:
    yield from different("compare.seeds", config.compare.seeds)
    names, wanted = list(_rows(config)), config.compare.reference
    if wanted and wanted not in names:
        yield f"compare.reference = {wanted!r}: {nearest(wanted, names)}"


@study(reduce=_reduce, extends=("compare",), mistakes=_mistakes)
def compare(config: Config) -> list[Job]:
    """Every recipe of `compare.recipes` on the same parents, splits and seeds, in one table."""
    return [
        Job(f"{folder}/seed{seed}", dataclasses.replace(row, seed=seed))
        for seed in config.compare.seeds
        for folder, row in _rows(config).items()
    ]
