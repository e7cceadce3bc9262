"""The launchers: the scripts run with stand-ins for SLURM and Python, the manifests are read."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from absl import flags
from packaging.requirements import Requirement

from medmerge_jax.commands import run
from medmerge_jax.config import Study
from medmerge_jax.runtime import preemption

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = ("one_machine.sh", "slurm.sh", "try_slurm.sh")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Puts a bash script of this name before all programs; `$LOG` is what it can write to."""
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    (tmp_path / "log").touch()

    def write(name, script):
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)

    return write


@pytest.fixture
def log(tmp_path):
    return (tmp_path / "log").read_text


@pytest.fixture
def launch():
    """Starts a script as the leader of a process group, of which the test leaves nothing."""
    jobs = []
    # Tests in the background of a shell ignore it, and so would what they start.
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)

    def start(script, *arguments, **environment):
        command, environment = [LAUNCH / script, *arguments], {**os.environ, **environment}
        jobs.append(subprocess.Popen(command, env=environment, start_new_session=True))
        return jobs[-1]

    yield start
    signal.signal(signal.SIGINT, heeded)
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / name, os.X_OK)


@pytest.mark.parametrize("name", [*SCRIPTS, "kubernetes.yaml", "Containerfile", "apptainer.def"])
def test_the_head_has_a_command_and_configs_that_are_there(name):
    text = (LAUNCH / name).read_text()
    head = re.match(r"(?:#.*\n)+", text)[0]
    assert f"launch/{name}" in head
    assert all(len(line) <= 100 for line in text.splitlines())
    for config in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / config).is_file()


def test_the_flags_are_those_of_the_program():
    used = set()
    for name in (*SCRIPTS, "kubernetes.yaml"):
        text = (LAUNCH / name).read_text()
        for line in re.findall(r"(?:medmerge_jax\.main|--coordinator|- --).*", text):
            used |= set(re.findall(r"--([a-z_]+)(?=[ =])", line))
    assert {"config", "workdir", "coordinator", "num_processes", "process_id"} <= used
    assert run.__doc__ and used <= set(flags.FLAGS)  # the import defines them


# SLURM


