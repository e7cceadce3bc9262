"""Killed in every stage and resumed, a run leaves what an undisturbed one does.

By benchmarks/chaos.py, which kills the quickstart 50 times, on the smallest experiments.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="wants the repository")
@pytest.mark.parametrize(
    "processes, recipes, kills, models",
    [
        (1, "('lp','lp_bn_ft','medmerge')", 9, 2 + 2 * 2 + 1),
        (2, "('medmerge',)", 3, 2 + 1),
    ],
)
def test_killed_at_random_moments_it_ends_in_the_same_bits(
    tmp_path, compiled_programs, processes, recipes, kills, models
):
    script = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), f"--workdir={tmp_path}"]
    script += [f"--output={tmp_path}/chaos.md"]
    options = [f"--config={ROOT}/tests/helpers/tiny_config.py:compare", f"--processes={processes}"]
    overrides = [f"--config.compare.recipes={recipes}", "--config.compare.seeds=(0,)"]
    environment = {
        **os.environ,
        "MEDMERGE_JAX_CACHE": str(compiled_programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    result = subprocess.run(
        [*script, *options, f"--kills={kills}", "--longest=1", "--", *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{kills} of {kills} kills ended in the bits of the uninterrupted" in result.stdout
    each = kills // 3
    assert f"| together | {each} | {each} | {each} | {kills} |" in result.stdout
    # There was something to compare, and the kills were not all at the same moment.
    assert f" {models} model.safetensors" in result.stdout
    moments = re.findall(r"^\| (.+?) \|.* [1-9]\d* \|$", result.stdout, re.MULTILINE)
    assert len(moments) - 1 >= kills // 2
