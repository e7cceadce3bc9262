"""What makes JAX fast on a CPU and has to be asked for before JAX starts."""

import ctypes
import os
import sys
from importlib import metadata

# Of glibc's <malloc.h>, see mallopt(3).
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8

_FUSION_TYPES = "--xla_cpu_experimental_ynn_fusion_type"


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
    jaxlib is not 0.10: XLA aborts at a flag that it does not know, and this one is experimental.
    """
    given = os.environ.get("XLA_FLAGS", "").strip()
    names_a_file = given and not given.startswith("-")
    known = metadata.version("jaxlib").startswith("0.10.")
    if known and not names_a_file and _FUSION_TYPES not in given:
        os.environ["XLA_FLAGS"] = f"{given} {_FUSION_TYPES}=-individual_convolution".strip()
