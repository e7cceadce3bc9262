"""Images decoded and resized once, kept as one array on the disk."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import PIL

from medmerge_jax import files
from medmerge_jax.data import images
from medmerge_jax.data.dataset import Split
from medmerge_jax.errors import UserError

_FORMAT = 1
"""Raised whenever the same files would give other pixels than before."""

_CHUNK = 16
"""Images per task: enough to hide the cost of a task, few enough for a smooth progress bar."""

_LISTED = 10
"""Unreadable images that an error lists by name."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """The images of a split.

    Attributes:
      array: uint8 (n, size, size, 3), read-only, mapped from the disk.
      sha256: Of the pixels, in hexadecimal.
    """

    array: np.ndarray
    sha256: str


def cached_pixels(
    split: Split,
    size: int,
    resize: str,
    cache_dir: Path,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Pixels:
    """The split's images as `images.read_image` gives them, decoded at most once.

    Images that come decoded (`Split.pixels`) are only resized.

    The file's name is a hash of all that shapes it: ids, sizes and modification times of the
    images (or of the archives that they come from), size, resize and the version of Pillow. It
    appears whole or not at all, so a killed process leaves nothing that counts as a cache;
    several processes may ask for the same one.

    Args:
      split: The images.
      size: Height and width in pixels.
      resize: See `images.read_image`.
      cache_dir: Made if missing.
      workers: Threads that decode; the number of usable cores by default.
      progress: Called as progress(done, total) from the calling thread.

    Raises:
      UserError: Images that cannot be read, all at once; or the cache cannot be written.
    """
    if not len(split):
        raise UserError("a split without images has no pixels; give the split images")
    name = _key(split, size, resize)
    array_path, card_path = cache_dir / f"{name}.npy", cache_dir / f"{name}.json"
    shape = (len(split), size, size, 3)
    found = _open(array_path, card_path, shape)
    if found is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _locked(cache_dir / f"{name}.lock") as locked:
                found = _open(array_path, card_path, shape)  # another process may have made it
                if found is None:
                    if locked:  # then nobody else is writing them
                        _remove_leftovers(cache_dir, name)
                    digest = _build(array_path, split, size, resize, workers or _cores(), progress)
                    files.write_json(card_path, {"sha256": digest, "shape": list(shape)})
                    found = _open(array_path, card_path, shape)
        except OSError as error:
            raise UserError(_explain(error, cache_dir, shape)) from error
    if found is None:
        raise UserError(f"{array_path}: changed while it was opened; run the command again")
    if progress is not None:
        progress(len(split), len(split))
    return found


def _key(split: Split, size: int, resize: str) -> str:
    stats: dict[Path, tuple[int, int]] = {}
    problems = []
    for path in dict.fromkeys(split.paths):  # decoded images have one archive in common
        try:
            stat = path.stat()
        except OSError as error:
            problems.append(f"{path}: {error.strerror}")
        else:
            stats[path] = (stat.st_size, stat.st_mtime_ns)
    _raise_unreadable(problems, len(split))
    states = [(name, *stats[path]) for name, path in zip(split.ids, split.paths, strict=True)]
    decoded = None if split.pixels is None else split.pixels.shape
    shapers = [_FORMAT, PIL.__version__, size, resize, decoded, states]
    return hashlib.sha256(json.dumps(shapers).encode()).hexdigest()[:32]


def _open(array_path: Path, card_path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """None unless the files are there, whole and of this shape."""
    try:
        digest = json.loads(card_path.read_text())["sha256"]
        array = np.load(array_path, mmap_mode="r", allow_pickle=False)
        expected = array.offset + array.nbytes
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    if array.shape != shape or array.dtype != np.uint8 or array_path.stat().st_size != expected:
        return None
    return Pixels(array, digest)


def _build(
    path: Path,
    split: Split,
    size: int,
    resize: str,
    workers: int,
    progress: Callable[[int, int], None] | None,
) -> str:
    """Writes the array in order, from the threads' results; returns the sha256 of the pixels."""
    digest = hashlib.sha256()
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(split), size, size, 3)}
    problems: list[str] = []

    # Written, not mapped: a full disk under a mapped file kills the process.
    def write(file: IO[bytes]) -> None:
        np.lib.format.write_array_header_1_0(file, header)
        done = 0
        for pixels, chunk_problems in _decode(split, size, resize, workers):
            problems.extend(chunk_problems)
            if not problems:
                file.write(pixels.data)
                digest.update(pixels.data)
            done += len(pixels)
            if progress is not None and done < len(split):
                progress(done, len(split))
        _raise_unreadable(problems, len(split))

    files.write_atomically(path, write)
    return digest.hexdigest()


def _decode(
    split: Split, size: int, resize: str, workers: int
) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Chunks in order, a bounded number ahead. Pillow releases the interpreter lock."""

    def decode(rows: range) -> tuple[np.ndarray, list[str]]:
        pixels = np.zeros((len(rows), size, size, 3), np.uint8)
        problems = []
        for place, row in enumerate(rows):
            try:
                pixels[place] = (
                    images.read_image(split.paths[row], size, resize)
                    if split.pixels is None
                    else images.resize_pixels(split.pixels[row], size, resize)
                )
            except UserError as error:
                problems.append(str(error))
        return pixels, problems

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        pending: deque[Future[tuple[np.ndarray, list[str]]]] = deque()
        for start in range(0, len(split), _CHUNK):
            pending.append(pool.submit(decode, range(len(split))[start : start + _CHUNK]))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _raise_unreadable(problems: list[str], total: int) -> None:
    if problems:
        listed = "\n".join(f"  {problem}" for problem in problems[:_LISTED])
        more = f"\n  ... and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(f"{len(problems)} of {total} images cannot be read:\n{listed}{more}")


def _explain(error: OSError, cache_dir: Path, shape: tuple[int, ...]) -> str:
    if error.errno in files.DISK_FULL:
        megabytes = int(np.prod(shape, dtype=np.int64)) / 1e6
        return (
            f"{cache_dir}: the disk is full; the decoded images take {megabytes:.0f} MB. Make "
            "room, or set MEDMERGE_JAX_CACHE to a folder on another disk"
        )
    return (
        f"{cache_dir}: the cache of decoded images cannot be written ({error.strerror}); set "
        "MEDMERGE_JAX_CACHE to a folder that can"
    )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Waits for other processes that build the same cache, so that they decode it once.

    The system frees the lock of a killed process. Yields False where files cannot be locked;
    then several processes may build the same cache, which costs time only.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _remove_leftovers(cache_dir: Path, name: str) -> None:
    """What killed processes left of this cache: see `files.write_atomically` for the names."""
    for path in cache_dir.glob(f".{name}.*"):
        path.unlink(missing_ok=True)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
