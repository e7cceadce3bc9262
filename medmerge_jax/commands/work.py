"""python -m medmerge_jax work WORKDIR: helps with a study that was begun elsewhere."""

import argparse
import dataclasses
import runpy
from collections.abc import Sequence
from pathlib import Path

from medmerge_jax.commands import entry
from medmerge_jax.config import Study, from_json
from medmerge_jax.errors import UserError
from medmerge_jax.runtime import processes


def main(arguments: Sequence[str] | None = None) -> None:
    """Takes jobs of the study in a directory until none is left."""
    parser = argparse.ArgumentParser(
        prog="python -m medmerge_jax work",
        description="Takes jobs of a study that was begun with python -m medmerge_jax.main, beside "
        "all other processes that work on it, until none is left.",
        epilog="Example: python -m medmerge_jax work runs/grid",
    )
    parser.add_argument("workdir", type=Path, help="directory of the study")
    parser.add_argument(
        "--import", dest="file", type=Path, help="its config file, if that registers anything"
    )
    options = parser.parse_args(arguments)
    workdir: Path = options.workdir.expanduser()
    entry.work_in(workdir)
    processes.start(None, None, None)
    entry.keep_programs()
    from medmerge_jax.storage.run_directory import RunDirectory
    from medmerge_jax.studies import run

    if options.file is not None:
        if not options.file.is_file():
            raise UserError(
                f"--import {options.file}: there is no such file; a config file is wanted"
            )
        runpy.run_path(str(options.file))
    recorded = RunDirectory(workdir).read_json("config.json")
    if recorded is None:
        raise UserError(f"{workdir}: there is no config.json in it; begin the study first")
    run(dataclasses.replace(from_json(recorded["config"]), study=Study()), workdir)
