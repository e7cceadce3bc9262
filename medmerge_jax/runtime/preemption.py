"""Signals that ask the program to stop and to be started again: SIGTERM, SIGUSR1/2 and Ctrl-C.

Schedulers send the first three some time before they kill; SIGUSR2 is what submitit asks for. While
a stage trains the signals are only noted, and `check` raises at the next step; a second Ctrl-C does
not wait for that. Elsewhere there is nothing to save: the process ends at once, with
`exit_status()`, and leaves what it would leave if it were killed. Of several processes all end
then, whichever was asked. A thread sees to that, because a main thread that waits for another
process, or for the compiler, does not come to handle signals.
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

INTERRUPTED = 128 + signal.SIGINT
"""Of one that Ctrl-C stopped (130), as shells have it."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

_ONE_PRESS = 0.3
"""Seconds. A Ctrl-C sooner after the first is the same, sent on by a program that started this."""

_PATIENCE = 15.0
"""Seconds in which processes that start meet, and in which all hear that they are to end."""

_STOP = 0
"""No signal has this number."""


class Preempted(BaseException):
    """A stage was asked to stop, and did. Like a KeyboardInterrupt, only `main` catches it."""


class _Noted:
    """What happened in this process."""

    name = ""  # of the last signal, here or in another process
    depth = 0  # of `deferred`
    obeyed = False  # Preempted was raised
    ending = False


def install() -> None:
    """Handles the signals from now on; call it in the main thread, before `processes.start`."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as that of jobs in the background is
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
    _Noted.name = _name(number)


def exit_status() -> int:
    """Of this process, if it was asked to stop."""
    return INTERRUPTED if _Noted.name == _name(signal.SIGINT) else EXIT_STATUS


def _name(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _listen(pipe: int) -> None:
    """Ends the process as soon as a signal has come and no stage is to be saved."""
    first_interrupt = None
    while True:
        if select.select([pipe], [], [], 1.0)[0]:
            number = os.read(pipe, 1)[0]
            if number == _STOP:
                return
            if number in SIGNALS:
                _Noted.name = _name(number)
            if number == signal.SIGINT:
                now = time.monotonic()
                first_interrupt = first_interrupt or now
                if now - first_interrupt > _ONE_PRESS:
                    _end(0.0)
        if _Noted.obeyed:  # all processes end by themselves, whatever else comes now
            continue
        # After a stage that ended before it could stop, too.
        another = processes.another_ends()
        if another or (_Noted.name and not _Noted.depth):
            _Noted.name = _Noted.name or another
            _end(_PATIENCE)


def _end(patience: float) -> None:
    processes.wait_for_start(patience)
    _Noted.ending = True
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    if processes.is_first():
        with contextlib.suppress(OSError):  # whoever read it may have been stopped, too
            os.write(2, f"{message(_Noted.name)}\n".encode())  # the main thread may be in a print
    with contextlib.suppress(Exception):  # another process has ended all the same
        processes.end_together(_Noted.name, patience)
    os._exit(exit_status())


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
    why = processes.all_stop(_Noted.name) if processes.count() > 1 else _Noted.name
    if why:
        _Noted.name, _Noted.obeyed = why, True
        raise Preempted(why)
