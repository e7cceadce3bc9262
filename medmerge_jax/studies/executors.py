"""Where the jobs of a study are run: in this process, or in several on this machine."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from medmerge_jax.config import Study
from medmerge_jax.errors import UserError
from medmerge_jax.registry import Registry
from medmerge_jax.runtime import preemption
from medmerge_jax.runtime.progress import say, untimed
from medmerge_jax.studies.jobs import Job
from medmerge_jax.studies.worker import Worker

Executor = Callable[[Study, Worker, Path, "str | os.PathLike[str] | None"], bool]


@dataclasses.dataclass(frozen=True)
class ExecutorEntry:
    """An entry of `EXECUTORS`.

    Attributes:
      run: Takes the study's settings, a worker, the folder of the study and the config file if
        there is one; returns whether all jobs have ended.
      check: Raises a UserError if jobs like these cannot be run so, before anything is prepared.
    """

    run: Executor
    check: Callable[[Mapping[str, Job]], None] = lambda jobs: None


EXECUTORS: Registry[ExecutorEntry] = Registry("executor")
"""By the value of `study.executor`."""

_POLL = 0.2
_ON_DEATH = 1
"""PR_SET_PDEATHSIG: the signal that a process gets when the one that started it has ended."""
_RESTARTS = 1
"""Of each process that was lost."""

_STOPPED = (preemption.EXIT_STATUS, preemption.INTERRUPTED)


def _here(
    study: Study, worker: Worker, folder: Path, config_file: str | os.PathLike[str] | None
) -> bool:
    """This process does all of them, and helps others that are at work on them."""
    del study, folder, config_file
    worker.work()
    return True


def _processes(
    study: Study, worker: Worker, folder: Path, config_file: str | os.PathLike[str] | None
) -> bool:
    """Several processes on this machine share the cores, or have a GPU each."""
    command = work_command(folder, config_file)
    places = list(_places(study.workers))
    with preemption.deferred(), contextlib.ExitStack() as stack:
        started = [(_start(command, place, stack), place, _RESTARTS) for place in places]
        while started:
            process, place, restarts = started.pop(0)
            status = process.poll()
            if status is None:
                started.append((process, place, restarts))
                preemption.check()
                time.sleep(_POLL / len(started))
            elif status == 2:
                raise UserError("a process of the study could not go on; it says why above")
            elif status in _STOPPED:
                raise preemption.Preempted(f"a process with status {status}")
            elif status and restarts:
                say(f"{place.title} was lost (status {status}); another takes its place")
                started.append((_start(command, place, stack), place, restarts - 1))
            elif status:
                say(f"{place.title} was lost again (status {status}); the others do its share")
    worker.work()  # what no process could do
    return True


EXECUTORS.add("here", ExecutorEntry(_here))
EXECUTORS.add("processes", ExecutorEntry(_processes))


def work_command(folder: Path, config_file: str | os.PathLike[str] | None) -> list[str]:
    """The command of a further worker."""
    registers = [f"--import={os.fspath(config_file)}"] if config_file else []
    return [sys.executable, "-m", "medmerge_jax", "work", os.fspath(folder), *registers]


class _Place:
    """A part of the machine for one process."""

    def __init__(self, number: int, cores: Sequence[int], gpu: str):
        self.title, self.cores, self.gpu = f"process {number + 1}", cores, gpu


def _places(count: int) -> Iterator[_Place]:
    can_choose = hasattr(os, "sched_setaffinity")  # not on macOS
    cores, gpus = sorted(os.sched_getaffinity(0)) if can_choose else [], _gpus()
    for number in range(count):
        share = cores[number * len(cores) // count : (number + 1) * len(cores) // count]
        yield _Place(number, share or cores, gpus[number % len(gpus)] if gpus else "")


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    import jax

    if jax.default_backend() != "gpu":
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",") if visible else [str(one.id) for one in jax.local_devices()]


def _start(command: list[str], place: _Place, stack: contextlib.ExitStack) -> subprocess.Popen[str]:
    # A small program takes the cores before Python with JAX counts them, and has Linux ask the
    # process to stop when this one is killed: nobody would know of it.
    pin = (
        f"import ctypes, os, sys; os.sched_setaffinity(0, {set(place.cores)}); "
        f"ctypes.CDLL(None).prctl({_ON_DEATH}, {signal.SIGTERM.value}); "
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    environment = {**os.environ, **({"CUDA_VISIBLE_DEVICES": place.gpu} if place.gpu else {})}
    process = subprocess.Popen(
        [sys.executable, "-c", pin, *command] if place.cores else command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    assert process.stderr is not None
    reader = threading.Thread(target=_pass_on, args=(process.stderr, place.title), daemon=True)
    reader.start()
    stack.callback(reader.join)
    stack.callback(process.wait)
    stack.callback(process.terminate)  # it saves and ends; nothing if it has ended
    return process


def _pass_on(lines: IO[str], title: str) -> None:
    for line in lines:
        say(f"{title}: {untimed(line.rstrip())}")