def test_slurm_is_asked_for_a_signal_and_the_queue():
    requests = re.findall(r"^#SBATCH (\S+)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    # Without append, a requeued job would empty the log.
    assert {"--requeue", "--signal=USR1@120", "--open-mode=append"} <= set(requests)
    # As many as of a task of a study's array; with none each GPU would be fed by one core.
    assert f"--cpus-per-task={Study().cpus}" in requests


@pytest.mark.parametrize(
    "status, restarts, requeued",
    [
        (0, 0, False),
        (1, 0, False),
        (2, 0, False),  # the config is wrong
        (preemption.EXIT_STATUS, 99, True),
        (128 + signal.SIGKILL, 0, False),  # out of memory
        (128 + signal.SIGUSR1, 0, True),
        (128 + signal.SIGTERM, 0, True),
        (128 + signal.SIGABRT, 9, True),
        (128 + signal.SIGABRT, 10, False),
    ],
)
def test_slurm_requeues_what_a_signal_stopped(status, restarts, requeued, launch, stand_in, log):
    stand_in("srun", f'printf "<%s>" "$@" >>"$LOG"; exit {status}')
    stand_in("scontrol", 'echo "scontrol $@" >>"$LOG"')
    job = launch(
        "slurm.sh", "--config", "a b.py", SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(restarts)
    )
    assert job.wait(60) == status
    assert "<python><-m><medmerge_jax.main><--config><a b.py>" in log()
    assert log().count("scontrol requeue 17\n") == requeued


def test_slurm_gives_the_others_a_minute_when_one_task_ends(launch, stand_in, log):
    stand_in("srun", 'echo "$SRUN_CPUS_PER_TASK $@" >>"$LOG"')
    assert launch("slurm.sh", SLURM_CPUS_PER_TASK="4").wait(60) == 0
    assert log().startswith("4 --kill-on-bad-exit=0 --wait=60 python")


def test_slurm_runs_a_python_in_a_container(launch, stand_in, log):
    stand_in("srun", 'printf "<%s>" "$@" >>"$LOG"')
    job = launch("slurm.sh", "--x=1", PYTHON="apptainer exec --nv medmerge.sif python")
    assert job.wait(60) == 0
    assert "<apptainer><exec><--nv><medmerge.sif><python><-m><medmerge_jax.main><--x=1>" in log()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_outlives_a_signal_to_stop_but_not_scancel(number, launch, stand_in, log):
    stand_in("srun", 'trap "exit 75" USR1 TERM; echo started >>"$LOG"; while :; do sleep 0.1; done')
    stand_in("scontrol", 'echo "scontrol $@" >>"$LOG"')
    job = launch("slurm.sh", SLURM_JOB_ID="17")
    wait_for(lambda: "started" in log())
    os.killpg(job.pid, number)
    cancelled = number == signal.SIGTERM
    assert job.wait(60) == (-number if cancelled else preemption.EXIT_STATUS)
    assert log().count("scontrol requeue 17\n") == (not cancelled)


# One machine


def test_one_process_has_all_devices(launch, stand_in, log, monkeypatch):
    stand_in("python", 'printf "<%s>" "$CUDA_VISIBLE_DEVICES" "$@" >>"$LOG"; exit 75')
    for devices in (None, "2,3"):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        chosen = {} if devices is None else {"CUDA_VISIBLE_DEVICES": devices}
        assert launch("one_machine.sh", "--config", "a b.py", **chosen).wait(60) == 75
        assert f"<{devices or ''}><-m><medmerge_jax.main><--config><a b.py>" in log()


@pytest.mark.parametrize("devices", ["", "4,6,7"])
def test_several_processes_share_the_devices(devices, launch, stand_in, log):
    stand_in("python", 'echo "$CUDA_VISIBLE_DEVICES $@" >>"$LOG"; exit $((6 - ${@: -1} * 3))')
    job = launch("one_machine.sh", "--x=1", PROCESSES="3", CUDA_VISIBLE_DEVICES=devices)
    assert job.wait(60) == 6  # the highest
    lines = sorted(log().splitlines())
    visible, options = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert ",".join(visible) == (devices or "0,1,2")
    (port,) = {re.search(r"--coordinator localhost:(\d+)", line)[1] for line in options}
    for number, line in enumerate(options):
        assert line == (
            f"-m medmerge_jax.main --x=1 --coordinator localhost:{port} --num_processes 3 "
            f"--process_id {number}"
        )


@pytest.mark.parametrize(
    "processes, number",
    [
        (1, signal.SIGUSR1),
        (1, signal.SIGTERM),
        (2, signal.SIGUSR1),
        (2, signal.SIGTERM),
        (2, signal.SIGINT),
    ],
)
def test_a_signal_reaches_all_processes(processes, number, launch, stand_in, log):
    stand_in(
        "python",
        """trap 'echo USR1 >>"$LOG"; sleep 0.5; exit 75' USR1
        trap 'echo TERM >>"$LOG"; sleep 0.5; exit 75' TERM
        echo started >>"$LOG"
        while :; do sleep 0.1; done""",
    )
    job = launch("one_machine.sh", PROCESSES=str(processes))
    wait_for(lambda: log().count("started") == processes)
    job.send_signal(number)
    assert job.wait(60) == preemption.EXIT_STATUS
    assert log().count("USR1" if number == signal.SIGUSR1 else "TERM") == processes


def test_a_signal_while_processes_are_started_reaches_them(launch, stand_in, log):
    """The first process sends it. The second may not handle it yet, and then ends by it."""
    stand_in(
        "python",
        """trap 'echo TERM >>"$LOG"; exit 75' TERM
        [ "${@: -1}" = 0 ] && kill -TERM "$PPID"
        while :; do sleep 0.1; done""",
    )
    job = launch("one_machine.sh", PROCESSES="2")
    assert job.wait(60) in (preemption.EXIT_STATUS, 128 + signal.SIGTERM)
    assert log().count("TERM") in (1, 2)


@pytest.mark.slow
def test_two_processes_stop(launch, compiled_programs, monkeypatch, tmp_path):
    """And save; how they resume is in test_chaos.py."""
    python = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{python}:{os.environ['PATH']}")
    monkeypatch.setenv("MEDMERGE_JAX_CACHE", str(compiled_programs))
    workdir = tmp_path / "run"
    command = [f"--config={ROOT / 'tests' / 'helpers' / 'tiny_config.py'}", f"--workdir={workdir}"]
    more = ["--config.recipe=ft", "--config.ft.epochs=500"]
    metrics = workdir / "metrics.jsonl"
    job = launch("one_machine.sh", *command, *more, PROCESSES="2")
    wait_for(lambda: job.poll() is not None or (metrics.exists() and metrics.read_text()), 300)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(120) == preemption.EXIT_STATUS
    assert not (workdir / "results.json").exists()
    saved = [path for path in (workdir / "checkpoints" / "ft").iterdir() if path.name.isdecimal()]
    assert saved


# Kubernetes


@pytest.fixture(scope="module")
def jobset():
    return yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())


