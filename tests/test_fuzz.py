"""Damaged and hostile inputs: each loads or raises the project's own error, soon, in little room.

A share of them whenever the slow tests run. All 20,000, which take some minutes:

    MEDMERGE_JAX_FUZZ=20000 pytest tests/test_fuzz.py -m slow -s

The inputs depend on the seed alone: `MEDMERGE_JAX_FUZZ_SEED=1` gives others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.programs import with_helpers

COUNT = int(os.environ.get("MEDMERGE_JAX_FUZZ", "2000"))
SEED = os.environ.get("MEDMERGE_JAX_FUZZ_SEED", "0")

# Each group runs in a process of its own, which takes some seconds to start.
GROUPS = {
    "weights": ("safetensors", "pth", "pth_stream", "npz", "model", "timm"),
    "images": ("jpeg", "png", "dicom"),
    "tables": (
        "table", "aptos2019", "eyepacs", "ham10000", "ham10000_dataverse", "isic2019", "chexpert",
        "rsna",
    ),
    "archives": ("cifar", "cifar_archive", "pneumoniamnist", "chestmnist", "hashes"),
    "config": ("config", "run_directory"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is measured by Linux"
)
def test_every_input_loads_or_is_refused(group, tmp_path):
    if "dicom" in GROUPS[group]:
        pytest.importorskip("pydicom")
    count = -(-COUNT // sum(map(len, GROUPS.values())))  # of each kind
    folder, kinds = tmp_path / "work", GROUPS[group]
    command = [sys.executable, "-m", "helpers.fuzz_worker", folder, str(count), SEED, *kinds]
    seconds = 120 + count * len(GROUPS[group])
    try:
        done = subprocess.run(
            command, env=with_helpers(), capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs at {(tmp_path / 'work/at').read_text()}, seed {SEED}")
    if done.returncode:
        at = tmp_path / "work/at"
        pytest.fail(f"died at {at.read_text() if at.exists() else 'start'}:\n{done.stderr[-3000:]}")
    summaries = [json.loads(line) for line in done.stdout.splitlines()]
    assert [summary["kind"] for summary in summaries] == list(GROUPS[group])
    for summary in summaries:
        print({**summary, "failed": len(summary["failed"])})
        assert not summary["failed"], (summary["kind"], SEED, *summary["failed"][0])
        # Damage that is always refused at the first byte would find nothing.
        assert summary["loaded"] > 0, summary
        assert summary["refused"] > 0, summary


# Readers that take memory, run code, never end, raise another error, and say too much.
BROKEN = """
import os, time
from helpers import fuzz_worker
import numpy as np
from helpers.fuzz_cases import CASES, Case
from medmerge_jax.errors import UserError

def memory():
    try:
        np.empty(2**32, np.uint8)
    except MemoryError as error:
        raise UserError("damaged") from error

def talk():
    raise UserError("a line\\n" * 9999)

readers = {{
    "memory": memory, "code": lambda: os.system("true"), "hang": lambda: time.sleep(9),
    "raise": lambda: 1 / 0, "talk": talk,
}}
for name, reader in readers.items():
    def case(folder, reader=reader):
        return Case([0], lambda rng, seed: 1, lambda value: value and reader())
    CASES[name] = case
fuzz_worker.SECONDS, fuzz_worker.WARM_UP = 0.2, 0
fuzz_worker.main({folder!r}, 2, 0, *readers)
"""


def test_the_worker_finds_what_it_looks_for(tmp_path):
    command = [sys.executable, "-c", BROKEN.format(folder=str(tmp_path / "work"))]
    done = subprocess.run(command, env=with_helpers(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    failed = {one["kind"]: one["failed"] for one in map(json.loads, done.stdout.splitlines())}
    words = {
        "memory": "out of memory", "code": "os.system", "hang": "TooLongError",
        "raise": "ZeroDivisionError", "talk": "a message of 69993 characters",
    }  # fmt: skip
    assert failed.keys() == words.keys()
    for kind, word in words.items():
        assert [number for number, _ in failed[kind]] == [0, 1]
        assert all(word in outcome for _, outcome in failed[kind]), failed[kind]
