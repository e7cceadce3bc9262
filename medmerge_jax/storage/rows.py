"""Reads rows of an array from its file, so that a disk error can be caught and reported.

Reading a memory-mapped file that was cut short, or whose disk is gone, ends the process (SIGBUS).
"""

import mmap
import os
import weakref
from typing import Any

import numpy as np

from medmerge_jax.errors import UserError


class FileRows:
    """The rows of a mapped array, read from its file.

    It is mapped as by `np.load(path, mmap_mode="r")`. A file that was deleted can still be read to
    its end, because it stays open. One that was cut short raises a UserError.
    """

    def __init__(self, mapped: np.memmap):
        self.shape, self.dtype, self.nbytes = mapped.shape, mapped.dtype, mapped.nbytes
        self._path, self._offset = str(mapped.filename), mapped.offset
        self._row_bytes = mapped.nbytes // len(mapped)
        self._file = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """The rows of these numbers, int (n,), in this order. Threads may read at once."""
        array = np.empty((len(rows), *self.shape[1:]), self.dtype)
        place = memoryview(array.data).cast("B")
        size = self._row_bytes
        for start, row in zip(range(0, len(place), size), rows, strict=True):
            self._read(place[start : start + size], self._offset + int(row) * size)
        return array

    def whole(self) -> np.ndarray:
        """All rows."""
        array = np.empty(self.shape, self.dtype)
        self._read(memoryview(array.data).cast("B"), self._offset)
        return array

    def _read(self, place: memoryview, start: int) -> None:
        done = 0
        while done < len(place):
            try:
                count = os.preadv(self._file, [place[done:]], start + done)
            except OSError as error:
                raise self._lost(error.strerror) from error
            if not count:
                raise self._lost("it is shorter than before")
            done += count

    def _lost(self, why: str | None) -> UserError:
        return UserError(
            f"{self._path}: the decoded images cannot be read any more ({why}). Leave the files in "
            "MEDMERGE_JAX_CACHE alone while a run is at work; the same command decodes the images "
            "again where it must, and goes on from the last checkpoint."
        )


def file_rows(array: Any) -> Any:
    """A whole mapped file as `FileRows`; of anything else its array."""
    if isinstance(array, FileRows):
        return array
    if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and array.size:
        return FileRows(array)
    return np.asarray(array)
