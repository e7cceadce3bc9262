"""Ctrl-C, once and twice, wherever the program is: status 130 and never a traceback."""

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.programs import with_helpers

TINY = Path(__file__).parents[1] / "helpers" / "tiny_config.py"
SAYS = "stopped by Ctrl-C; the same command goes on from here\n"

STEP = "medmerge_jax.training.loop:train_step"
CHECKPOINTS = "medmerge_jax.storage.checkpoints:StageCheckpoints"
REPORT = "medmerge_jax.analysis:write_report"
PLACES = (
    "import:jax,import:optax",
    "medmerge_jax.recipes.inputs:write_synthetic",
    "medmerge_jax.recipes.inputs:cached_pixels,medmerge_jax.recipes.inputs:cached_pixels",
    f"{STEP},{STEP}",  # while it compiles
    f"{STEP},medmerge_jax.training.progress:Progress.save_inside_epoch",
    f"{CHECKPOINTS}.save,{CHECKPOINTS}.close",
    f"{STEP},{CHECKPOINTS}._remove_unfinished",
    f"{REPORT},{REPORT}",
)
"""In the order in which a run comes there, as each goes on where the one before was stopped."""


def press(places, *command):
    """The status and stderr of a command of the package, see `helpers.pressed`."""
    result = subprocess.run(
        [sys.executable, "-m", "helpers.pressed", places, *command],
        env=with_helpers(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "Traceback" not in result.stderr, (places, result.stderr)
    return result.returncode, result.stderr


@pytest.mark.parametrize("program", ["medmerge_jax", "medmerge_jax.main", "medmerge_jax.merge"])
@pytest.mark.parametrize("module", ["medmerge_jax.commands", "medmerge_jax.runtime.preemption"])
def test_while_a_program_is_imported_it_ends_without_a_word(program, module):
    assert press(f"import:{module}", program, "--help") == (130, "")


@pytest.mark.slow
def test_while_the_interpreter_ends_all_is_done():
    assert press("exit,exit", "medmerge_jax", "fields", "lp") == (0, "")


@pytest.mark.slow
def test_twice_at_any_moment_of_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(tmp_path / "cache"))
    run = ("medmerge_jax.main", f"--config={TINY}", f"--workdir={tmp_path / 'run'}")
    for places in PLACES:
        status, said = press(places, *run)
        assert (status, said.endswith(SAYS), said.count(SAYS)) == (130, True, 1), (places, said)
    status, said = press("exit", *run)
    assert status == 0, said
    assert (tmp_path / "run" / "report.html").exists()
