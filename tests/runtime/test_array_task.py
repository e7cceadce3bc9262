"""Tasks of an array, with shells as workers: what they make of statuses and of signals."""

import os
import pickle
import subprocess
import sys
import time

import pytest

from medmerge_jax.runtime import array_task
from medmerge_jax.runtime.array_task import ArrayTask

LIGHT = """
import sys
from medmerge_jax.runtime.array_task import ArrayTask
loaded = {"jax", "submitit"} & set(sys.modules)
assert not loaded, loaded
"""

STOPS = 'trap "sleep 0.3; echo saved >>\\"$LOG\\"; exit 75" TERM; echo begun >>"$LOG"'
GOES_ON = "for n in $(seq 300); do sleep 0.1; done; exit 3"


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Reads the lines of a file that workers write to."""
    file = tmp_path / "log"
    file.touch()
    monkeypatch.setenv("LOG", str(file))
    return lambda: file.read_text().splitlines()


@pytest.fixture
def slurm(tmp_path, monkeypatch, log):
    """Puts stand-ins of SLURM's programs before all others; takes the state of the task."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "4")

    def write(state):
        for name in ("squeue", "scontrol"):
            file = programs / name
            file.write_text(f'#!/bin/sh\necho {name} "$@" >>"$LOG"\necho {state}\n')
            file.chmod(0o755)

    return write


def shell(script):
    return ArrayTask(["sh", "-c", script])


def status(task):
    """With which a task ends its process."""
    with pytest.raises(SystemExit) as left:
        task()
    return left.value.code


def test_a_worker_that_ends_well_ends_the_task(log):
    shell('echo worked >>"$LOG"')()
    assert log() == ["worked"]


def test_what_the_user_can_mend_is_not_tried_again(log):
    assert status(shell('echo refused >>"$LOG"; exit 2')) == 2
    assert log() == ["refused"]


@pytest.mark.parametrize("end, left", [("kill -9 $$", 137), ("exit 1", 1)])
def test_a_worker_that_is_lost_has_one_successor(log, capfd, end, left):
    shell(f'echo begun >>"$LOG"; [ $(wc -l <"$LOG") = 2 ] || {end}')()
    assert log() == ["begun", "begun"]
    assert "the worker was lost" in capfd.readouterr().err
    assert status(shell(end)) == left


@pytest.mark.parametrize("end", ["exit 75", "exit 130", "kill -USR2 $$", "kill -TERM $$"])
def test_a_task_whose_worker_a_signal_stopped_goes_back_into_the_queue(log, slurm, end):
    slurm("RUNNING")
    shell(end)()
    assert log() == [
        "squeue --noheader --format=%T --jobs=17_4",
        "scontrol requeue 17_4",
    ]


@pytest.mark.parametrize("state", ["COMPLETING", "PENDING", ""])
def test_a_task_that_slurm_has_ended_stays_so(log, slurm, state):
    """Cancelled tasks are COMPLETING; `scontrol requeue` would run them again."""
    slurm(state)
    assert status(shell("exit 75")) == 75
    assert len(log()) == 1


def test_a_task_imports_nothing_large():
    subprocess.run([sys.executable, "-c", LIGHT], check=True)


def test_a_checkpoint_waits_until_the_worker_has_saved(log):
    pytest.importorskip("submitit")
    task = shell(f"{STOPS}; {GOES_ON}")
    process = subprocess.Popen(task._command)
    task._process = process
    while not log():
        time.sleep(0.01)
    again = task.checkpoint()
    assert log() == ["begun", "saved"]
    assert process.wait() == 75
    assert pickle.loads(pickle.dumps(again.function))._command == task._command


def test_a_worker_that_does_not_save_in_time_is_not_waited_for(log, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(array_task, "_SECONDS", 0.2)
    task = shell('trap "" TERM; echo begun >>"$LOG"; sleep 20')
    task._process = subprocess.Popen(task._command)
    while not log():
        time.sleep(0.01)
    begun = time.monotonic()
    task.checkpoint()
    assert time.monotonic() - begun < 10
    task._process.kill()
    task._process.wait()


def test_submitit_runs_the_task_again_after_its_signal(tmp_path, log):
    """With its executor for this machine, whose jobs it puts back as it does those of SLURM."""
    submitit = pytest.importorskip("submitit")
    executor = submitit.LocalExecutor(tmp_path / "logs")
    executor.update_parameters(timeout_min=5)
    first = f"{STOPS}; kill -USR2 $PPID; {GOES_ON}"
    job = executor.submit(shell(f'[ -s "$LOG" ] && echo again >>"$LOG" && exit 0; {first}'))
    assert job.result() is None
    assert log() == ["begun", "saved", "again"]
