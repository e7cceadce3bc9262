"""Files of named tensors."""

import functools
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from medmerge_jax.errors import UserError
from medmerge_jax.storage.archives import check_list_of_entries
from medmerge_jax.storage.atomic import write_atomically
from medmerge_jax.storage.npz import read_npz
from medmerge_jax.weights.lazy import LazyArray
from medmerge_jax.weights.torch_pickle import read_torch_file

SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file by name, with the file's names, layouts and dtypes.

    Args:
      path: As of `read_state_dicts`. Where it holds several dicts of tensors, the names have their
        places before them, "state_dict.conv1.weight".

    Raises:
      UserError: As of `read_state_dicts`.
    """
    state_dicts = read_state_dicts(path)
    several = len(state_dicts) > 1
    return {
        f"{where}.{name}" if where and several else name: np.asarray(tensor)
        for where, tensors in state_dicts.items()
        for name, tensor in tensors.items()
    }


def read_state_dicts(path: Path) -> Mapping[str, Mapping[str, np.ndarray | LazyArray]]:
    """The dicts of tensors in a file by their places in it; the content decides, not the suffix.

    Tensors of a safetensors file are `LazyArray`s, of the others arrays.

    Args:
      path: Safetensors, NumPy's archive, or what `torch.save` wrote (see `torch_pickle`), under
        any name.

    Raises:
      UserError: There is no such file, it is of another kind, or its content cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    for kind, offset, magic, advice in _OTHER_KINDS:
        if start[offset : offset + len(magic)] == magic:
            raise UserError(f"{path}: is {kind}. {advice}")
    # A header of JSON behind its length; of suffixes only what must be one of these is left.
    if start[8:9] == b"{" or path.suffix.lower() == ".safetensors":
        return {"": _read_safetensors(path)}
    if path.suffix.lower() == ".npz" or (start[:4] == b"PK\x03\x04" and _is_npz(path)):
        return {"": read_npz(path)}
    return read_torch_file(path)


_OTHER_KINDS = (
    ("a file of HDF5, such as Keras writes", 0, b"\x89HDF", "Weights of PyTorch are wanted"),
    ("compressed by gzip", 0, b"\x1f\x8b", "Unpack it"),
    ("compressed by xz", 0, b"\xfd7zXZ", "Unpack it"),
    ("compressed by bzip2", 0, b"BZh", "Unpack it"),
    ("a page of the web, not what was to be downloaded", 0, b"<", "Fetch it again"),
    ("a text that points to a file of Git LFS", 0, b"version https://git-lfs", "Run git lfs pull"),
    (
        "a tar archive: either of several files, or of PyTorch before 0.2",
        257,
        b"ustar",
        "Unpack it and give the weight file in it; if it is PyTorch's, save it again with PyTorch",
    ),
)
"""Name, offset and first bytes of what is often given in place of weights, and what to do."""


def _is_npz(path: Path) -> bool:
    """Whether an archive holds arrays; what is wrong with one its reader will say."""
    try:
        with path.open("rb") as file:
            check_list_of_entries(file)
            with zipfile.ZipFile(file) as archive:
                return any(name.endswith(".npy") for name in archive.namelist())
    except Exception:  # A malformed archive raises exceptions of many kinds.
        return False


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors` file whole or not at all; its folder is made if need be."""
    # safetensors writes the memory as it lies, so that a transposed view needs a copy.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    # It marks PyTorch's layouts. Of more metadata the order is any, and equal files were unequal.
    data = safetensors.numpy.save(contiguous, {"format": "pt"})
    write_atomically(path, lambda file: file.write(data))


def _read_safetensors(path: Path) -> dict[str, LazyArray]:
    try:
        # The library checks the header and that the tensors fill the rest of the file.
        with safetensors.safe_open(path, "numpy"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            state = _state(file.fileno())
    except Exception as error:  # The library raises its own and others' exceptions.
        raise UserError(
            f"{path}: cannot be read as .safetensors, it is damaged or incomplete "
            f"({type(error).__name__}: {error}). Fetch or save it again"
        ) from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in SAFETENSORS_DTYPES:
            raise UserError(
                f"{path}: tensor {name!r} has the dtype {entry['dtype']}; floats wanted"
            )
        shape, dtype = tuple(entry["shape"]), np.dtype(SAFETENSORS_DTYPES[entry["dtype"]])
        start = 8 + length + entry["data_offsets"][0]
        read = functools.partial(_read_tensor, path, state, name, start, dtype, shape)
        tensors[name] = LazyArray(shape, dtype, read)
    return tensors


def _state(file: int) -> tuple[int, ...]:
    """What differs as soon as a file was replaced or written to."""
    found = os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _read_tensor(
    path: Path,
    state: tuple[int, ...],
    name: str,
    start: int,
    dtype: np.dtype,
    shape: tuple[int, ...],
) -> np.ndarray:
    try:
        with path.open("rb") as file:
            same = _state(file.fileno()) == state
            array = np.fromfile(file, dtype, math.prod(shape), offset=start)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not same or array.size < math.prod(shape):
        raise UserError(f"{path}: was changed while its tensor {name!r} was read; try again")
    return array.reshape(shape)
