"""Kills the quickstart in every stage, resumes it, and compares with an uninterrupted run.

    python benchmarks/kill_and_resume.py --workdir runs/kill

SIGKILL comes a random time after the stage has begun: while parent b is trained from c, in a
linear probe, a probe with batch norms, a merge linear probe, and a fine-tuning. Each time the
same command is given again. In the end weights, predictions, coefficients and metrics of every
run are compared with those of the uninterrupted run, bit for bit; only times may differ.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

# Files that appear when the stage begins, and the longest time to wait then, in seconds.
STAGES = {
    "source": ("sources/b/checkpoints/ft", 15.0),
    "lp": ("*/seed*/checkpoints/lp", 0.3),
    "lp_bn": ("*/seed*/checkpoints/lp_bn", 4.0),
    "merge_lp": ("*/seed*/checkpoints/merge_lp", 6.0),
    "ft": ("*/seed1/checkpoints/ft", 4.0),
}
TIMES = ("seconds", "wall_seconds", "images_per_second")


def main() -> None:
    """Prints where it killed, and what was compared; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", help="as --config.checkpoint_seconds=1")
    options = parser.parse_args()
    overrides = options.overrides or ["--config.checkpoint_seconds=1"]
    whole, killed = options.workdir / "whole", options.workdir / "killed"
    _start(options.config, whole, overrides).wait()
    rng = random.Random(options.seed)
    for stage, (pattern, longest) in STAGES.items():
        print(_kill_in(stage, pattern, rng.uniform(0, longest), options.config, killed, overrides))
    _start(options.config, killed, overrides).wait()
    sys.exit(_report(_content(whole), _content(killed)))


def _start(config: str, workdir: Path, overrides: list[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "medmerge_jax.main", "--config", config]
    log = workdir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, "--workdir", str(workdir), *overrides], stdout=file, stderr=file
        )


def _kill_in(
    stage: str, pattern: str, delay: float, config: str, workdir: Path, overrides: list[str]
) -> str:
    before = set(workdir.glob(pattern))
    process = _start(config, workdir, overrides)
    while not (begun := set(workdir.glob(pattern)) - before) and process.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    if process.poll() is not None:
        raise SystemExit(f"{stage}: the run ended before it could be killed")
    process.kill()
    process.wait()
    directory = begun.pop().parent.parent
    epochs = [record["epoch"] for record in _records(directory) if record["stage"] in pattern]
    state = f"after {len(epochs)} epochs" if not (directory / "results.json").exists() else "ended"
    return f"killed {delay:5.2f} s into {stage:8} of {directory.relative_to(workdir)}, {state}"


def _content(workdir: Path) -> dict[str, Any]:
    """All that a run computed, by file, without times."""
    content: dict[str, Any] = {}
    for path in sorted(workdir.rglob("*")):
        name = str(path.relative_to(workdir))
        if path.name == "model.safetensors":
            content[name] = path.read_bytes()
        elif path.name in ("predictions.npz", "coefficients.npz"):
            with np.load(path) as arrays:
                content[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.name == "results.json":
            content[name] = _without_times(json.loads(path.read_text()), str(workdir))
        elif path.name == "metrics.jsonl":
            content[name] = [_without_times(r, str(workdir)) for r in _records(path.parent)]
    return content


def _records(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _without_times(value: Any, workdir: str) -> Any:
    if isinstance(value, dict):
        return {k: _without_times(v, workdir) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [_without_times(item, workdir) for item in value]
    return value.replace(workdir, "") if isinstance(value, str) else value


def _report(whole: dict[str, Any], killed: dict[str, Any]) -> int:
    differing = [name for name in whole | killed if whole.get(name) != killed.get(name)]
    kinds: dict[str, int] = {}
    for name in whole:
        kinds[Path(name).name] = kinds.get(Path(name).name, 0) + 1
    print("compared:", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    print(f"differing: {differing or 'none'}")
    return 1 if differing or not whole else 0


if __name__ == "__main__":
    main()
