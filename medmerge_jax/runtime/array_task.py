"""What a task of a SLURM array does: a command, until it has ended by itself.

submitit unpickles the task in a process of its own, which has nothing else to import.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medmerge_jax.runtime import preemption

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

_SECONDS = 60.0
"""In which the command has saved and ended, or it goes on from its checkpoint before that."""

_POLL = 0.1

_RESTARTS = 1
"""Of a command whose process was lost."""

_REFUSED = 2
"""The status for what the user can mend."""

_STOPPED = (
    preemption.EXIT_STATUS,
    preemption.INTERRUPTED,
    *(-number for number in preemption.SIGNALS),  # before Python could listen
)


_UNBLOCKED = f"""
import os, signal, sys
signal.pthread_sigmask(signal.SIG_UNBLOCK, {[int(number) for number in preemption.SIGNALS]})
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""A program that becomes a command, which shall not inherit that signals wait."""


class ArrayTask:
    """Runs a command that saves on a signal; submitit puts the task back into the queue then.

    The signal that SLURM sends before the time is up goes to all processes of a task; one that
    submitit alone gets is passed on.

    Args:
      command: Ends with the statuses of `commands.entry.start`.
    """

    def __init__(self, command: Sequence[str]):
        self._command = tuple(command)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Returns when the command has ended, or the task is in the queue again.

        Raises:
          SystemExit: The command has failed, or SLURM wants the task to end; without a traceback of
            submitit, so that the log ends with what the command said.
        """
        status = self._run()
        for _ in range(_RESTARTS):
            if status not in (0, _REFUSED, *_STOPPED):
                _say(f"the worker was lost (status {status}); another takes its place")
                status = self._run()
        if status in _STOPPED and _requeue():
            return
        if status:
            sys.exit(status if status > 0 else 128 - status)

    def _run(self) -> int:
        # A signal waits until `checkpoint` can know the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, preemption.SIGNALS)
        try:
            command = [sys.executable, "-c", _UNBLOCKED, *self._command]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, preemption.SIGNALS)
        while not _has_ended(self._process):
            time.sleep(_POLL)
        return self._process.wait()

    def checkpoint(self) -> "DelayedSubmission":
        """The same task anew, when the worker has saved; submitit calls this on its signal."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            self._process.terminate()
            deadline = time.monotonic() + _SECONDS
            while not _has_ended(self._process) and time.monotonic() < deadline:
                time.sleep(_POLL)
        return DelayedSubmission(ArrayTask(self._command))


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without the lock that Popen.poll takes: a signal's handler may wait while `_run` does."""
    with contextlib.suppress(ChildProcessError):  # `wait` has been there
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, process.pid, flags) is not None
    return True


def _requeue() -> bool:
    """Puts the task back into the queue, if SLURM has not ended it.

    That is, for jobs that preempt it: SLURM sends SIGTERM when its time of grace begins, as it does
    when the task is cancelled. A cancelled one would be requeued, too, and `scontrol requeue` has
    done so itself.
    """
    array, number = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
    task = f"{array}_{number}" if array else os.environ.get("SLURM_JOB_ID", "")
    state = _ask("squeue", "--noheader", "--format=%T", f"--jobs={task}")
    if state != "RUNNING":
        _say(f"the worker was stopped; the task is {state or 'unknown'}, so it ends")
        return False
    _ask("scontrol", "requeue", task)
    _say("the worker was stopped; the task is in the queue again")
    return True


def _ask(*command: str) -> str:
    return subprocess.run(command, stdout=subprocess.PIPE, text=True).stdout.strip()


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
