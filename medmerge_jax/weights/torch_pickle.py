"""Reading PyTorch's `.pth` files without PyTorch and without running the pickle's code.

The unpickler here knows the handful of globals that tensors are made of, each replaced by an inert
stand-in, and puts an inert placeholder in the place of every other (see `storage.pickles`). So
whatever a checkpoint has beside its tensors, and a whole pickled module too, can be looked through.

Two layouts exist. PyTorch >= 1.6 writes a zip archive with the pickle in `<root>/data.pkl` and
one entry `<root>/data/<key>` per storage. Before, it was a stream: a magic number, the protocol
version, facts about the writing machine, the object, the list of storage keys (five pickles in a
row), and then for each key the number of elements (int64) and the raw bytes.
"""

import dataclasses
import io
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np

from medmerge_jax.errors import UserError
from medmerge_jax.storage.archives import check_list_of_entries
from medmerge_jax.storage.pickles import (
    ForbiddenError,
    Placeholder,
    PlainUnpickler,
    RefusedError,
    StandIn,
    check_keys,
    shown,
)

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
DEEPEST = 8
"""Containers inside each other that are looked through for tensors."""
MOST_MODULES = 50_000
"""Of a pickled module: one that holds another twice, that another twice, and so on has no end."""
ADVICE = (
    "Only the tensors of a file are read. If you trust the file, load it with PyTorch and save "
    "the state dict as .safetensors"
)
StateDicts = dict[str, dict[str, np.ndarray]]

STORAGE_DTYPES = {
    f"{name}Storage": np.dtype(kind)
    for name, kind in {
        "Double": np.float64, "Float": np.float32, "Half": np.float16,
        "BFloat16": ml_dtypes.bfloat16, "Long": np.int64, "Int": np.int32, "Short": np.int16,
        "Char": np.int8, "Byte": np.uint8, "Bool": np.bool_, "ComplexFloat": np.complex64,
        "ComplexDouble": np.complex128,
    }.items()
}  # fmt: skip


def read_torch_file(path: Path) -> StateDicts:
    """The state dicts in a file of `torch.save`.

    Args:
      path: In either layout, with any content: a state dict, a checkpoint that has one or several
        at any depth, or a whole module. What it has beside tensors may be of any type, and is left.

    Returns:
      Read-only arrays by tensor name, with the file's dtypes (bfloat16 as ml_dtypes'), of each
      dict that holds tensors; by its keys with dots between them, "" of the outermost one.

    Raises:
      UserError: The file is damaged, in another format, or holds no tensors by name. No code of
        the file has run.
    """
    try:
        with path.open("rb") as file:
            # Zip archives are known by their first bytes: what `is_zipfile` looks for at the
            # end of a file could also be the data of a tensor in a stream.
            content = _read_zip(file) if file.read(4) == b"PK\x03\x04" else _read_stream(file)
        return {
            where: {name: _array(name, tensor) for name, tensor in tensors.items()}
            for where, tensors in content.items()
        }
    except ForbiddenError as error:
        raise UserError(f"{path}: {error}. {ADVICE}") from None
    except RefusedError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # A malformed pickle, zip or size can raise anything.
        raise UserError(
            f"{path}: the file is damaged or incomplete ({type(error).__name__}: {error}). "
            "Fetch or save it again"
        ) from error


@dataclasses.dataclass(frozen=True, slots=True)
class Storage:
    """Elements [start, start + size) of a flat buffer."""

    key: str
    dtype: np.dtype
    start: int
    size: int
    buffers: Mapping[str, bytes]

    def __setstate__(self, state: Any) -> None:
        raise RefusedError("the pickle modifies a storage; refused")


