"""Kills the quickstart again and again, resumes it, and compares with an uninterrupted run.

    python benchmarks/chaos.py --workdir runs/chaos --kills 50

SIGKILL, SIGTERM and SIGUSR1 come in every stage, between its end and the results, and while the
program starts. Each time the same command is given again; when a run is through, the next begins,
until there were as many kills as wanted. Of every run all weights, predictions, coefficients,
figures and metrics are compared with those of the uninterrupted run, bit for bit; only times may
differ. Of several processes SIGKILL hits one, the other signals all.
"""

import argparse
import collections
import contextlib
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
from results import output_option, write_table

MOMENTS = {  # what appears when they begin
    "images are drawn": "data/.*",
    "source c": "sources/c/checkpoints/ft",
    "source b": "sources/b/checkpoints/ft",
    "lp": "lp*/seed*/checkpoints/lp",
    "lp_bn": "*/*/checkpoints/lp_bn",
    "merge_lp": "*/*/checkpoints/merge_lp",
    "lp_drift": "warmup/checkpoints/lp_drift",
    "ft": "*/*/checkpoints/ft",
    "fgg": "*/*/checkpoints/fgg",
    "results": "*/*/predictions.npz",
    "report": "*/*/results.json",
    "soups": "soups/*/config.json",
}
BRIEF = ("images are drawn", "results", "report")
START = "its start"
QUESTION = "Does a run that is killed and resumed end in the bits of an uninterrupted one?"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
TIMES = ("seconds", "wall_seconds", "images_per_second", "since")
COUNTS = ("attempts", "lost", "lines")
"""Of jobs.json: how often a job was begun and lost, which is what a kill changes."""

Kill = tuple[str, str]
"""The moment that had begun last, and the signal."""


def main() -> None:
    """Prints each kill, and what was compared; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per_run", type=int, default=25, help="kills before a run may end")
    parser.add_argument("--processes", type=int, default=1, help="of each run, by JAX")
    parser.add_argument("--workers", type=int, default=1, help="of the study, see study.workers")
    parser.add_argument("--longest", type=float, default=4.0, help="seconds into a stage")
    parser.add_argument("--seed", type=int, default=0)
    output_option(parser, "chaos")
    parser.add_argument("overrides", nargs="*", help="as --config.ft.epochs=2")
    options = parser.parse_args()
    chaos = Chaos(options)
    started = time.monotonic()
    whole = options.workdir / "whole"
    if not (whole / "results.json").exists() and Job(options, whole).wait() != {0}:
        raise SystemExit(f"the uninterrupted run failed, see {whole.with_suffix('.log')}")
    print(f"uninterrupted: {time.monotonic() - started:.0f} s", flush=True)
    expected = content(whole)
    kills: list[Kill] = []
    same = runs = 0
    while len(kills) < options.kills:
        workdir = options.workdir / f"run{runs}"
        done = chaos.run(workdir, min(options.per_run, options.kills - len(kills)))
        kills += done
        runs += 1
        print(f"run {runs}: {len(done)} kills", flush=True)
        same += len(done) if report(expected, content(workdir)) == 0 else 0
    answer = f"{same} of {len(kills)} kills ended in the bits of the uninterrupted run."
    notes = [f"{options.processes} process(es), {options.workers} worker(s), {runs} runs."]
    write_table(options.output, QUESTION, answer, table(kills), notes)
    sys.exit(0 if same == len(kills) else 1)


class Job:
    """The program, in one process or in several that work together."""

    def __init__(self, options: argparse.Namespace, workdir: Path):
        command = [sys.executable, "-m", "medmerge_jax.main", f"--config={options.config}"]
        command += [f"--workdir={workdir}", *options.overrides]
        if options.workers > 1:
            command += ["--config.study.executor=processes"]
            command += [f"--config.study.workers={options.workers}"]
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
        """Whether any of its processes does."""
        return any(process.poll() is None for process in self.processes)

    def send(self, number: int) -> None:
        """To one process if it kills, and to all of them if it asks, as schedulers do."""
        for process in self.processes[-1:] if number == signal.SIGKILL else self.processes:
            process.send_signal(number)

    def wait(self, timeout: float | None = None) -> set[int]:
        """The exit statuses."""
        return {process.wait(timeout) for process in self.processes}


class Chaos:
    """Kills runs at moments that are drawn."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.rng = random.Random(options.seed)
        self._signals: list[signal.Signals] = []

    def run(self, workdir: Path, kills: int) -> list[Kill]:
        """One run to its end, killed so often, or less if it ends before."""
        done: list[Kill] = []
        while len(done) < kills:
            before = begun(workdir)
            job = Job(self.options, workdir)
            early = self.rng.random() < 0.1
            if early:  # while it starts, reads and compiles
                time.sleep(self.rng.uniform(0, 2 * self.options.longest))
            elif moment := self._wait_for_moment(job, workdir, before, {kill[0] for kill in done}):
                brief = moment in BRIEF
                time.sleep(0 if brief else self.rng.uniform(0, self.options.longest))
            if not job.runs():
                job.wait()
                break
            new = [name for path, name in begun(workdir).items() if path not in before]
            number = self._signal()
            job.send(number)
            statuses = job.wait(timeout=120)
            self._check(number, statuses, early, job.log)
            done.append((new[-1] if new else START, number.name))
            print(f"{len(done)}: {done[-1][1]} in {done[-1][0]}, status {statuses}", flush=True)
        if (statuses := Job(self.options, workdir).wait()) != {0}:
            raise SystemExit(f"the run ended with {statuses}, see {workdir.with_suffix('.log')}")
        return done

    def _wait_for_moment(
        self, job: Job, workdir: Path, seen: dict[Path, str], killed: set[str]
    ) -> str:
        """Returns when one begins that this run has not been killed in, or at one of the others."""
        seen = dict(seen)
        while job.runs():
            for path, name in begun(workdir).items():
                if path not in seen:
                    seen[path] = name
                    if name not in killed or self.rng.random() < 0.3:
                        return name
            time.sleep(0.002)
        return ""

    def _signal(self) -> signal.Signals:
        """All equally often."""
        if not self._signals:
            self._signals = self.rng.sample(SIGNALS, len(SIGNALS))
        return self._signals.pop()

    def _check(self, number: signal.Signals, statuses: set[int], early: bool, log: Path) -> None:
        """Whoever is stopped in the last moment may have ended by itself."""
        allowed = {-number, 0} if number == signal.SIGKILL else {75, 0}
        if number == signal.SIGKILL and self.options.processes > 1:
            allowed |= {-signal.SIGABRT}  # the others, by JAX
        if early:
            allowed |= {-number}  # before Python could listen
        if not statuses <= allowed:
            raise SystemExit(f"{number.name} led to {statuses}, see {log}")


