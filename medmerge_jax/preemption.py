"""Signals that ask the program to stop and to be started again: SIGTERM and SIGUSR1.

Schedulers send them some time before they kill. While a stage trains they are only noted, and
`check` raises at the next step. Elsewhere there is nothing to save: the process ends at once, with
`EXIT_STATUS`, and leaves what it would leave if it were killed.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from medmerge_jax import processes

EXIT_STATUS = os.EX_TEMPFAIL
"""Of a program that was asked to stop (75): the same command goes on from there."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(BaseException):
    """A stage was asked to stop, and did. Like a KeyboardInterrupt, only `main` catches it."""


class _Noted:
    """What happened in this process."""

    name = ""
    depth = 0  # of `deferred`


def install() -> None:
    """Handles the signals from now on; call it in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    del frame
    _Noted.name = signal.Signals(number).name
    if not _Noted.depth:
        # An exception might come up in the middle of an import or of a library's callback, which
        # turn it into errors of their own, or crash.
        os.write(2, f"{message(_Noted.name)}\n".encode())  # it may have come in a print
        os._exit(EXIT_STATUS)


def message(stopped: object) -> str:
    """What the program says at its end."""
    return f"stopped by {stopped}; the same command goes on from here"


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within it the signals are noted, and raise Preempted by `check` only, or when it ends."""
    _Noted.depth += 1
    try:
        yield
    finally:
        _Noted.depth -= 1
    if _Noted.name and processes.count() == 1:
        raise Preempted(_Noted.name)


def check() -> None:
    """Raises Preempted after a signal; costs a microsecond, so it may be called at every step.

    Several processes must call it equally often: then it raises in all of them at the same call.
    """
    if processes.count() > 1:
        if processes.all_stop(bool(_Noted.name)):
            raise Preempted(_Noted.name or "another process's signal")
    elif _Noted.name:
        raise Preempted(_Noted.name)
