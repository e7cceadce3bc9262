"""A study in an array of a real SLURM, which launch/try_slurm.sh sets up."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.programs import with_helpers

from medmerge_jax.studies.slurm import LOGS
from medmerge_jax.studies.state import DONE, RUNNING, JobStates

ROOT = Path(__file__).parent.parent

CONFIG = """
from helpers import tiny_config, tiny_network

tiny_network.register_architecture()


def get_config():
    config = tiny_config.get_config()
    config.architecture, config.recipe = "one_layer", "fission_fusion"
    config.grid.learning_rates = (1e-1, 1e-2)
    config.grid.augmentations, config.grid.warmup_augmentation = ("none",), "none"
    config.fgg.epochs, config.fgg.cycle = 121, 40
    config.soup.metric, config.soup.num_images = "loss", 16
    config.study.executor, config.study.workers = "slurm", 2
    config.study.gpus, config.study.cpus = 0, 1
    return config
"""


def slurm_is_missing():
    """Why no array can be run here; "" if one can. Not on the cluster that somebody works on."""
    if shutil.which("sbatch") is None:
        return "there is no sbatch: launch/try_slurm.sh sets SLURM up"
    command = ["scontrol", "show", "config"]
    try:
        config = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (subprocess.SubprocessError, OSError) as error:
        return f"SLURM's controller does not answer ({error}): launch/try_slurm.sh starts it"
    ours = re.search(r"^ClusterName\s*= try$", config.stdout, re.MULTILINE)
    return "" if ours else "this SLURM is not that of launch/try_slurm.sh"


@pytest.fixture
def slurm():
    """Calls SLURM's programs."""
    pytest.importorskip("submitit")
    if reason := slurm_is_missing():
        pytest.skip(reason)

    def call(*command):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return call


@pytest.fixture
def content(monkeypatch):
    """What a study computed, by benchmarks/chaos.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    chaos = pytest.importorskip("chaos", reason="wants the repository")

    def of(workdir):
        everything = chaos.content(workdir).items()
        beside = (LOGS, "jobs.json", ".lock")  # of the processes, not of what they computed
        return {name: one for name, one in everything if not name.startswith(beside)}

    return of


@pytest.fixture
def begin(tmp_path, compiled_programs, slurm):
    """Submits the study to SLURM in a folder of this name; the folder and the array's id."""
    arrays = []
    config = tmp_path / "study.py"
    config.write_text(CONFIG)

    def submit(name):
        flags = [f"--config={config}", f"--workdir={tmp_path / name}"]
        result = subprocess.run(
            [sys.executable, "-m", "medmerge_jax.main", *flags],
            env={**with_helpers(), "MEDMERGE_JAX_CACHE": str(compiled_programs)},
            capture_output=True,
            text=True,
        )
        array = re.search(r"SLURM has the study: array (\d+) of 2 tasks", result.stderr)
        assert result.returncode == 0 and array, result.stderr
        arrays.append(array[1])
        return tmp_path / name, array[1]

    yield submit
    for array in arrays:
        slurm("scancel", array)  # if a test has left it


def until(condition, seconds, folder):
    """Waits for the value of a condition; the tasks' logs are shown if it does not come."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        logs = "".join(path.read_text() for path in (folder / LOGS).glob("*.out"))
        assert time.monotonic() < deadline, logs
        time.sleep(0.2)
    return value


def ended(folder, array, slurm):
    """Waits until the array has ended."""
    until(lambda: array not in slurm("squeue", "-h", "-o", "%F").split(), 300, folder)
    assert (folder / "results.json").exists()
    return JobStates(folder).read()


def log(folder, number):
    """Of a task of the array."""
    (path,) = (folder / LOGS).glob(f"*_{number}_0_log.out")
    return path.read_text()


def in_the_middle(folder):
    """Names of two members that are at work, if both are some epochs beyond their fine-tuning."""
    names = [
        name
        for name, entry in JobStates(folder).read().items()
        if entry.status == RUNNING and name.startswith("fgg/")
    ]
    files = [folder / name / "metrics.jsonl" for name in names]
    begun = [file.exists() and file.read_text().count('"fgg"') > 5 for file in files]
    return names if begun == [True, True] else []


@pytest.mark.slow
def test_two_members_that_are_requeued_end_in_the_same_bits(begin, slurm, content):
    whole, array = begin("whole")
    assert {entry.attempts for entry in ended(whole, array, slurm).values()} == {1}

    stopped, array = begin("stopped")
    lost = until(lambda: in_the_middle(stopped), 120, stopped)
    for number in range(2):
        slurm("scontrol", "requeue", f"{array}_{number}")
    entries = ended(stopped, array, slurm)
    assert {entry.status for entry in entries.values()} == {DONE}
    assert [name for name, entry in entries.items() if entry.attempts > 1] == lost
    assert all("stopped by SIGTERM in fgg, after epoch" in log(stopped, n) for n in range(2))
    assert content(stopped) == content(whole)


@pytest.mark.slow
def test_the_signal_before_the_time_is_up_saves_and_requeues_but_a_cancelled_task_ends(
    begin, slurm
):
    folder, array = begin("run")
    lost = until(lambda: in_the_middle(folder), 120, folder)
    slurm("scancel", "--signal=USR2", f"{array}_0")
    slurm("scancel", f"{array}_1")

    def restarts():
        """Of each task; none for one that has ended."""
        jobs = slurm("scontrol", "show", "job", array).split("\n\n")
        found = (
            re.search(r"ArrayTaskId=(\d+).*?JobState=(\w+).*?Restarts=(\d+)", job, re.S)
            for job in jobs
        )
        return {one[1]: one.groups()[1:] for one in found if one}

    until(lambda: restarts()["1"][0] == "CANCELLED", 60, folder)
    until(lambda: restarts()["0"][1] == "1", 60, folder)
    entries = ended(folder, array, slurm)
    assert restarts()["1"] == ("CANCELLED", "0")
    assert [name for name, entry in entries.items() if entry.attempts > 1] == lost
    assert re.search(r"stopped by SIG\w+ in fgg, after epoch", log(folder, 0))