def test_kubernetes_names_one_coordinator_and_counts_alike(jobset):
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (job,) = jobset["spec"]["replicatedJobs"]
    name, spec = jobset["metadata"]["name"], job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    options = dict(one.removeprefix("--").split("=", 1) for one in container["args"])
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == int(options["num_processes"])
    assert options["process_id"] == "$(JOB_COMPLETION_INDEX)"
    # Pod 0 of job 0, in the subdomain that has the name of the JobSet.
    assert options["coordinator"].split(":")[0] == f"{name}-{job['name']}-0-0.{name}"
    assert jobset["spec"]["network"]["enableDNSHostnames"] is True


def test_kubernetes_restarts_what_was_preempted(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    by_status, by_condition = spec["podFailurePolicy"]["rules"]
    assert {by_status["action"], by_condition["action"]} == {"FailJob"}
    assert by_status["onExitCodes"]["containerName"] == container["name"]
    assert by_status["onExitCodes"]["values"] == [preemption.EXIT_STATUS]
    assert by_condition["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    # The reason that Kubernetes gives for a job that a podFailurePolicy ended.
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    # Kubernetes wants this for a podFailurePolicy; JobSet, not the job, starts pods again.
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert spec["backoffLimit"] == 0


def test_kubernetes_mounts_what_it_names(jobset):
    (job,) = jobset["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    values = [one.split("=", 1)[1] for one in container["args"]]
    values += [variable["value"] for variable in container["env"]]
    for path in (value for value in values if value.startswith("/")):
        assert any(path.startswith(f"{folder}/") for folder in mounts.values())


# Containers


def instructions(name):
    text = re.sub(r"\\\n", " ", (LAUNCH / name).read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in lines]


def sections():
    """Of the Apptainer recipe: what stands under each name, and under None before the first."""
    found, name = {None: []}, None
    for line in (LAUNCH / "apptainer.def").read_text().splitlines():
        if line.startswith("%"):
            name = line[1:]
            found[name] = []
        elif line and not line.startswith("#"):
            found[name].append(line.strip())
    return found


def copied():
    """What docker's context must have."""
    steps = instructions("Containerfile")
    return [source for name, rest in steps if name == "COPY" for source in rest.split()[:-1]]


def test_the_container_copies_what_is_there_and_starts_the_program():
    steps = instructions("Containerfile")
    assert {name for name, _ in steps} <= {
        *("FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT")
    }
    assert {"pyproject.toml", "medmerge_jax", "configs"} <= set(copied())
    assert all((ROOT / source).exists() for source in copied())
    # A list, not a shell's line: a shell as process 1 would keep the signals to itself.
    assert json.loads(dict(steps)["ENTRYPOINT"]) == ["python", "-m", "medmerge_jax.main"]


def test_docker_is_given_what_is_copied_and_no_data():
    lines = [x for x in (ROOT / ".dockerignore").read_text().splitlines() if x[:1] != "#"]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == set(copied())
    assert not [line for line in lines[1:] if not line.startswith("!") and line != "**/__pycache__"]


def test_apptainer_installs_what_docker_does():
    steps, recipe = dict(instructions("Containerfile")), sections()
    assert recipe[None] == ["Bootstrap: docker", f"From: {steps['FROM']}"]
    assert recipe["arguments"] == [steps["ARG"]]
    folder, install = recipe["post"]
    assert (folder, install.replace("{{ EXTRAS }}", "$EXTRAS")) == ("cd /app", steps["RUN"])
    files = dict(line.split() for line in recipe["files"])
    assert set(files) == set(copied())
    assert all(files[source] == f"/app/{Path(source).name}" for source in files)
    assert recipe["environment"][-1] == "export PYTHONNOUSERSITE=1"
    assert recipe["runscript"] == ['exec python -m medmerge_jax.main "$@"']


def test_the_container_installs_extras_that_exist():
    project = (ROOT / "pyproject.toml").read_text()
    extras = [
        *dict(instructions("Containerfile"))["ARG"].removeprefix("EXTRAS=").split(","),
        "gpu12",
    ]
    for extra in extras:
        assert re.search(rf"^{extra} = \[", project, re.MULTILINE)


def test_the_container_is_pinned_to_what_the_project_takes():
    """One version of every package that the two kinds of GPU extras and their packages name."""
    assert re.fullmatch(
        r"python:3\.\d+\.\d+-slim-[a-z]+", dict(instructions("Containerfile"))["FROM"]
    )
    lines = (LAUNCH / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in ("train", "dicom", "gpu", "gpu12"):
        wanted += project["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        if requirement.name != "medmerge-jax":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement
    for cuda in ("12", "13"):
        assert pins[f"jax-cuda{cuda}-plugin"] == pins[f"jax-cuda{cuda}-pjrt"] == pins["jaxlib"]
