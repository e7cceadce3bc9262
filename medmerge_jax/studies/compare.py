"""The comparison: every recipe on the same parents, splits and seeds, in one table."""

import dataclasses
from pathlib import Path
from typing import Any

from medmerge_jax import analysis
from medmerge_jax.config import Config
from medmerge_jax.evaluation.metrics import METRICS, mean_std
from medmerge_jax.recipes.experiment import Inputs
from medmerge_jax.recipes.recipes import RECIPES
from medmerge_jax.recipes.run import finished, leave_audit, run_recipe, shared_parents
from medmerge_jax.runtime import processes
from medmerge_jax.runtime.progress import say
from medmerge_jax.runtime.versions import package_versions
from medmerge_jax.storage.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True)
class _Row:
    """A line of the comparison.

    There is one for each trained parent of a recipe with one parent, and one for each merger of a
    recipe that merges without training.
    """

    recipe: str
    start: str
    method: str

    @property
    def variant(self) -> str:
        """What tells it from other lines of the same recipe."""
        start = self.start if RECIPES[self.recipe].one_parent else ""
        return "-".join(filter(None, (start, self.method)))

    @property
    def folder(self) -> str:
        """Name of the folder of its runs in the workdir."""
        return "-".join(filter(None, (self.recipe, self.variant)))

    def config(self, whole: Config, seed: int) -> Config:
        """The config of its run with a seed."""
        merge_ft = whole.merge_ft
        if self.method:
            merge_ft = dataclasses.replace(merge_ft, method=self.method)
        return dataclasses.replace(
            whole, recipe=self.recipe, start=self.start, seed=seed, merge_ft=merge_ft
        )


def _rows(config: Config) -> list[_Row]:
    trained = [name for name, value in sorted(config.parents.items()) if value != "zeros"]
    return [
        _Row(recipe, start, method)
        for recipe in config.compare.recipes
        for start in (trained if RECIPES[recipe].one_parent else [config.start])
        for method in (config.compare.mergers if RECIPES[recipe].merges else [""])
    ]


def compare(config: Config, directory: RunDirectory, inputs: Inputs) -> dict[str, Any]:
    """Every recipe on the same parents, splits and seeds; each run in a directory of its own."""
    directory.start_clock()
    leave_audit(directory, inputs)
    runs: dict[_Row, list[dict[str, Any]]] = {row: [] for row in _rows(config)}
    for seed in config.compare.seeds:
        for row, results_of in runs.items():
            part = row.config(config, seed)
            results_of.append(_run_part(part, directory.path / row.folder / f"seed{seed}", inputs))
    results = {
        "recipe": "compare",
        "architecture": config.architecture,
        "seeds": list(config.compare.seeds),
        "table": [_summarise(row, results_of) for row, results_of in runs.items()],
        "data": next(iter(runs.values()))[0]["data"],
        "parents": shared_parents(inputs),
        "versions": package_versions(),
        "wall_seconds": directory.wall_seconds(),
    }
    directory.write_json("results.json", results)
    directory.clean_up(results)
    if processes.is_first():
        analysis.write_report(directory.path)
    return results


def _run_part(config: Config, path: Path, inputs: Inputs) -> dict[str, Any]:
    directory = RunDirectory(path)
    results = finished(directory)
    if results is None:
        say(f"{path.parent.name}, seed {config.seed}")
        results = run_recipe(config, directory, inputs)
    return results


def _summarise(row: _Row, runs: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = {}
    for name in METRICS:
        values = [run["test"][name] for run in runs]
        metrics[name] = None if None in values else mean_std(values)
    return {
        "recipe": f"{row.recipe} {row.method}".rstrip(),
        "start": runs[0]["start"],
        "seeds": [run["seed"] for run in runs],
        **metrics,
    }
