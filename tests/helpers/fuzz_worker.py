"""python -m helpers.fuzz_worker FOLDER COUNT SEED KIND ...: damaged inputs through their readers.

Prints a line of JSON per kind: what loaded, what was refused, what did neither, the longest time
and the most memory. A process by itself, because it limits its own memory and never undoes it. The
number of the input at hand is in FOLDER/at, for when the process is killed.
"""

import faulthandler
import json
import os
import re
import resource
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import numpy as np

from helpers.fuzz_cases import CASES
from medmerge_jax.errors import UserError

SECONDS = 20
"""For one input, at most."""

WARM_UP = 20

LONGEST = 20_000
"""Characters of a message, at most."""

_PROGRAM = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen",
            "pty.spawn", "socket.connect", "socket.getaddrinfo", "ctypes.dlopen")  # fmt: skip


class TooLongError(BaseException):
    """Not an Exception: no reader may take it for damage."""


def _alarm(*_):
    raise TooLongError(f"more than {SECONDS} s")


class Watch:
    """Python tells of every program started and every connection made, by whatever code."""

    def __init__(self):
        self.seen = []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if event in _PROGRAM:
            self.seen.append(f"{event} {arguments!r:.200}")


def _status(field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def _reset_peak():
    Path("/proc/self/clear_refs").write_text("5")


def _caused_by_memory(error):
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _attempt(read, value):
    """ "loaded", "refused", or what went wrong."""
    try:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        read(value)
        return "loaded"
    except UserError as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if _caused_by_memory(error):
            return f"out of memory: {error!s:.300}"
        str(error).encode("utf-8", "backslashreplace")
        return (
            "refused"
            if len(str(error)) < LONGEST
            else f"a message of {len(str(error))} characters: {error!s:.300}"
        )
    except BaseException:
        return traceback.format_exc()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _damaged(case, rng):
    origins = case.attacks if case.attacks and rng.random() < 0.2 else case.seeds
    return case.mutate(rng, origins[int(rng.integers(len(origins)))])


def fuzz(kind, folder, count, seed, watch):
    """The summary of `count` inputs of one kind."""
    folder.mkdir(parents=True)
    case = CASES[kind](folder)
    for value, wanted in [*((seed, "loaded") for seed in case.seeds),
                          *((attack, "refused") for attack in case.attacks)]:  # fmt: skip
        outcome = _attempt(case.read, value)
        if outcome != wanted:
            raise RuntimeError(f"{kind}: an undamaged input is not {wanted}: {outcome}")
    rng = np.random.default_rng(0)
    for _ in range(WARM_UP):  # what they import and cache is not the inputs' fault
        _attempt(case.read, _damaged(case, rng))
    limit = _status("VmSize") + case.memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    summary = {
        "kind": kind,
        "inputs": count,
        "loaded": 0,
        "refused": 0,
        "failed": [],
        "seconds": 0.0,
        "megabytes": 0,
    }
    watch.seen.clear()
    for number in range(count):
        (folder.parent / "at").write_text(f"{kind} {number}")
        rng = np.random.default_rng([seed, number, *kind.encode()])
        value = _damaged(case, rng)
        _reset_peak()
        before, start = _status("VmRSS"), time.perf_counter()
        outcome = _attempt(case.read, value)
        summary["seconds"] = max(summary["seconds"], time.perf_counter() - start)
        megabytes = (_status("VmHWM") - before) / 2**20
        summary["megabytes"] = max(summary["megabytes"], round(megabytes))
        if outcome in ("loaded", "refused"):
            summary[outcome] += 1
        else:
            summary["failed"].append([number, outcome])
        if watch.seen or (folder / "canary").exists():
            summary["failed"].append([number, f"code was executed: {watch.seen}"])
            watch.seen.clear()
            (folder / "canary").unlink(missing_ok=True)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    summary["seconds"] = round(summary["seconds"], 2)
    return summary


def main(folder, count, seed, *kinds):
    faulthandler.enable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _alarm)
    watch = Watch()
    for kind in kinds:
        print(json.dumps(fuzz(kind, Path(folder) / kind, int(count), int(seed), watch)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
