"""Signals that ask the program to stop and to be started again: SIGTERM and SIGUSR1.

Schedulers send them some time before they kill. While a stage trains they are only noted, and
`check` raises at the next step. Elsewhere there is nothing to save: the process ends at once, with
`EXIT_STATUS`, and leaves what it would leave if it were killed. Of several processes all end then,
whichever was asked. A thread sees to that, because a main thread that waits for another process, or
for the compiler, does not come to handle signals.
"""

import atexit
import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from medmerge_jax.runtime import processes

EXIT_STATUS = os.EX_TEMPFAIL
"""Of a program that was asked to stop (75): the same command goes on from there."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_PATIENCE = 15.0
"""Seconds in which processes that start meet, and in which all hear that they are to end."""

_ANOTHERS = "another process's signal"
_STOP = 0
"""No signal has this number."""


class Preempted(BaseException):
    """A stage was asked to stop, and did. Like a KeyboardInterrupt, only `main` catches it."""


class _Noted:
    """What happened in this process."""

    name = ""  # of the last signal
    depth = 0  # of `deferred`
    obeyed = False  # Preempted was raised
    ending = False


def install() -> None:
    """Handles the signals from now on; call it in the main thread, before `processes.start`."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        signal.signal(number, note)
    thread = threading.Thread(target=_listen, args=(reading,), name="preemption", daemon=True)
    thread.start()

    def stop() -> None:
        os.write(writing, bytes([_STOP]))
        thread.join(_PATIENCE)

    atexit.register(stop)  # after JAX's own, which waits for the other processes


def note(number: int, frame: FrameType | None = None) -> None:
    """Handles a signal in the main thread."""
    del frame
    while _Noted.ending:
        time.sleep(1.0)  # or it would fail for want of another process, which has ended
    _Noted.name = signal.Signals(number).name


def _listen(pipe: int) -> None:
    """Ends the process as soon as a signal has come and no stage is to be saved."""
    while True:
        if select.select([pipe], [], [], 1.0)[0]:
            number = os.read(pipe, 1)[0]
            if number in SIGNALS:
                _Noted.name = signal.Signals(number).name
            elif number == _STOP:
                return
        if _Noted.obeyed:  # all processes end by themselves, whatever comes now
            return
        # After a stage that ended before it could stop, too.
        if (_Noted.name and not _Noted.depth) or processes.another_ends():
            _end(_Noted.name or _ANOTHERS)


def _end(why: str) -> None:
    processes.wait_for_start(_PATIENCE)
    _Noted.ending = True
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    if processes.is_first():
        with contextlib.suppress(OSError):  # whoever read it may have been stopped, too
            os.write(2, f"{message(why)}\n".encode())  # the main thread may be in a print
    with contextlib.suppress(Exception):  # another process has ended all the same
        processes.end_together(_PATIENCE)
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
        if processes.count() == 1:
            check()
    finally:
        _Noted.depth -= 1


def check() -> None:
    """Raises Preempted after a signal; costs a microsecond, so it may be called at every step.

    Several processes must call it equally often: then it raises in all of them at the same call.
    """
    asked = bool(_Noted.name)
    if processes.all_stop(asked) if processes.count() > 1 else asked:
        _Noted.obeyed = True
        raise Preempted(_Noted.name or _ANOTHERS)
