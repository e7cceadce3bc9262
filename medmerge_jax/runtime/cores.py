"""How many threads are of use."""

import os


def usable_cores() -> int:
    """CPU cores that this process may use: those of a job, not of its machine, where it is told."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