@dataclasses.dataclass(frozen=True, slots=True)
class Tensor:
    """A strided view of a storage; offset and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __setstate__(self, state: Any) -> None:
        raise RefusedError("the pickle modifies a tensor; refused")


class StateDict(dict):
    """In place of OrderedDict; the `_metadata` attribute that PyTorch adds is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignores attributes."""


def _ordered_dict(pairs: Any = ()) -> StateDict:
    """`collections.OrderedDict`, which Python 2 pickled with a list of lists."""
    if not isinstance(pairs, list | tuple) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs
    ):
        raise RefusedError("an OrderedDict is built from something that is not a list of pairs")
    check_keys(key for key, _ in pairs)
    content = StateDict((key, value) for key, value in pairs)
    if isinstance(pairs, list):
        pairs.clear()  # They must not be copied once more.
    return content


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    """`torch.Size`; NumPy has 64 dimensions at most."""
    if not isinstance(sizes, list | tuple) or len(sizes) > 64:
        raise RefusedError(f"a size is {shown(sizes)}; a few numbers are wanted")
    return tuple(sizes)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> Tensor:
    """`torch._utils._rebuild_tensor` and `_v2`; gradients and hooks do not matter here."""
    if not isinstance(storage, Storage):
        raise RefusedError("a tensor is built from something that is not a storage")
    for sizes in (shape, strides):
        if not isinstance(sizes, tuple) or not all(type(n) is int and n >= 0 for n in sizes):
            raise RefusedError(
                f"a tensor has the sizes {shown(sizes)}; non-negative integers are wanted"
            )
    if type(offset) is not int or offset < 0 or len(shape) != len(strides):
        raise RefusedError(
            f"a tensor has shape {shown(shape)}, strides {shown(strides)} and offset "
            f"{shown(offset)}, which do not fit together"
        )
    return Tensor(storage, offset, shape, strides)


def _rebuild_parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise RefusedError("a parameter is built from something that is not a tensor")
    return data


def _rebuild_from_type(function: Any, _: Any, arguments: Any, *__: Any) -> Any:
    """`torch._tensor._rebuild_from_type_v2`: a tensor of a class of its own."""
    if not isinstance(function, StandIn) or not isinstance(arguments, tuple):
        raise RefusedError("a tensor of another class is built from something unknown")
    return function(*arguments)


def _reconstructor(kind: Any, *_: Any) -> Placeholder:
    """`copyreg._reconstructor`, which makes an object of its first argument."""
    return Placeholder(kind.name if isinstance(kind, Placeholder) else "an object")


_FUNCTIONS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _ordered_dict,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_from_type,
    ("copyreg", "_reconstructor"): _reconstructor,
    ("copy_reg", "_reconstructor"): _reconstructor,  # Python 2's
    ("torch", "Size"): _size,
}


class _Unpickler(PlainUnpickler):
    """Builds nothing but plain containers, numbers, strings, stand-ins and placeholders."""

    def __init__(self, file: IO[bytes], buffers: Mapping[str, bytes]) -> None:
        super().__init__(file, "utf-8")  # Python 2 wrote names as byte strings.
        self.buffers = buffers
        self.storages: dict[str, Storage] = {}

    def find_class(self, module: str, name: str) -> StandIn | Placeholder:
        if (module, name) in _FUNCTIONS:
            return StandIn(f"{module}.{name}", _FUNCTIONS[module, name])
        if module in ("torch", "torch.cuda") and name in STORAGE_DTYPES:
            return StandIn(name)
        return Placeholder(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage | Placeholder:
        """Storages are saved as ("storage", type, key, device, elements[, view]).

        Before PyTorch 1.6, the classes of modules are saved as ("module", class, file, source).
        """
        if isinstance(pid, tuple) and pid[:1] == ("module",) and isinstance(pid[1], Placeholder):
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage":
            raise ForbiddenError(f"its pickle refers to {shown(pid)}, not to a storage")
        kind, key, size = pid[1], pid[2], pid[4]
        view = pid[5] if len(pid) == 6 else None
        is_storage = isinstance(kind, StandIn) and kind.name in STORAGE_DTYPES
        if not is_storage or not isinstance(key, str) or type(size) is not int or size < 0:
            raise RefusedError(f"its pickle refers to a storage of unknown kind: {shown(pid)}")
        whole = Storage(key, STORAGE_DTYPES[kind.name], 0, size, self.buffers)
        if self.storages.setdefault(key, whole) != whole:
            raise RefusedError(f"storage {key!r} is described in two ways")
        return whole if view is None else _view(whole, view)


def _view(whole: Storage, view: Any) -> Storage:
    """A part of a storage, as PyTorch 0.1 saved it: (key of the view, start, elements)."""
    if not isinstance(view, tuple) or len(view) != 3:
        raise RefusedError(f"a view of storage {whole.key!r} is malformed: {shown(view)}")
    _, start, size = view
    sane = type(start) is int and type(size) is int and start >= 0 and size >= 0
    if not sane or start + size > whole.size:
        raise RefusedError(
            f"a view of storage {whole.key!r} starts at {shown(start)} with {shown(size)} "
            f"elements, but the storage has {whole.size}"
        )
    return dataclasses.replace(whole, start=start, size=size)


def _load(file: IO[bytes], buffers: Mapping[str, bytes]) -> tuple[Any, dict[str, Storage]]:
    """One restricted pickle at the file's position, which is moved behind it."""
    unpickler = _Unpickler(file, buffers)
    return unpickler.load(), unpickler.storages


