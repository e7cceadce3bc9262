"""Ctrl-C while a program starts, when there is nothing to save: it ends without a traceback.

Imports nothing but what Python itself has imported already, so that programs call it first.
"""

import os
import signal
from types import FrameType


def end_at_once() -> None:
    """Has Ctrl-C end the process with status 130, until `preemption.install` takes it over.

    Where it is ignored, as in jobs in the background, or handled by others, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    os._exit(128 + number)  # as shells have it
