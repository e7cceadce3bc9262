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


def compare(config: Config, directory: RunDirectory, inputs: Inputs) -> dict[str, Any]:
    """Every recipe on the same parents, splits and seeds; each run in a directory of its own."""
    directory.start_clock()
    leave_audit(directory, inputs)
    rows = _rows(config)
    runs: dict[str, list[dict[str, Any]]] = {folder: [] for folder in rows}
    for seed in config.compare.seeds:
        for folder, row in rows.items():
            part, path = dataclasses.replace(row, seed=seed), directory.path / folder
            runs[folder].append(_run_part(part, path / f"seed{seed}", inputs))
    results = {
        "recipe": "compare",
        "architecture": config.architecture,
        "seeds": list(config.compare.seeds),
        "table": [_summarise(of_row) for of_row in runs.values()],
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
    if results is not None:
        return results
    say(f"{path.parent.name}, seed {config.seed}")
    return run_recipe(config, directory, inputs)


def _summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    metrics = {}
    for name in METRICS:
        values = [run["test"][name] for run in runs]
        metrics[name] = None if None in values else mean_std(values)
    return {
        "recipe": " ".join(runs[0][key] for key in ("recipe", "method") if key in runs[0]),
        "start": runs[0]["start"],
        "seeds": [run["seed"] for run in runs],
        **metrics,
    }
