"""An experiment in its workdir: its sources first, then its recipe or its comparison."""

import graphlib
import os
from pathlib import Path
from typing import Any

from medmerge_jax.config import AnyConfig, Config, to_json
from medmerge_jax.errors import UserError
from medmerge_jax.recipes import prepare
from medmerge_jax.recipes.checks import check_config
from medmerge_jax.recipes.experiment import Prepared
from medmerge_jax.recipes.inputs import with_architecture
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
    config, workdir = check_config(config), Path(workdir).expanduser()
    order = _source_order(config)
    config = with_architecture(config, order)
    directory = RunDirectory(workdir)
    with directory.locked():
        processes.from_first(lambda: directory.check_config(to_json(config)))
        results = finished(directory)
        if results is not None:
            say(f"{workdir} is finished; nothing to do")
            return results
        prepare.check_paths(config)
        prepared: dict[str, Prepared] = {}
        folders = {name: RunDirectory(prepare.source_folder(workdir, name)) for name in order}
        untrained = [name for name in order if finished(folders[name]) is None]
        with processes.first_alone():
            for name in untrained:
                prepared[name] = prepare.prepare(config.sources[name], workdir, prepared)
            target = prepare.prepare(config, workdir, prepared)
        if dry_run:
            _say_checked(target, list(prepared))
            return {}
        # What could be refused is past: from here on the directory belongs to this config.
        record(config, directory, target)
        for name, source in prepared.items():
            say(f"source {name}: {source.config.recipe} on {source.config.data.name}")
            inputs = prepare.load_inputs(source, workdir)
            run_recipe(source.config, folders[name], inputs)
        inputs = prepare.load_inputs(target, workdir)
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


def _source_order(config: Config) -> list[str]:
    """The sources, each after those that it starts from; the same in all processes."""
    sources = sorted(config.sources.items())
    graph = {name: sorted(prepare.sources_of(source)) for name, source in sources}
    try:
        return list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        names = sorted(set(error.args[1]))
        raise UserError(
            f"sources {names} start from each other; one must start elsewhere"
        ) from error
