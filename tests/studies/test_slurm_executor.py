"""What SLURM is asked for, with a stand-in for its programs; tests/test_slurm.py has a real one."""

import os
import pickle
import re
import shutil
import sys

import pytest

from medmerge_jax.config import Study
from medmerge_jax.errors import UserError
from medmerge_jax.studies import run
from medmerge_jax.studies.executors import EXECUTORS
from medmerge_jax.studies.slurm import LOGS


class Unfinished:
    """A worker with so many jobs before it."""

    def __init__(self, count):
        self._count = count

    def unfinished(self):
        return [f"j{n}" for n in range(self._count)]


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Puts an sbatch before all others that does what the script says; the file that it got."""
    pytest.importorskip("submitit")
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    given = tmp_path / "given"

    def write(script="echo Submitted batch job 17"):
        for name in ("sbatch", "srun"):
            (programs / name).write_text(f'#!/bin/sh\ncat "$1" >{given}\n{script}\n')
            (programs / name).chmod(0o755)
        return given

    return write


def submit(study, count, folder, config_file=None):
    return EXECUTORS["slurm"].run(study, Unfinished(count), folder, config_file)


def options(given):
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", given.read_text(), re.MULTILINE)
    return dict(lines)


def test_the_array_has_what_the_study_says(sbatch, tmp_path, capsys):
    given = sbatch()
    study = Study("slurm", 3, "gpus", "grant", gpus=2, cpus=6, memory=48, minutes=90)
    assert submit(study, 9, tmp_path / "run") is False
    asked = options(given)
    assert {name: asked[name] for name in ("partition", "account", "gpus-per-node", "mem")} == {
        "partition": "gpus", "account": "grant", "gpus-per-node": "2", "mem": "48G",
    }  # fmt: skip
    assert asked["cpus-per-task"] == "6"
    assert "srun --unbuffered" in given.read_text() and "--cpus-per-task=6 " in given.read_text()
    assert (asked["time"], asked["array"], asked["signal"]) == ("90", "0-2%3", "USR2@120")
    assert "requeue" in asked and asked["open-mode"] == "append"
    said = capsys.readouterr().err
    assert "array 17 of 3 tasks" in said and f"{tmp_path / 'run' / LOGS}" in said
    assert f"python -m medmerge_jax status {tmp_path / 'run'}" in said


def test_what_is_left_open_is_not_asked_for(sbatch, tmp_path):
    given = sbatch()
    submit(Study("slurm", gpus=0), 9, tmp_path)
    assert not {"partition", "account", "gpus-per-node", "mem"} & set(options(given))


def test_each_task_is_a_worker_of_the_study_whatever_its_folder(sbatch, tmp_path, monkeypatch):
    sbatch()
    monkeypatch.chdir(tmp_path)
    submit(Study("slurm", 2), 9, tmp_path / "run", "mine.py")
    tasks = sorted((tmp_path / "run" / LOGS).glob("17_*_submitted.pkl"))
    assert [task.name for task in tasks] == ["17_0_submitted.pkl", "17_1_submitted.pkl"]
    for task in tasks:
        command = pickle.loads(task.read_bytes()).function._command
        assert command == (
            *(sys.executable, "-m", "medmerge_jax", "work", str(tmp_path / "run")),
            f"--import={tmp_path / 'mine.py'}",
        )


def test_there_are_no_more_tasks_than_jobs(sbatch, tmp_path, capsys):
    sbatch()
    submit(Study("slurm", 8), 1, tmp_path)
    assert "array 17 of 1 task," in capsys.readouterr().err


def test_a_study_without_open_jobs_asks_for_nothing(sbatch, tmp_path):
    given = sbatch()
    assert submit(Study("slurm", 8), 0, tmp_path) is True
    assert not given.exists()


def test_what_slurm_refuses_is_said_in_its_words(sbatch, tmp_path):
    sbatch("echo 'sbatch: error: invalid partition specified: gpus' >&2; exit 1")
    with pytest.raises(UserError, match=r"invalid partition specified: gpus.*study\.partition"):
        submit(Study("slurm", 2, "gpus"), 9, tmp_path)


def test_a_study_is_submitted_before_anything_is_trained(sbatch, make_config, tmp_path):
    sbatch()
    config = make_config("grid_search", **{"study.executor": "slurm", "study.workers": 2})
    assert run(config, tmp_path / "run") == {}
    assert not list(tmp_path.glob("run/**/metrics.jsonl"))
    statuses = (tmp_path / "run" / "jobs.json").read_text()
    assert "waiting" in statuses and "running" not in statuses


def refused(config, folder):
    with pytest.raises(UserError) as caught:
        run(config, folder)
    assert not folder.exists() or not list(folder.glob("config.json"))
    return str(caught.value)


def test_what_cannot_go_to_slurm_is_refused_before_anything_is_prepared(
    sbatch, make_config, tmp_path, monkeypatch
):
    sbatch()
    single, study = (
        make_config(recipe, **{"study.executor": "slurm"}) for recipe in ("ft", "grid_search")
    )
    assert "launch/slurm.sh" in refused(single, tmp_path / "run")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "there is no sbatch on this machine" in refused(study, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "medmerge-jax[cluster]" in refused(study, tmp_path / "run")
