"""Kills the quickstart again and again, resumes it, and compares with an uninterrupted run.

    python benchmarks/chaos.py --workdir runs/chaos --kills 50

SIGKILL, SIGTERM and SIGUSR1 come at random moments of every stage: while parents are trained, in a
linear probe, a probe with batch norms, a merge linear probe and a fine-tuning, and between them.
Each time the same command is given again; when a run is through, the next begins, until there were
as many kills as wanted. Of every run all weights, predictions, coefficients and metrics are
compared with those of the uninterrupted run, bit for bit; only times may differ.
"""

import argparse
import collections
import json
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# The folder that appears when a stage begins.
STAGES = {
    "source c": "sources/c/checkpoints/ft",
    "source b": "sources/b/checkpoints/ft",
    "lp": "lp*/seed*/checkpoints/lp",
    "lp_bn": "*/seed*/checkpoints/lp_bn",
    "merge_lp": "*/seed*/checkpoints/merge_lp",
    "ft": "*/seed*/checkpoints/ft",
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
STATUSES = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 75, signal.SIGUSR1: 75}
TIMES = ("seconds", "wall_seconds", "images_per_second")


def main() -> None:
    """Prints each kill, and what was compared; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per_run", type=int, default=25, help="kills before a run may end")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--longest", type=float, default=4.0, help="seconds into a stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="as --config.ft.epochs=2")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    started = time.monotonic()
    whole = options.workdir / "whole"
    if not (whole / "results.json").exists() and _Job(options, whole).wait() != {0}:
        raise SystemExit(f"the uninterrupted run failed, see {whole.with_suffix('.log')}")
    print(f"uninterrupted: {time.monotonic() - started:.0f} s", flush=True)
    wanted = content(whole)
    kills: list[tuple[str, str]] = []
    same = runs = 0
    while len(kills) < options.kills:
        workdir = options.workdir / f"run{runs}"
        done = _run(options, rng, workdir, min(options.per_run, options.kills - len(kills)))
        kills += done
        runs += 1
        print(f"run {runs}: {len(done)} kills", flush=True)
        same += len(done) if report(wanted, content(workdir)) == 0 else 0
    for (stage, name), count in sorted(collections.Counter(kills).items()):
        print(f"{stage:9} {name:8} {count}")
    print(f"{same} of {len(kills)} kills ended in the bits of the uninterrupted run")
    sys.exit(0 if wanted and same == len(kills) else 1)


class _Job:
    """The program, in one process or in several that work together."""

    def __init__(self, options: argparse.Namespace, workdir: Path):
        command = [sys.executable, "-m", "medmerge_jax.main", f"--config={options.config}"]
        command += [f"--workdir={workdir}", *options.overrides]
        flags: list[list[str]] = [[]]
        if options.processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                address = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
            together = [address, f"--num_processes={options.processes}"]
            flags = [[*together, f"--process_id={index}"] for index in range(options.processes)]
        self.log = workdir.with_suffix(".log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as file:
            self.processes = [
                subprocess.Popen([*command, *more], stdout=file, stderr=file) for more in flags
            ]

    def runs(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def send(self, number: int) -> None:
        """To one process if it kills, and to all of them if it asks, as schedulers do."""
        for process in self.processes[-1:] if number == signal.SIGKILL else self.processes:
            process.send_signal(number)

    def wait(self, timeout: float | None = None) -> set[int]:
        """The exit statuses."""
        return {process.wait(timeout) for process in self.processes}


def _run(
    options: argparse.Namespace, rng: random.Random, workdir: Path, kills: int
) -> list[tuple[str, str]]:
    """One run to its end, killed so often or less. Between two kills it begins a stage or two."""
    done: list[tuple[str, str]] = []
    while len(done) < kills:
        number = rng.choice(SIGNALS)
        before = _begun(workdir)
        job = _Job(options, workdir)
        early = rng.random() < 0.1  # while it starts, decodes and compiles
        stages = rng.randrange(1, 3)
        while job.runs() and not early:
            if len(_begun(workdir).keys() - before.keys()) >= stages:
                break
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 2 * options.longest if early else options.longest))
        if not job.runs():
            job.wait()
            break
        begun = _begun(workdir)
        job.send(number)
        statuses = job.wait(timeout=120)
        # Whoever is stopped in the last moment may have ended by itself.
        if statuses - {STATUSES[number], 0} and options.processes == 1:
            raise SystemExit(f"{number!r} led to {statuses}, see {job.log}")
        newest = [stage for folder, stage in begun.items() if folder not in before]
        done.append((newest[-1] if newest else "its start", signal.Signals(number).name))
        print(f"{len(done)}: {done[-1][1]} in {done[-1][0]}, status {statuses}", flush=True)
    if (statuses := _Job(options, workdir).wait()) != {0}:
        raise SystemExit(f"the run ended with {statuses}, see {workdir.with_suffix('.log')}")
    return done


def _begun(workdir: Path) -> dict[Path, str]:
    """Checkpoint folders of stages that have begun, oldest first, and their stages."""
    found = {path: name for name, pattern in STAGES.items() for path in workdir.glob(pattern)}
    return dict(sorted(found.items(), key=lambda one: one[0].stat().st_ctime_ns))


def content(workdir: Path) -> dict[str, Any]:
    """All that a run computed, by file, without times."""
    found: dict[str, Any] = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.name == "model.safetensors":
            found[name] = path.read_bytes()
        elif path.name in ("predictions.npz", "coefficients.npz"):
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.name == "results.json":
            found[name] = _without_times(json.loads(path.read_text()), str(workdir))
        elif path.name == "metrics.jsonl":
            lines = path.read_text().splitlines()
            found[name] = [_without_times(json.loads(line), str(workdir)) for line in lines]
    return found


def report(wanted: dict[str, Any], found: dict[str, Any]) -> int:
    """Prints what was compared and what differs; 1 if anything does, or if there is nothing."""
    differing = [name for name in wanted | found if wanted.get(name) != found.get(name)]
    kinds = collections.Counter(Path(name).name for name in wanted)
    print("compared:", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    print(f"differing: {differing or 'nothing'}", flush=True)
    return 1 if differing or not wanted else 0


def _without_times(value: Any, workdir: str) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v, workdir) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [_without_times(item, workdir) for item in value]
    return value.replace(workdir, "") if isinstance(value, str) else value


if __name__ == "__main__":
    main()
