"""Reads `.npz` files of unknown origin safely.

`numpy.load` trusts them: it allocates the shape that an array's header claims before it looks at
the data, and it unpacks a whole archive, which may become a thousand times larger. Here the data of
an array must be as long as its header says, an archive may unpack to 20 times its size at most, and
pickled objects are refused.
"""

import contextlib
import math
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.storage.archives import check_list_of_entries

MOST_TIMES, MOST_BESIDES = 20, 2**20
"""Bytes that an archive may unpack to: so many times its own, and these besides. Images and labels
unpack to four times, tables of hashes to six."""

_CHUNK = 2**24
"""Bytes read at once."""


class Member(NamedTuple):
    """An array of an archive that is not read yet."""

    file: IO[bytes]  # at the beginning of its data
    shape: tuple[int, ...]  # as the header says; so much data is there
    dtype: np.dtype  # without Python objects
    fortran: bool  # whether the data is stored column by column


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file by name.

    Raises:
      UserError: The file cannot be read, holds anything but arrays of numbers and texts, or would
        unpack to much more than it has.
    """
    with open_npz(path) as archive:
        arrays = {}
        for name in archive.namelist():
            if not name.endswith(".npy"):
                raise UserError(f"{path}: its member {name!r:.80} is no array (.npy)")
            name = name.removesuffix(".npy")
            with open_member(path, archive, name) as member:
                shape = member.shape[::-1] if member.fortran else member.shape
                array = np.empty(shape, member.dtype)
                fill(array, member.file)
            if array.dtype.kind == "U" and array.size:
                _check_text(array)
            arrays[name] = array.T if member.fortran else array
        return arrays


@contextlib.contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever is wrong with it, then or later, is a UserError."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_checked(file)) as archive:
            _refuse_bombs(path, archive)
            yield archive
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # A malformed archive or array raises exceptions of many kinds.
        raise UserError(
            f"{path}: is damaged, incomplete or no .npz file "
            f"({type(error).__name__}: {error}). Fetch or save it again"
        ) from error


def _checked(file: IO[bytes]) -> IO[bytes]:
    check_list_of_entries(file)
    return file


@contextlib.contextmanager
def open_member(path: Path, archive: zipfile.ZipFile, name: str) -> Iterator[Member]:
    """An array by its name, which is the member's without `.npy`."""
    info = archive.getinfo(f"{name}.npy")
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        old, new = np.lib.format.read_array_header_1_0, np.lib.format.read_array_header_2_0
        shape, fortran, dtype = (old if version == (1, 0) else new)(file)
        if dtype.hasobject:
            raise UserError(f"{path}: {name} holds pickled objects, which are never read")
        data, claimed = info.file_size - file.tell(), math.prod(shape) * dtype.itemsize
        if data != claimed or not dtype.itemsize or min(shape, default=0) < 0:
            raise UserError(
                f"{path}: {name} of type {dtype} and shape {shape} has {data} bytes; {claimed} are "
                "wanted. Fetch or save it again"
            )
        yield Member(file, shape, dtype, fortran)


def fill(array: np.ndarray, file: IO[bytes]) -> None:
    """Reads the contiguous array's bytes from the file."""
    flat = array.reshape(-1).view(np.uint8)
    done = 0
    while done < len(flat):
        data = file.read(min(_CHUNK, len(flat) - done))
        if not data:
            raise EOFError(f"{done} of {len(flat)} bytes are there")
        flat[done : done + len(data)] = np.frombuffer(data, np.uint8)
        done += len(data)


def _check_text(array: np.ndarray) -> None:
    """NumPy makes strings of any numbers; Python crashes later, where it looks at them."""
    numbers = np.dtype(np.uint32).newbyteorder(array.dtype.byteorder)
    if array.reshape(-1).view(numbers).max() > sys.maxunicode:
        raise ValueError("a text that is none")


def _refuse_bombs(path: Path, archive: zipfile.ZipFile) -> None:
    members = archive.infolist()
    if {info.compress_type for info in members} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        raise UserError(f"{path}: is compressed in another way than NumPy does; save it again")
    size, unpacked = path.stat().st_size, sum(info.file_size for info in members)
    if unpacked > MOST_TIMES * size + MOST_BESIDES:
        raise UserError(
            f"{path}: has {size} bytes and would unpack to {unpacked}; refused. If you trust the "
            "file, save it again with numpy.savez"
        )