def _read_stream(file: IO[bytes]) -> dict[str, dict[str, Tensor]]:
    file.seek(0)
    try:
        magic, _ = _load(file, {})
    except ForbiddenError:
        raise
    except Exception:  # The beginning of another file can raise anything.
        magic = None
    if type(magic) is not int or magic != MAGIC_NUMBER:
        raise RefusedError("this is no file of torch.save: neither its zip nor its stream layout")
    protocol, _ = _load(file, {})
    if type(protocol) is not int or protocol != PROTOCOL_VERSION:
        raise RefusedError(f"its protocol is {shown(protocol)}; {PROTOCOL_VERSION} is wanted")
    machine, _ = _load(file, {})
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise RefusedError("it was not written on a little-endian machine. Save it again on one")
    buffers: dict[str, bytes] = {}
    content, storages = _load(file, buffers)
    keys, _ = _load(file, {})
    texts = isinstance(keys, list) and all(isinstance(key, str) for key in keys)
    if not texts or sorted(keys) != sorted(storages):
        raise RefusedError("the list of storages does not match the tensors")
    for key in keys:
        buffers[key] = _stream_bytes(file, storages[key])
    return _state_dicts(content)


def _stream_bytes(file: IO[bytes], storage: Storage) -> bytes:
    header = file.read(8)
    if len(header) < 8:
        raise RefusedError(f"the file ends before storage {storage.key!r}; it is incomplete")
    (size,) = struct.unpack("<q", header)
    if size != storage.size:
        raise RefusedError(
            f"storage {storage.key!r} has {size} elements where {storage.size} are announced"
        )
    num_bytes = size * storage.dtype.itemsize
    # An invented size must not take that much memory: no more is read than the file has.
    here = file.tell()
    left = file.seek(0, 2) - here
    file.seek(here)
    if left < num_bytes:
        raise RefusedError(
            f"the file ends inside storage {storage.key!r}: {left} of {num_bytes} bytes are there"
        )
    return file.read(num_bytes)


def _read_zip(file: IO[bytes]) -> dict[str, dict[str, Tensor]]:
    try:
        check_list_of_entries(file)
    except ValueError as error:  # which would be taken for damage
        raise RefusedError(str(error)) from error
    left = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
        if len(pickles) != 1:
            raise RefusedError(
                "it is a zip archive, but not of torch.save: one entry <name>/data.pkl is wanted"
            )
        root = pickles[0].removesuffix("data.pkl")
        if any(name.startswith(root + "code/") or name == root + "constants.pkl" for name in names):
            raise RefusedError(
                "it is a TorchScript archive, a program. Save the model's state_dict() instead"
            )
        order = root + "byteorder"
        if order in names and _entry(archive, order) != b"little":
            raise RefusedError("its numbers are big-endian. Save it again on a usual machine")
        buffers: dict[str, bytes] = {}
        data = _entry(archive, pickles[0])
        content, storages = _load(io.BytesIO(data), buffers)
        state_dicts = _state_dicts(content)
        # Only the storages of state dicts are read: an optimizer's state may be twice their size.
        tensors = [tensor for named in state_dicts.values() for tensor in named.values()]
        for key in dict.fromkeys(tensor.storage.key for tensor in tensors):
            storage = storages[key]
            num_bytes = storage.size * storage.dtype.itemsize
            buffers[key] = _entry(archive, f"{root}data/{key}", num_bytes)
            left -= num_bytes
            if left < 0:
                raise RefusedError("its entries have more bytes than the file; refused")
    return state_dicts


