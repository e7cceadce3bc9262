"""Several processes of one run: how they meet, who writes, and who waits.

All run the same program on the same config. Process 0 alone writes to the run directory and to the
terminal; what it finds there it tells the others, so that all take the same way. Where one process
ends, the others are ended too within half a minute: JAX sees to that.
"""

import contextlib
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

from medmerge_jax.errors import UserError

HEARTBEAT_SECONDS = 20
"""After so long without a sign of life a process counts as lost."""

_END_SECONDS = 30

_ASKED_EVERY, _STOPPED_AFTER = 4, 8
"""Both count calls of `all_stop`, of which there is one before each step. Every so many calls a
process asks the store whether all are to stop; the first process then names a call that lies so
many calls ahead. No process runs more than five steps ahead of another, because the host waits for
the result of an earlier step, which takes all processes. So each has asked, and knows the call at
which all stop, before it comes there."""

_STOP, _END = "medmerge_jax/stop", "medmerge_jax/end"
_WEEK = 7 * 24 * 3600 * 1000


class StoppedElsewhereError(UserError):
    """What the first process could not do, raised in the others."""


class _Us:
    index = 0
    count = 1
    calls = itertools.count()
    stop_calls = itertools.count()
    stop_at: int | None = None
    why = ""
    started = threading.Event()


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Meets the other processes, if there are any; call it before JAX sees its devices.

    Args:
      coordinator: HOST:PORT of process 0, reachable for all.
      num_processes: All together.
      process_id: From 0. With None for all three, SLURM is asked, if it has started more than one.

    Raises:
      UserError: Some but not all are given, or numbers that cannot be, or nobody answers.
    """
    given = {"coordinator": coordinator, "num_processes": num_processes, "process_id": process_id}
    missing = [name for name, value in given.items() if value is None]
    options: dict[str, Any] | None = None
    if len(missing) == len(given):
        if _slurm_has_several():
            options = {"local_device_ids": _slurm_devices()}
    elif missing:
        raise UserError(f"--{missing[0]} is missing: several processes want {_FLAGS}")
    else:
        assert coordinator is not None and num_processes is not None and process_id is not None
        if not 0 <= process_id < num_processes or not coordinator.rpartition(":")[2].isdecimal():
            raise UserError(
                f"--coordinator={coordinator} --num_processes={num_processes} "
                f"--process_id={process_id}: {_FLAGS} with 0 ≤ I < N are wanted"
            )
        if num_processes > 1:
            options = {"coordinator_address": coordinator, "num_processes": num_processes}
            options |= {"process_id": process_id, "cluster_detection_method": "deactivate"}
    if options is not None:
        _initialize(options)
    _Us.started.set()


def _initialize(options: dict[str, Any]) -> None:
    import jax

    # Its handler of SIGTERM takes the place of ours, see `preemption` and `all_stop`.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **options,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=_END_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        where = options.get("coordinator_address", "the first node of the job")
        raise UserError(
            f"the processes did not meet at {where} ({error}); start all of them, and choose a "
            "port that is free and open"
        ) from error
    _Us.index, _Us.count = jax.process_index(), jax.process_count()


_FLAGS = "--coordinator HOST:PORT --num_processes N --process_id I"


def _slurm_has_several() -> bool:
    """Whether this is one of several tasks of srun."""
    is_task = {"SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= os.environ.keys()
    return is_task and int(os.environ.get("SLURM_NTASKS", "1")) > 1


def _slurm_devices() -> list[int] | None:
    """All devices of the node for its only task; otherwise JAX gives each task one."""
    alone = os.environ.get("SLURM_NTASKS") == os.environ.get("SLURM_STEP_NUM_NODES")
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return list(range(int(gpus))) if alone and gpus.isdecimal() and int(gpus) else None


def wait_for_start(seconds: float) -> None:
    """Returns when `start` is done, which another thread calls, or after so many seconds."""
    _Us.started.wait(seconds)


def index() -> int:
    """This process's number."""
    return _Us.index


def count() -> int:
    """All processes of the run."""
    return _Us.count


def is_first() -> bool:
    """Whether this is the process that writes."""
    return _Us.index == 0


def from_first(function: Callable[[], Any]) -> Any:
    """Calls `function` in the first process and returns its JSON value in all of them.

    The others wait. All processes must come here equally often.

    Raises:
      UserError: The function raised it, or an OSError; in the other processes the message says so.
    """
    if _Us.count == 1:
        return function()
    name = f"medmerge_jax/{next(_Us.calls)}"
    if not is_first():
        told = json.loads(_client().blocking_key_value_get(name, _WEEK))
        if told["error"] is not None:
            raise StoppedElsewhereError(told["error"])
        return told["value"]
    try:
        value = function()
    except (UserError, OSError) as error:
        _client().key_value_set(name, json.dumps({"error": str(error)}))
        raise
    _client().key_value_set(name, json.dumps({"error": None, "value": value}))
    return value


@contextlib.contextmanager
def first_alone() -> Iterator[None]:
    """The first process goes through the block while the others wait, then these do.

    For what finds on the disk what another process has left there.
    """
    if not is_first():
        from_first(lambda: None)
        yield
        return
    outcome: Future[None] = Future()
    try:
        yield
        outcome.set_result(None)
    except (UserError, OSError) as error:  # told to the others, who do not enter the block
        outcome.set_exception(error)
    from_first(outcome.result)


def wait_for_all() -> None:
    """Returns when all processes are here, however long that takes."""
    if _Us.count > 1:
        _client().wait_at_barrier(f"medmerge_jax/{next(_Us.calls)}", _WEEK)


def all_stop(asked: str) -> str:
    """Why all processes stop now, at the same call: what one of them was asked by; or "".

    Args:
      asked: By what this one was asked to, or "".
    """
    call = next(_Us.stop_calls)
    if _Us.stop_at is None and call % _ASKED_EVERY == 0:
        told = dict(_client().key_value_dir_get(_STOP))
        if not is_first():
            if asked and not told:
                _client().key_value_set(f"{_STOP}/asked", asked, allow_overwrite=True)
            if f"{_STOP}/at" in told:
                _Us.stop_at, _Us.why = json.loads(told[f"{_STOP}/at"])
        elif asked or told:
            _Us.stop_at, _Us.why = call + _STOPPED_AFTER, asked or told[f"{_STOP}/asked"]
            _client().key_value_set(f"{_STOP}/at", json.dumps([_Us.stop_at, _Us.why]))
    return _Us.why if _Us.stop_at is not None and call >= _Us.stop_at else ""


def end_together(why: str, seconds: float) -> None:
    """Tells the others why this process ends, so that they can, before JAX aborts them.

    Returns when all do the same, or after so many seconds.
    """
    if _Us.count == 1:
        return
    _client().key_value_set(f"{_END}/{_Us.index}", why, allow_overwrite=True)
    deadline = time.monotonic() + seconds
    while len(_client().key_value_dir_get(_END)) < _Us.count and time.monotonic() < deadline:
        time.sleep(0.1)
    if is_first():
        time.sleep(1.0)  # the others ask it


def another_ends() -> str:
    """Why a process has called `end_together`; "" if none has."""
    if _Us.count == 1:
        return ""
    try:
        return next((why for _, why in _client().key_value_dir_get(_END)), "")
    except Exception:  # when JAX is shut down; of a first process that is lost JAX knows itself
        return ""


def _client() -> Any:
    # JAX offers barriers of its own, but of devices: a collective that waits for hours for images
    # to be decoded runs into the time limits of the libraries below it.
    from jax._src.distributed import global_state

    return global_state.client
