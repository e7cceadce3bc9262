"""Jobs of a study in the tasks of a SLURM array, which submitit submits."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medmerge_jax.config import Study
from medmerge_jax.errors import UserError
from medmerge_jax.runtime import processes
from medmerge_jax.runtime.array_task import ArrayTask
from medmerge_jax.runtime.progress import say
from medmerge_jax.studies.executors import EXECUTORS, ExecutorEntry, work_command
from medmerge_jax.studies.jobs import Job
from medmerge_jax.studies.worker import Worker

if TYPE_CHECKING:
    import submitit

LOGS = "slurm"
"""Folder of the study with a log of each task, and with what submitit keeps."""

_SECONDS = 120
"""Before the time is up SLURM sends the signal on which a worker saves; it may do so a minute
earlier."""

_TIMES = 1000
"""So often a task goes back into the queue because its time was up: each time it got further."""


def _submit(
    study: Study, worker: Worker, folder: Path, config_file: str | os.PathLike[str] | None
) -> bool:
    """Leaves the jobs to an array: the last of its tasks writes the results."""
    return bool(processes.from_first(lambda: _submit_once(study, worker, folder, config_file)))


def _submit_once(
    study: Study, worker: Worker, folder: Path, config_file: str | os.PathLike[str] | None
) -> bool:
    tasks = min(study.workers, len(worker.unfinished()))
    if not tasks:
        return True
    logs = folder.absolute() / LOGS
    file = None if config_file is None else Path(config_file).absolute()
    task = ArrayTask(work_command(folder.absolute(), file))
    array = _array(_executor(study, logs), task, tasks)
    say(
        f"SLURM has the study: array {array} of {tasks} task{'s' * (tasks > 1)}, whose logs will "
        f"be in {logs}. See how far it is with: python -m medmerge_jax status {folder}"
    )
    return False


def _executor(study: Study, logs: Path) -> "submitit.SlurmExecutor":
    import submitit

    executor = submitit.SlurmExecutor(logs, max_num_timeout=_TIMES)
    wanted: dict[str, Any] = {
        "partition": study.partition,
        "account": study.account,
        "gpus_per_node": study.gpus,
        "mem": f"{study.memory}G" if study.memory else "",
    }
    executor.update_parameters(
        job_name="medmerge",
        time=study.minutes,
        cpus_per_task=study.cpus,
        # srun does not inherit it.
        srun_args=[f"--cpus-per-task={study.cpus}"],
        signal_delay_s=_SECONDS,
        stderr_to_stdout=True,
        additional_parameters={"requeue": True},
        **{name: value for name, value in wanted.items() if value},
    )
    return executor


def _array(executor: "submitit.SlurmExecutor", task: ArrayTask, count: int) -> str:
    """Submits so many equal tasks; the id of the array."""
    import submitit

    try:
        jobs = executor.submit_array([task] * count)
    except (submitit.core.utils.FailedJobError, submitit.core.utils.FailedSubmissionError) as error:
        raise UserError(
            f"SLURM does not take the study ({str(error).strip()}); the fields study.partition, "
            "account, gpus, cpus, memory and minutes say what is asked for, and what has no field "
            "is taken from sbatch's variables, as SBATCH_QOS"
        ) from error
    return jobs[0].job_id.partition("_")[0]


def _check(jobs: Mapping[str, Job]) -> None:
    """Before the images are prepared."""
    if set(jobs) == {""}:
        raise UserError(
            "study.executor = 'slurm' is for studies, and for runs with sources; this is a single "
            "run, which launch/slurm.sh brings to SLURM"
        )
    try:
        import submitit  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "study.executor = 'slurm' wants the package submitit; pip install "
            "'medmerge-jax[cluster]', or in a clone pip install -e '.[cluster]', brings it"
        ) from error
    if missing := [name for name in ("sbatch", "srun") if shutil.which(name) is None]:
        raise UserError(
            f"study.executor = 'slurm', but there is no {missing[0]} on this machine; begin the "
            "study on a login node of the cluster, or with study.executor = 'processes' here"
        )


EXECUTORS.add("slurm", ExecutorEntry(_submit, _check))