def begun(workdir: Path) -> dict[Path, str]:
    """What is there of the moments, oldest first, and their names."""
    moments: dict[Path, tuple[int, str]] = {}
    for name, pattern in MOMENTS.items():
        with contextlib.suppress(FileNotFoundError):  # the place where images were being drawn
            for path in workdir.glob(pattern):
                moments.setdefault(path, (path.stat().st_ctime_ns, name))
    return {path: name for path, (_, name) in sorted(moments.items(), key=lambda one: one[1])}


def table(kills: list[Kill]) -> list[dict[str, Any]]:
    """Kills by moment and signal, and their sums."""
    counts = collections.Counter(kills)
    names = [number.name for number in SIGNALS]
    rows = []
    for moment in (START, *MOMENTS):
        row = {name: counts[moment, name] for name in names}
        rows.append({"killed in": moment, **row, "together": sum(row.values())})
    sums = {name: sum(name == kill[1] for kill in kills) for name in names}
    return [*rows, {"killed in": "together", **sums, "together": len(kills)}]


def content(workdir: Path) -> dict[str, Any]:
    """All that a run computed, by file, without times; of other files that they are there."""
    computed: dict[str, Any] = {}
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir).as_posix()
        folders = name.split("/")[:-1]
        hidden = path.name.startswith(".")  # nothing half-written is to be left
        if not hidden and (path.is_dir() or {"data", "checkpoints", "events"} & {*folders}):
            continue
        computed[name] = None
        if path.suffix in (".safetensors", ".png"):
            computed[name] = path.read_bytes()
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                computed[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.suffix == ".json" and not hidden:
            computed[name] = _without_times(json.loads(path.read_text()), str(workdir))
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            computed[name] = [_without_times(json.loads(line), str(workdir)) for line in lines]
    return computed


def report(expected: dict[str, Any], computed: dict[str, Any]) -> int:
    """Prints what was compared and what differs; 1 if anything does, or if there is nothing."""
    names = expected | computed
    differing = [name for name in names if expected.get(name) != computed.get(name)]
    differing += sorted(expected.keys() ^ computed.keys())
    compared = [Path(name).name for name in expected if expected[name] is not None]
    kinds = collections.Counter(compared)
    print("compared:", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    print(f"differing: {differing or 'nothing'}", flush=True)
    return 1 if differing or not kinds else 0


def _without_times(value: Any, workdir: str) -> Any:
    if isinstance(value, dict):
        return {
            k: _without_times(v, workdir) for k, v in value.items() if k not in (*TIMES, *COUNTS)
        }
    if isinstance(value, list):
        return [_without_times(item, workdir) for item in value]
    return value.replace(workdir, "") if isinstance(value, str) else value


if __name__ == "__main__":
    main()
