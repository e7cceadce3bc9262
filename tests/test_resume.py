"""The program killed in every stage and resumed: what it leaves is that of an undisturbed run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

TINY = Path(__file__).parent / "tiny_config.py"
TIMES = ("seconds", "wall_seconds", "images_per_second")
MOMENTS = (  # the files at whose appearance the program is killed, each time they are new
    "data/.clinic_*",  # while images are drawn
    "sources/c/metrics.jsonl",
    "sources/b/checkpoints/ft/*",  # while or after the first epoch is written
    "lp-b/seed0/checkpoints/lp/*",
    "lp_bn_ft-b/seed0/checkpoints/lp_bn/*",
    "medmerge/seed0/checkpoints/merge_lp/*",
    "medmerge/seed0/checkpoints/ft/*",
    "medmerge/seed0/predictions.npz",  # between evaluation and results
    "lp_ft-c/seed1/results.json",  # between results and report
)


@pytest.fixture
def start(tmp_path):
    """Starts the program in a workdir; the caches are shared, as they are on a machine."""

    def call(workdir):
        command = [sys.executable, "-m", "medmerge_jax.main", f"--config={TINY}:compare"]
        environment = {**os.environ, "MEDMERGE_JAX_CACHE": str(tmp_path / "cache")}
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(
                [*command, f"--workdir={workdir}"], env=environment, stdout=log, stderr=log
            )

    return call


def test_killed_in_every_stage(start, tmp_path):
    assert start(tmp_path / "whole").wait() == 0, (tmp_path / "log").read_text()
    killed = tmp_path / "killed"
    for pattern in MOMENTS:
        before = set(killed.glob(pattern))
        process = start(killed)
        while process.poll() is None and not set(killed.glob(pattern)) - before:
            time.sleep(0.001)
        assert process.poll() is None, f"ended before {pattern}: {(tmp_path / 'log').read_text()}"
        process.kill()
        process.wait()
    assert start(killed).wait() == 0, (tmp_path / "log").read_text()

    wanted, found = content(tmp_path / "whole"), content(killed)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert sum(name.endswith("model.safetensors") for name in wanted) == 2 + 9 * 2
    assert sum(name.endswith("report.html") for name in wanted) == 1 + 2 + 9 * 2
    hidden = {path.name for path in killed.rglob(".*")}
    assert hidden == {".lock", ".synthetic.json"}


def content(workdir):
    """All that a run computed, by file, without times; of other files that they are there."""
    found = {}
    for path in workdir.rglob("*"):
        name = path.relative_to(workdir).as_posix()
        if name.startswith("data/") or "checkpoints" in name or "events" in name:
            continue
        if path.suffix in (".safetensors", ".png"):
            found[name] = path.read_bytes()
        elif path.suffix == ".npz":
            with np.load(path) as arrays:
                found[name] = {key: arrays[key].tobytes() for key in arrays.files}
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text()), workdir)
        elif path.suffix == ".jsonl":
            lines = path.read_text().splitlines()
            found[name] = [without_times(json.loads(line), workdir) for line in lines]
        else:
            found[name] = None
    return found


def without_times(value, workdir):
    if isinstance(value, dict):
        return {k: without_times(v, workdir) for k, v in value.items() if k not in TIMES}
    if isinstance(value, list):
        return [without_times(item, workdir) for item in value]
    return value.replace(str(workdir), "") if isinstance(value, str) else value
