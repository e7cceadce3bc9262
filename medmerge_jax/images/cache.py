"""Images decoded and resized once, kept as one array on the disk."""

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import PIL

from medmerge_jax.errors import UserError
from medmerge_jax.images import cache_size
from medmerge_jax.images.decode import read_image, resize_pixels
from medmerge_jax.models.preprocessing import PLAIN, Rendering
from medmerge_jax.runtime.cpu import usable_cores
from medmerge_jax.storage import atomic, locks

_FORMAT = 3
"""Raised whenever the same files would give other pixels than before."""

_CHUNK = 16
"""Images per task: enough to hide the cost of a task, few enough for a smooth progress bar."""

_SAMPLED = 64
"""Files of which some bytes belong to the key."""

_SAMPLE = 2**16
"""Bytes at the beginning and at the end of each of these."""


class Images(Protocol):
    """What is decoded, such as a `data.Split`.

    Attributes:
      ids: Names that do not depend on where the images lie.
      paths: The image files, or the archives that images come from that are decoded already.
      pixels: uint8 (n, h, w) or (n, h, w, 3) of these; None for files.
    """

    @property
    def ids(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def paths(self) -> tuple[Path, ...]: ...  # noqa: D102
    @property
    def pixels(self) -> np.ndarray | None: ...  # noqa: D102

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True, eq=False)
class Pixels:
    """The images of a split.

    Attributes:
      array: uint8 (n, size, size, 3), read-only, mapped from the disk.
      sha256: Of the pixels, in hexadecimal.
    """

    array: np.ndarray
    sha256: str


class UnreadableError(UserError):
    """Some images cannot be read.

    Attributes:
      problems: Why, a line for each, by row.
    """

    def __init__(self, problems: dict[int, str], total: int):
        super().__init__(unreadable_text(problems.values(), total))
        self.problems = problems


def unreadable_text(problems: Iterable[str], total: int) -> str:
    """What is said of images that cannot be read, all of them."""
    lines = [f"  {problem}" for problem in problems]
    return "\n".join([f"{len(lines)} of {total} images cannot be read:", *lines])


def cached_pixels(
    split: Images,
    size: int,
    resize: str,
    cache_dir: Path,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    rendering: Rendering = PLAIN,
) -> Pixels:
    """The split's images as `decode.read_image` gives them, decoded at most once.

    Images that come decoded (`Images.pixels`) are only resized.

    The file's name is a hash of all that shapes it: the folder, ids, sizes and times (of
    modification and of change) of the images or of the archives that they come from, the bytes of
    some of them, size, resize, rendering and the version of Pillow. It appears whole or not at
    all; several processes may ask for the same one. What an interrupted process had decoded is
    kept beside it with checksums, and the next call goes on from there.

    Args:
      split: The images.
      size: Height and width in pixels.
      resize: See `decode.read_image`.
      cache_dir: Made if missing.
      workers: Threads that decode; the number of usable cores by default.
      progress: Called as progress(done, total) from the calling thread, first with what was done
        before.
      rendering: See `decode.read_image`.

    Raises:
      UnreadableError: Images that cannot be read, all at once. They are noted in the cache, so
        that the next call need not decode the others to find them.
      UserError: The cache cannot be written, or is bounded and full of what is in use.
    """
    if not len(split):
        raise UserError("a split without images has no pixels; give the split images")
    decoded = None if split.pixels is None else split.pixels.shape
    look = dataclasses.astuple(rendering)
    shapers = [_FORMAT, PIL.__version__, size, resize, look, decoded, state_of(split)]
    name = hashlib.sha256(json.dumps(shapers).encode()).hexdigest()[:32]
    progress = progress or (lambda done, total: None)
    array_path, card_path = cache_dir / f"{name}.npy", cache_dir / f"{name}.json"
    damaged_path = cache_dir / f"{name}.unreadable.json"

    def read(row: int) -> np.ndarray:
        if split.pixels is None:
            return read_image(split.paths[row], size, resize, rendering)
        return resize_pixels(split.pixels[row], size, resize)

    shape = (len(split), size, size, 3)
    cached = _open(array_path, card_path, shape)
    if cached is None:
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            # Others that want the same images wait here. Where files cannot be locked they decode
            # them themselves, which costs time only.
            with locks.waited_for(cache_dir / f"{name}.lock") as locked:
                cached = _open(array_path, card_path, shape)
                if cached is None:  # No other process has made it meanwhile.
                    _raise_again(damaged_path, read, len(split))
                    cache_size.make_room(cache_dir, array_path, math.prod(shape))
                    with _part(array_path, shape, locked) as part:
                        _fill(part, read, shape, workers or usable_cores(), progress)
                        # The card comes before the array: of a process that is killed between the
                        # two, the part remains.
                        card = {"sha256": part.digest.hexdigest(), "shape": list(shape)}
                        atomic.write_json(card_path, card)
                    cached = _open(array_path, card_path, shape)
        except UnreadableError as error:
            with contextlib.suppress(OSError):
                atomic.write_json(damaged_path, sorted(error.problems))
            raise
        except OSError as error:
            what = f"the cache of decoded images cannot be written ({error.strerror})"
            if error.errno in atomic.DISK_FULL:
                what = f"the disk is full; the decoded images take {math.prod(shape) / 1e6:.0f} MB"
            raise UserError(
                f"{cache_dir}: {what}. Make room there, or set MEDMERGE_JAX_CACHE to a folder on "
                "another disk that can be written"
            ) from error
    if cached is None:
        raise UserError(f"{array_path}: changed while it was opened; run the command again")
    progress(len(split), len(split))
    return cached


