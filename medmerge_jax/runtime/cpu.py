"""The cores there are, and what makes JAX fast on them and is asked for before JAX starts."""

import ctypes
import importlib.util
import mmap
import os
import sys
from pathlib import Path

# Of glibc's <malloc.h>, see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

_FUSION_TYPES = "xla_cpu_experimental_ynn_fusion_type"
_CONVOLUTION = b"LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"


def prepare() -> None:
    """Both of the below. To be called before there are threads."""
    keep_freed_memory()
    convolve_on_all_cores()


def keep_freed_memory() -> None:
    """Keeps what is freed for the next allocation, in place of giving it back to the system.

    On a CPU, XLA allocates all intermediate values of a step as one block and frees it at the end.
    glibc gets a block of that size from the kernel and returns it, every step: a gradient of
    DenseNet-121, batch 4, then takes 190,000 page faults, half of its time. With one arena that
    neither maps blocks apart nor is trimmed, there are none; every other arena maps blocks of
    more than 64 MB apart, and any thread may be the one that allocates. The process keeps the most
    that it ever used. Elsewhere than on Linux with glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, -1)


def convolve_on_all_cores() -> None:
    """Has XLA convolve with Eigen in place of YNNPACK, by an entry in `XLA_FLAGS`.

    YNNPACK shares a convolution among cores by 64 output channels: one with 64 or fewer runs on
    one core. Eigen has none for float64, which then takes ten times as long; the program has no
    use for it. Nothing is changed where `XLA_FLAGS` has the flag already or names a file, or if
    the installed XLA does not know it: it would abort, and the flag is experimental.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    names_a_file = given and not given.startswith("-")
    if not names_a_file and _FUSION_TYPES not in given and _xla_knows_the_flag():
        os.environ["XLA_FLAGS"] = f"{given} --{_FUSION_TYPES}=-individual_convolution".strip()


def _xla_knows_the_flag() -> bool:
    """Whether the names of the flag and of its value are in jaxlib's library.

    JAX can be asked only once its backend has started, and then it is too late for the flag.
    Reading the library takes 0.03 s; it is read again when JAX starts.
    """
    spec = importlib.util.find_spec("jaxlib")
    folders = (spec.submodule_search_locations if spec else None) or ()
    for library in (path for folder in folders for path in Path(folder).glob("libjax_common.*")):
        with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as it:
            return it.find(_FUSION_TYPES.encode()) >= 0 and it.find(_CONVOLUTION) >= 0
    return False


def usable_cores() -> int:
    """CPU cores that this process may use: those of a job, not of its machine, where it is told."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
