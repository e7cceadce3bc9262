"""An experiment in its workdir: its sources first, then its recipe or its comparison."""

import os
from pathlib import Path
from typing import Any

from medmerge_jax.config import AnyConfig, Config, to_json
from medmerge_jax.errors import UserError
from medmerge_jax.recipes.checks import check_config
from medmerge_jax.recipes.inputs import with_architecture
from medmerge_jax.recipes.prepare import (
    Prepared,
    check_paths,
    load_inputs,
    prepare,
    source_folder,
    sources_of,
)
from medmerge_jax.recipes.run import finished, record, run_recipe
from medmerge_jax.runtime import processes
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage.run_directory import RunDirectory
from medmerge_jax.studies.compare import compare


def run(
    config: AnyConfig, workdir: str | os.PathLike[str], *, dry_run: bool = False
) -> dict[str, Any]:
    """Runs, resumes, or returns the results of, the experiment in `workdir`.

    Args:
      config: What `get_config()` of a config file returns, for example.
      workdir: The run directory; made if it is not there.
      dry_run: Check all that can be checked without training: fields, paths, tables, every image
        (decoded, and kept in the cache), labels, splits, parents. Nothing but drawn images is left
        in the workdir.

    Returns:
      The content of results.json; of a dry run nothing.

    Raises:
      UserError: Before anything is compiled or written, if a field, path or file is unusable.
    """
    if not os.fspath(workdir).strip():
        raise UserError("the workdir is empty; a folder is wanted")
    config, workdir = with_architecture(check_config(config)), Path(workdir).expanduser()
    directory = RunDirectory(workdir)
    with directory.locked():
        processes.from_first(lambda: directory.check_config(to_json(config)))
        results = finished(directory)
        if results is not None:
            say(f"{workdir} is finished; nothing to do")
            return results
        check_paths(config)
        order = _source_order(config)
        prepared: dict[str, Prepared] = {}
        waiting = [n for n in order if finished(_source_directory(workdir, n)) is None]
        with processes.first_alone():
            for name in waiting:
                prepared[name] = prepare(config.sources[name], workdir, prepared)
            target = prepare(config, workdir, prepared)
        if dry_run:
            _say_checked(target, list(prepared))
            return {}
        # What could be refused is past: from here on the directory belongs to this config.
        record(config, directory, target.fingerprint, target.parents)
        for name in prepared:
            say(f"source {name}: {config.sources[name].recipe} on {config.sources[name].data.name}")
            inputs = load_inputs(prepared[name], workdir)
            run_recipe(config.sources[name], _source_directory(workdir, name), inputs)
        inputs = load_inputs(target, workdir)
        if config.recipe == "compare":
            return compare(config, directory, inputs)
        return run_recipe(config, directory, inputs)


def _say_checked(target: Prepared, sources: list[str]) -> None:
    counts = {name: len(split) for name, split in target.dataset.splits.items()}
    images = ", ".join(f"{name} {count}" for name, count in counts.items())
    say(
        f"dry run: config, paths, images ({images}, all decoded), labels, splits, parents "
        f"{sorted(target.parents)} and sources {sources} are usable; nothing was trained, so "
        "whether the batches fit into memory and the training converges was not checked"
    )


def _source_directory(workdir: Path, name: str) -> RunDirectory:
    return RunDirectory(source_folder(workdir, name))


def _source_order(config: Config) -> list[str]:
    """The sources, each after those that it starts from."""
    order: list[str] = []
    waiting = sorted(config.sources)
    while waiting:
        ready = [name for name in waiting if sources_of(config.sources[name]) <= set(order)]
        if not ready:
            raise UserError(f"sources {waiting} start from each other; one must start elsewhere")
        order += ready
        waiting = [name for name in waiting if name not in ready]
    return order
