"""An experiment in its workdir: one run, or the jobs of a study."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from medmerge_jax import analysis
from medmerge_jax.analysis.results import Results
from medmerge_jax.config import AnyConfig, Config, to_json
from medmerge_jax.errors import UserError
from medmerge_jax.recipes import prepare
from medmerge_jax.recipes.experiment import Prepared
from medmerge_jax.recipes.inputs import SOURCES, with_architecture
from medmerge_jax.recipes.recipes import needed_parents
from medmerge_jax.recipes.run import finished, leave_audit, record, run_recipe
from medmerge_jax.runtime import processes
from medmerge_jax.runtime.progress import say
from medmerge_jax.runtime.versions import package_versions
from medmerge_jax.storage.loggers import check_loggers
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.studies.checks import check_config
from medmerge_jax.studies.executors import EXECUTORS
from medmerge_jax.studies.jobs import STUDIES, Job, Outcome, plan, source_order
from medmerge_jax.studies.worker import Pool, Worker
from medmerge_jax.training.stage import training_cost


def run(
    config: AnyConfig,
    workdir: str | os.PathLike[str],
    *,
    dry_run: bool = False,
    config_file: str | os.PathLike[str] | None = None,
) -> Results:
    """Runs, resumes, or returns the results of, the experiment in `workdir`.

    A study goes on with what is new in it: further seeds, recipes, members. While one process is at
    work on a study, another that is started with the same config and workdir helps it.

    Args:
      config: What `get_config()` of a config file returns, for example.
      workdir: The run directory; made if it is not there.
      dry_run: Check all that can be checked without training: fields, paths, tables, every image
        (decoded, and kept in the cache), labels, splits, parents. Nothing but drawn images is left
        in the workdir.
      config_file: Imported by further processes, of `study.executor`, for what it registers.

    Returns:
      The content of results.json, which shows itself as a table, also in a notebook; of a dry run
      it is empty, and where SLURM goes on with the study.

    Raises:
      UserError: Before anything is compiled or written, if a field, path or file is unusable; or
        if no job of a study could be finished.
    """
    if not os.fspath(workdir).strip():
        raise UserError("the workdir is empty; a folder is wanted")
    config, folder = check_config(config), Path(workdir).expanduser()
    check_loggers(config.log_to)
    known = with_architecture(config, source_order(config))
    config = config if known == config else check_config(known)
    jobs, executor = plan(config), EXECUTORS[config.study.executor]
    directory = RunDirectory(folder, free=_free(config))
    with directory.locked(wait=len(jobs) > 1):
        processes.from_first(lambda: directory.check_config(to_json(config)))
        results = finished(directory)
        if results is not None and set(results.get("jobs", jobs)) == set(jobs):
            say(f"{workdir} is finished; nothing to do")
            return Results(results, folder)
        executor.check(jobs)
        target, sources = _prepare(config, jobs, folder)
        if dry_run:
            _say_checked(target, list(sources))
            return Results({}, folder)
        # What could be refused is past: from here on the directory belongs to this config.
        record(config, directory, target)
        if len(jobs) == 1 and "" in jobs:
            alone = run_recipe(config, directory, prepare.load_inputs(target))
            return Results(alone, folder)
        leave_audit(directory, target)
    worker = Worker(jobs, folder, Pool(folder, target, sources))
    if not executor.run(config.study, worker, folder, config_file):
        return Results({}, folder)
    return Results(_results(config, jobs, directory, worker), folder)


def _free(config: Config) -> tuple[str, ...]:
    """What of the config may be changed in a workdir."""
    extends = STUDIES[config.recipe].extends if config.recipe in STUDIES else ()
    return ("study", "log_to", *extends)


def _prepare(
    config: Config, jobs: Mapping[str, Job], folder: Path
) -> tuple[Prepared, dict[str, Prepared]]:
    """What the study starts from, and what its untrained sources do."""
    names = _parents(config, jobs.values())
    loaded = _parents(config, [job for job in jobs.values() if not job.averages])
    prepare.check_paths(config, names)
    sources = {
        name: job
        for name, job in jobs.items()
        if name.startswith(SOURCES) and finished(RunDirectory(folder / name)) is None
    }
    prepared: dict[str, Prepared] = {}
    with processes.first_alone():
        for name, job in sources.items():
            parents = needed_parents(job.config)
            prepared[name] = prepare.prepare(
                job.config, parents, folder, prepared, averaged=parents if job.averages else ()
            )
        averaged = set(names) - set(loaded)
        target = prepare.prepare(config, names, folder, prepared, averaged=averaged)
        return target, prepared


def _parents(config: Config, jobs: Iterable[Job]) -> list[str]:
    """Names of the config's parents that jobs, other than sources, start from."""
    used = {
        (name, job.config.parents[name])
        for job in jobs
        if not job.name.startswith(SOURCES)
        for name in needed_parents(job.config)
    }
    return sorted(name for name, value in used if config.parents.get(name) == value)


def _say_checked(target: Prepared, sources: list[str]) -> None:
    counts = {name: len(split) for name, split in target.dataset.splits.items()}
    images = ", ".join(f"{name} {count}" for name, count in counts.items())
    names = [name.removeprefix(SOURCES) for name in sources]
    say(
        f"dry run: config, paths, images ({images}, all decoded), labels, splits, parents "
        f"{sorted(target.parents)} and sources {names} are usable; nothing was trained, so "
        "whether the batches fit into memory and the training converges was not checked"
    )


def _draw(config: Config, results: Mapping[str, Any], directory: RunDirectory) -> None:
    """The figure that opens the report, of the metric that ranks or selects."""
    metric, differences = results.get("metric", config.select.metric), results.get("differences")
    reference = differences["reference"] if differences else ""
    path = directory.figures / "comparison.png"
    analysis.comparison_figure(results["table"], metric, path, reference)


def _results(
    config: Config, jobs: Mapping[str, Job], directory: RunDirectory, worker: Worker
) -> dict[str, Any]:
    """Of all jobs, in results.json; every process that worked on them may come here."""
    failed: dict[str, str] = processes.from_first(worker.failed)
    ours = {name: job for name, job in jobs.items() if not name.startswith(SOURCES)}
    outcomes = {
        name: Outcome(
            job,
            directory.path / name,
            None if name in failed else finished(worker.directory(name)),
            failed.get(name, ""),
        )
        for name, job in ours.items()
    }
    done = [one.results for one in outcomes.values() if one.results is not None]
    if not done:
        name, error = next(iter(failed.items()))
        raise worker.errors.get(name) or UserError(f"{name or 'the run'} failed: {error}")
    if "" in jobs:
        return dict(done[0])
    results = {
        "recipe": config.recipe,
        "architecture": config.architecture,
        **STUDIES[config.recipe].reduce(config, outcomes),
        "data": done[0]["data"],
        "parents": {
            name: one.results["parents"][name]
            for one in outcomes.values()
            if one.results is not None
            for name, value in one.job.config.parents.items()
            if config.parents.get(name) == value and name in one.results["parents"]
        },
        "versions": package_versions(),
        "wall_seconds": round(sum(one["wall_seconds"] for one in done), 3),
        "training": training_cost(
            (stage for one in done for stage in one.get("stages", ())), config.batch_size
        ),
        "jobs": list(jobs),
        **({"failed": failed} if failed else {}),
    }
    with directory.locked(wait=True):
        directory.write_json("results.json", results)
        directory.clean_up(results)
        if processes.is_first():
            _draw(config, results, directory)
            analysis.write_report(directory.path)
    for name, error in failed.items():
        say(f"{name} failed and is not in the results: {error}")
    return results
