"""Files of named tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from medmerge_jax.errors import UserError
from medmerge_jax.storage.atomic import write_atomically
from medmerge_jax.storage.npz import read_npz
from medmerge_jax.weights.torch_pickle import read_torch_file

SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """All tensors of a file by name, with the file's names, layouts and dtypes.

    Args:
      path: `.safetensors`, `.npz`, or `.pth`/`.pt` (see `torch_pickle`).

    Raises:
      UserError: There is no such file, its suffix is another, or its content cannot be read.
    """
    readers: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
        ".safetensors": _read_safetensors,
        ".npz": read_npz,
        ".pth": read_torch_file,
        ".pt": read_torch_file,
    }
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    if path.suffix not in readers:
        raise UserError(f"{path}: the suffix is {path.suffix!r}; wanted {', '.join(readers)}")
    return readers[path.suffix](path)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a `.safetensors` file whole or not at all; its folder is made if need be."""
    # safetensors writes the memory as it lies, so that a transposed view needs a copy.
    contiguous = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    # It marks PyTorch's layouts. Of more metadata the order is any, and equal files were unequal.
    data = safetensors.numpy.save(contiguous, {"format": "pt"})
    write_atomically(path, lambda file: file.write(data))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    tensors = {}
    try:
        for name, entry in safetensors.deserialize(path.read_bytes()):
            if entry["dtype"] not in SAFETENSORS_DTYPES:
                raise UserError(
                    f"{path}: tensor {name!r} has the dtype {entry['dtype']}; floats wanted"
                )
            flat = np.frombuffer(entry["data"], SAFETENSORS_DTYPES[entry["dtype"]])
            tensors[name] = flat.reshape(entry["shape"])
    except UserError:
        raise
    except Exception as error:  # The library raises its own and others' exceptions.
        raise UserError(
            f"{path}: cannot be read as .safetensors, it is damaged or incomplete "
            f"({type(error).__name__}: {error}). Fetch or save it again"
        ) from error
    return tensors
