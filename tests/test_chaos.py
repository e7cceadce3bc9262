"""Killed in every stage and resumed, a run leaves what an undisturbed one does.

By benchmarks/chaos.py, which kills the quickstart 50 times, on the smallest experiments.
"""

import importlib
import re
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent


@pytest.fixture
def chaos(warm_programs, compiled_programs, monkeypatch):
    """Calls benchmarks/chaos.py; the programs that it starts are forks of a warm one."""
    if not (ROOT / "benchmarks").exists():
        pytest.skip("wants the repository")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("chaos")

    def start(command, stdout, stderr):
        assert command[:3] == [sys.executable, "-m", "medmerge_jax.main"] and stdout is stderr
        cache = {"MEDMERGE_JAX_CACHE": str(compiled_programs)}
        return warm_programs.start(command[3:], stdout.name, **cache)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["chaos.py", *arguments])
        monkeypatch.setattr(module.subprocess, "Popen", start)
        with pytest.raises(SystemExit) as left:
            module.main()
        return left.value.code

    return call


@pytest.mark.parametrize(
    "processes, recipes, kills, models",
    [
        (1, "('lp','lp_bn_ft','medmerge')", 6, 2 + 2 * 2 + 1),
        (2, "('medmerge',)", 3, 2 + 1),
    ],
)
def test_killed_at_random_moments_it_ends_in_the_same_bits(
    tmp_path, chaos, capsys, processes, recipes, kills, models
):
    status = chaos(
        f"--workdir={tmp_path}",
        f"--output={tmp_path}/chaos.md",
        f"--config={ROOT}/tests/helpers/tiny_config.py:compare",
        f"--processes={processes}",
        f"--kills={kills}",
        "--longest=1",
        "--",
        f"--config.compare.recipes={recipes}",
        "--config.compare.seeds=(0,)",
    )
    said = capsys.readouterr().out
    assert status == 0, said
    assert f"{kills} of {kills} kills ended in the bits of the uninterrupted" in said
    each = kills // 3
    assert f"| together | {each} | {each} | {each} | {kills} |" in said
    # There was something to compare, and the kills were not all at the same moment.
    assert f" {models} model.safetensors" in said
    moments = re.findall(r"^\| (.+?) \|.* [1-9]\d* \|$", said, re.MULTILINE)
    assert len(moments) - 1 >= kills // 2
