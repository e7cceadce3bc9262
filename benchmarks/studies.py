"""What a study costs beside its training, and what two processes gain.

    python benchmarks/studies.py --workdir runs/studies

Runs a grid of 48 members (8 learning rates, 3 augmentations, 2 seeds) of ResNet-20 on drawn images
of 32 px in this process, and times the training steps and the validation of every epoch; all else
(reading, compiling, checkpoints, models, figures, reports, soups) is overhead. Then a part of the
grid in one process with one core, and in two processes with one core each. What was measured is
kept in the workdir and not measured again; `--only` measures a half now and the other later.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_collections
from results import output_option, write_table

from medmerge_jax.config import default_config
from medmerge_jax.runtime import cpu

QUESTION = "How much of a study's time is not training, and what do two processes gain?"


def main() -> None:
    """Prints a table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--part", type=int, default=8, help="members that two processes share")
    parser.add_argument("--only", choices=("whole", "processes"), help="and no table")
    output_option(parser, "studies")
    options = parser.parse_args()
    cpu.prepare()
    measures: dict[str, Callable[[], Any]] = {
        "processes": lambda: [_processes(options, workers) for workers in (1, 2)],
        "whole": lambda: _timed(
            _config(options.epochs, options.images, 8, 3), options.workdir / "whole"
        ),
    }
    found = {
        name: _once(options, name, measure)
        for name, measure in measures.items()
        if options.only in (None, name)
    }
    if options.only:
        print(found)
        return
    whole, (one, two) = found["whole"], found["processes"]
    total = whole.pop("total")
    overhead = total - sum(whole.values())
    parts = {**whole, "all else": overhead}
    rows = [
        {"part": part, "s": f"{seconds:.0f}", "share": f"{100 * seconds / total:.1f} %"}
        for part, seconds in parts.items()
    ]
    answer = (
        f"{100 * overhead / total:.1f} % of the time of 48 members; two processes with a core "
        f"each are {one / two:.2f} times as fast as one with one core."
    )
    notes = [
        f"{options.epochs} epochs of {options.images} images and a warm-up of as many epochs.",
        f"{options.part} members with their soups: {one:.0f} s in one process, {two:.0f} s in two.",
    ]
    write_table(options.output, QUESTION, answer, rows, notes)


def _once(options: argparse.Namespace, name: str, measure: Callable[[], Any]) -> Any:
    """What was measured with these options before, or is measured now."""
    file = options.workdir / f"{name}_{options.epochs}_{options.images}_{options.part}.json"
    if not file.exists():
        found = measure()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))
    return json.loads(file.read_text())


def _config(epochs: int, images: int, rates: int, policies: int) -> ml_collections.ConfigDict:
    config = default_config().unlock()
    config.recipe, config.architecture, config.image_size = "grid_search", "resnet20", 32
    config.parents = ml_collections.ConfigDict({"c": "random"})
    config.start = "c"
    config.batch_size = 64
    config.lp.epochs = config.ft.epochs = epochs
    config.lp.learning_rate, config.ft.schedule = 1e-3, "cosine"
    config.data.name = "drawn"
    config.data.kind = "synthetic"
    config.data.synthetic.counts = (images, images // 4, images // 4)
    config.grid.learning_rates = config.grid.learning_rates[:rates]
    config.grid.augmentations = config.grid.augmentations[:policies]
    return config.lock()


def _timed(config: ml_collections.ConfigDict, workdir: Path) -> dict[str, float]:
    """Seconds of steps, of validation and of all, in this process."""
    from medmerge_jax.studies import run
    from medmerge_jax.training import loop

    seconds = {"steps": 0.0, "validation": 0.0}

    def timed(name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                seconds[name] += time.perf_counter() - began

        return call

    loop._train_epoch = timed("steps", loop._train_epoch)
    loop._validate = timed("validation", loop._validate)
    began = time.perf_counter()
    run(config, workdir)
    return {**seconds, "total": time.perf_counter() - began}


def _processes(options: argparse.Namespace, workers: int) -> float:
    """Seconds of a part of the grid, each process with one core; the programs are compiled."""
    # The config is this file, which imports its neighbours.
    path = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    # The first run compiles, for which an epoch is enough.
    for name, epochs in ((f"warm{workers}", 1), (f"workers{workers}", options.epochs)):
        command = [
            *("taskset", "--cpu-list", "0" if workers == 1 else "0,1"),
            *(sys.executable, "-m", "medmerge_jax.main", f"--workdir={options.workdir / name}"),
            f"--config={Path(__file__)}:{epochs},{options.images},{options.part}",
        ]
        if workers > 1:
            command += ["--config.study.executor=processes", f"--config.study.workers={workers}"]
        began = time.perf_counter()
        subprocess.run(
            command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": path}
        )
        seconds = time.perf_counter() - began
    return seconds


def get_config(variant: str) -> ml_collections.ConfigDict:
    """Of a part of the grid: epochs, images and the number of members."""
    epochs, images, members = map(int, variant.split(","))
    return _config(epochs, images, members // 2, 1)


if __name__ == "__main__":
    main()