def state_of(split: Images) -> str:
    """A hash by which the files of another data set, or these after a change, are told apart.

    Names, sizes and times of modification do not suffice: archives and copies keep the times, and
    files of uncompressed pixels have one size.

    Raises:
      UnreadableError: Files that are not there.
    """
    stats: dict[Path, tuple[int, int, int]] = {}
    missing: dict[Path, str] = {}
    for path in dict.fromkeys(split.paths):  # Decoded images share an archive.
        try:
            stat = path.stat()
        except OSError as error:
            missing[path] = f"{path}: {error.strerror}"
        else:
            stats[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    if missing:
        problems = {row: missing[p] for row, p in enumerate(split.paths) if p in missing}
        raise UnreadableError(problems, len(split))
    folder = Path(os.path.commonpath({path.parent.absolute() for path in stats})).resolve()
    states = [(name, *stats[path]) for name, path in zip(split.ids, split.paths, strict=True)]
    described = [os.fspath(folder), states, _sampled_bytes(list(stats))]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _sampled_bytes(paths: list[Path]) -> str:
    """sha256 of the first and last bytes of some of the files, evenly chosen."""
    digest = hashlib.sha256()
    for path in paths[:: -(-len(paths) // _SAMPLED)]:
        # A file that cannot be opened is found when it is decoded.
        with contextlib.suppress(OSError), path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(file.tell(), file.seek(0, os.SEEK_END) - _SAMPLE))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _raise_again(noted: Path, read: Callable[[int], np.ndarray], total: int) -> None:
    """Raises an UnreadableError at once if the rows that could not be read still cannot."""
    try:
        rows = [int(row) for row in atomic.read_json(noted)]
    except (OSError, ValueError, TypeError):
        return
    problems = {}
    for row in rows:
        try:
            read(row)
        except UserError as error:
            problems[row] = str(error)
        except IndexError:
            return
    if len(problems) == len(rows) > 0:
        raise UnreadableError(problems, total)


def _open(array_path: Path, card_path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """None unless the files are there, whole and of this shape; then nobody removes them."""
    if not cache_size.use(array_path):
        return None
    try:
        digest = atomic.read_json(card_path)["sha256"]
        array = np.load(array_path, mmap_mode="r", allow_pickle=False)
        expected = array.offset + array.nbytes
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    if array.shape != shape or array.dtype != np.uint8 or array_path.stat().st_size != expected:
        return None
    return Pixels(array, digest)


class _Part:
    """An array in a file that grows by chunks of rows, and a journal by which to go on with it.

    The journal has a line per chunk: the sha256 of the pixels up to its end. Nothing needs to
    reach the disk in any order: rows that do not match their line are cut off.

    Attributes:
      rows: In the array.
      digest: Of their pixels.
    """

    def __init__(self, pixels: BinaryIO, journal: BinaryIO, shape: tuple[int, ...]):
        self.rows = 0
        self.digest = hashlib.sha256()
        self._pixels, self._journal = pixels, journal
        header = _header(shape)
        row_bytes = math.prod(shape[1:])
        pixels.seek(0)
        journal.seek(0)
        intact = pixels.read(len(header)) == header
        while intact and self.rows < shape[0]:
            chunk = min(_CHUNK, shape[0] - self.rows)
            digest = self.digest.copy()
            digest.update(pixels.read(chunk * row_bytes))
            intact = journal.read(len(_line(digest))) == _line(digest)
            if intact:
                self.rows, self.digest = self.rows + chunk, digest
        journal.truncate(-(-self.rows // _CHUNK) * len(_line(self.digest)))
        pixels.truncate(len(header) + self.rows * row_bytes if self.rows else 0)
        if not self.rows:
            pixels.write(header)

    def append(self, pixels: np.ndarray) -> None:
        """Adds a chunk. It is written, not mapped: a full disk under a mapped file kills."""
        self._pixels.write(pixels.data)
        self._pixels.flush()
        self.digest.update(pixels.data)
        self.rows += len(pixels)
        self._journal.write(_line(self.digest))
        self._journal.flush()


def _header(shape: tuple[int, ...]) -> bytes:
    header = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, description)
    return header.getvalue()


def _line(digest: "hashlib._Hash") -> bytes:
    return f"{digest.hexdigest()}\n".encode()


@contextlib.contextmanager
def _part(path: Path, shape: tuple[int, ...], locked: bool) -> Iterator[_Part]:
    """What becomes the file `path` at the end, with the rows that an earlier process left.

    It stays if this process is interrupted too.
    """
    folder = cache_size.part_of(path)
    if locked:  # What else killed processes left of this array goes.
        for leftover in set(path.parent.glob(f".{path.stem}.*")) - {folder}:
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    else:  # Another process may be writing the same part.
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=path.parent))
    array, journal = folder / "pixels.npy", folder / "journal"
    try:
        folder.mkdir(exist_ok=True)
        with array.open("a+b") as array_file, journal.open("a+b") as journal_file:
            part = _Part(array_file, journal_file, shape)
            # Hours of decoding should not end at a full disk. Some file systems report 0 of 0.
            disk = shutil.disk_usage(folder)
            if disk.total and disk.free < (shape[0] - part.rows) * math.prod(shape[1:]):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            yield part
            array_file.flush()
            os.fsync(array_file.fileno())
        array.replace(path)
    except BaseException as error:
        if not locked or isinstance(error, OSError | UserError):
            shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


def _fill(
    part: _Part,
    read: Callable[[int], np.ndarray],
    shape: tuple[int, ...],
    workers: int,
    progress: Callable[[int, int], None],
) -> None:
    """Appends the images that are missing, in order, decoded a bounded number ahead.

    By threads, because Pillow releases the interpreter's lock while it decodes and resizes;
    processes would have to be spawned, never forked, from a process that may have started JAX.
    """

    def decode_rows(rows: range) -> tuple[np.ndarray, dict[int, str]]:
        pixels = np.zeros((len(rows), *shape[1:]), np.uint8)
        problems = {}
        for place, row in enumerate(rows):
            try:
                pixels[place] = read(row)
            except UserError as error:
                problems[row] = str(error)
        return pixels, problems

    total, done = shape[0], part.rows
    chunks = (range(total)[first : first + _CHUNK] for first in range(done, total, _CHUNK))
    problems: dict[int, str] = {}
    pending: deque[Future[tuple[np.ndarray, dict[int, str]]]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        while done < total:
            progress(done, total)
            room = 4 * workers + 1 - len(pending)
            pending.extend(pool.submit(decode_rows, rows) for rows in islice(chunks, room))
            pixels, chunk_problems = pending.popleft().result()
            problems |= chunk_problems
            if not problems:
                part.append(pixels)
            done += len(pixels)
    finally:
        pool.shutdown(cancel_futures=True)
    if problems:
        raise UnreadableError(problems, total)
