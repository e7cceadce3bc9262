"""A share of what benchmarks/chaos.py does, which runs the quickstart and kills it 50 times."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
OVERRIDES = (
    "--config.compare.recipes=('lp_bn_ft','medmerge')",
    "--config.compare.seeds=(0,)",
    "--config.lp.epochs=10",
    "--config.ft.epochs=10",
    "--config.checkpoint_seconds=1",
)


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="wants the repository")
def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), f"--workdir={tmp_path}"]
    options = [f"--config={ROOT}/tests/tiny_config.py:compare", "--kills=5", "--longest=1.5"]
    result = subprocess.run(
        [*script, *options, "--", *OVERRIDES],
        env={**os.environ, "MEDMERGE_JAX_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 of 5 kills ended in the bits of the uninterrupted run" in result.stdout
    assert re.search(r"\b[4-9] model\.safetensors", result.stdout)  # there was something to compare
