"""How much the cache of decoded images may hold, and what of it is in use."""

import contextlib
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from medmerge_jax.errors import UserError
from medmerge_jax.storage import atomic, locks

LIMIT = "MEDMERGE_JAX_CACHE_GB"
"""The variable that bounds the cache, in 10⁹ bytes; without it the cache is not bounded."""

_in_use: dict[Path, int] = {}
"""The arrays that this process has mapped, each with a descriptor whose lock ends with it."""


def use(array: Path) -> bool:
    """Keeps other processes from removing an array as long as this one runs.

    Its time of modification becomes that of its last use.

    Returns:
      Whether the file is there. Where the file system has no locks it is not kept, but nobody
      removes it there either.
    """
    try:
        if array not in _in_use or not atomic.is_at(array, _in_use[array]):
            file = locks.shared(array)
            if not atomic.is_at(array, file):  # it was removed since it was opened
                os.close(file)
                return False
            _in_use[array] = file
    except OSError:
        return False
    with contextlib.suppress(OSError):  # The cache may be another user's, and be only read.
        os.utime(array)
    return True


def make_room(folder: Path, array: Path, needed: int) -> None:
    """Removes what was not used for longest until an array fits in; does nothing without `LIMIT`.

    Arrays that running processes use stay, also those of other hosts if the file system's locks
    reach them. Processes that decode at once do not know of what the others will add.

    Args:
      folder: The cache.
      array: What is to be written; what there is of it already stays.
      needed: Its bytes.

    Raises:
      UserError: `LIMIT` is no positive number, or what is in use leaves too little room.
    """
    limit = _limit()
    if limit is None:
        return
    with locks.waited_for(folder / "room.lock"):
        kept = [one for one in folder.glob("*.npy") if one != array]
        kept += [one for one in folder.glob(".*.part") if one != part_of(array)]
        sizes = {one: _size(one) for one in kept}
        for oldest in sorted(kept, key=_used):
            if sum(sizes.values()) + needed <= limit:
                return
            if _remove(oldest):
                del sizes[oldest]
        if sum(sizes.values()) + needed > limit:
            raise UserError(
                f"{folder}: decoded images of {needed / 1e9:.3g} GB are wanted beside "
                f"{sum(sizes.values()) / 1e9:.3g} GB that are in use, and {LIMIT} = "
                f"{limit / 1e9:g} allows no more. Give it a larger number, or wait for other runs"
            )


def part_of(array: Path) -> Path:
    """The folder in which an array grows."""
    return array.parent / f".{array.stem}.part"


def _limit() -> float | None:
    given = os.environ.get(LIMIT, "").strip()
    if not given:
        return None
    try:
        limit = float(given) * 1e9
    except ValueError:
        limit = math.nan
    if not 0 < limit < math.inf:
        raise UserError(f"{LIMIT} = {given!r}: a positive number of gigabytes is wanted")
    return limit


def _files(entry: Path) -> Iterable[Path]:
    return entry.iterdir() if entry.is_dir() else [entry]


def _size(entry: Path) -> int:
    with contextlib.suppress(OSError):  # It may go at any time.
        return sum(file.stat().st_size for file in _files(entry))
    return 0


def _used(entry: Path) -> float:
    with contextlib.suppress(OSError):
        return max((file.stat().st_mtime for file in _files(entry)), default=0.0)
    return 0.0


def _remove(entry: Path) -> bool:
    """Whether an array, or what a killed process left of one, was in nobody's use and is gone."""
    lock = entry  # an array has its own, what becomes one that under which it is decoded
    with contextlib.suppress(OSError):
        if entry.is_dir():
            lock = entry.with_name(f"{entry.name.removeprefix('.').removesuffix('.part')}.lock")
            lock.touch()
        with locks.unless_held(lock) as alone:
            if alone and entry.is_dir():
                shutil.rmtree(entry)
            elif alone:
                entry.unlink()
                entry.with_suffix(".json").unlink(missing_ok=True)
            return alone
    return False