def _entry(archive: zipfile.ZipFile, name: str, num_bytes: int | None = None) -> bytes:
    """An entry that takes no more memory than it takes on disk, as torch.save writes all."""
    if name not in archive.NameToInfo:
        raise RefusedError(f"its entry {name} is missing: the file is incomplete")
    info = archive.getinfo(name)
    if info.compress_type != zipfile.ZIP_STORED:
        raise RefusedError(f"its entry {name} is compressed, which torch.save never does; refused")
    if num_bytes is not None and info.file_size != num_bytes:
        raise RefusedError(f"its entry {name} has {info.file_size} bytes; {num_bytes} are wanted")
    if info.file_size != info.compress_size or info.file_size > archive.start_dir:
        raise RefusedError(f"its entry {name} has more bytes than the file: it is incomplete")
    return archive.read(info)


def _state_dicts(content: Any) -> dict[str, dict[str, Tensor]]:
    """Every dict of tensors by name, and every module's, by where it is."""
    unknown: dict[str, None] = {}
    state_dicts = dict(_search(content, (), set(), unknown))
    if not state_dicts:
        left = (
            f" (of {', '.join(map(shown, list(unknown)[:3]))} nothing is made)" if unknown else ""
        )
        raise RefusedError(
            f"it holds {_describe(content)}, and in it no tensors by name{left}; a state dict is "
            "wanted, by itself or in dicts"
        )
    return state_dicts


def _search(
    value: Any, keys: tuple[str, ...], seen: set[int], unknown: dict[str, None]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    if id(value) in seen or len(keys) > DEEPEST:
        return
    seen.add(id(value))
    if isinstance(value, Placeholder):
        attributes = _attributes(value)
        if "_parameters" in attributes and "_modules" in attributes:
            yield ".".join(keys), dict(_of_module(value, "", [MOST_MODULES]))
            return
        unknown[value.name] = None
        children = {**value.items, **attributes}
    elif isinstance(value, dict):
        children = value
    else:
        return
    named = {name: child for name, child in children.items() if isinstance(name, str)}
    tensors = {name: child for name, child in named.items() if isinstance(child, Tensor)}
    if tensors:
        yield ".".join(keys), tensors
    for name, child in named.items():
        yield from _search(child, (*keys, name), seen, unknown)


def _of_module(module: Any, prefix: str, left: list[int]) -> Iterator[tuple[str, Tensor]]:
    """What a module's own `state_dict()` would hold."""
    left[0] -= 1
    if left[0] < 0 or prefix.count(".") > 10 * DEEPEST:
        raise RefusedError("its modules are too many or inside each other; refused")
    attributes = _attributes(module)
    for kind in ("_parameters", "_buffers"):
        for name, tensor in _items(attributes.get(kind)):
            if isinstance(tensor, Tensor):
                yield f"{prefix}{name}", tensor
    for name, child in _items(attributes.get("_modules")):
        yield from _of_module(child, f"{prefix}{name}.", left)


def _attributes(value: Any) -> dict[Any, Any]:
    """Of a placeholder's object; a state may also be (attributes, those in slots)."""
    state = value.state if isinstance(value, Placeholder) else None
    if isinstance(state, tuple) and state:
        state = state[0]
    return state if isinstance(state, dict) else {}


def _items(value: Any) -> list[tuple[str, Any]]:
    items = value.items if isinstance(value, Placeholder) else value
    named = items if isinstance(items, dict) else {}
    return [(name, child) for name, child in named.items() if isinstance(name, str)]


def _describe(value: Any) -> str:
    """What the file holds, short whatever its names are."""
    if isinstance(value, StandIn | Placeholder):
        return f"the global {shown(value.name)}"
    return type(value).__name__


def _array(name: str, tensor: Tensor) -> np.ndarray:
    storage = tensor.storage
    size = storage.dtype.itemsize
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True))
    if 0 not in tensor.shape and tensor.offset + last >= storage.size:
        raise RefusedError(
            f"tensor {name!r} of shape {tensor.shape} reaches beyond its storage of "
            f"{storage.size} elements"
        )
    if 0 in tensor.shape:
        return np.empty(tensor.shape, storage.dtype)
    array: np.ndarray = np.ndarray(
        tensor.shape,
        storage.dtype,
        storage.buffers[storage.key],
        offset=(storage.start + tensor.offset) * size,
        strides=tuple(stride * size for stride in tensor.strides),
    )
    return array
