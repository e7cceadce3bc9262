"""CIFAR-10 and CIFAR-100 out of their official Python archives.

TFDS has builders called `cifar10` and `cifar100`, but they need TensorFlow: they read the *binary*
archives through `tf.io.gfile`, and have TensorFlow encode the pixels as PNG. Without it, preparing
them ends in a ModuleNotFoundError. Hence this module.

The archives are pickles of Python 2. The unpickler here knows the few globals that an array is
made of, each replaced by an inert stand-in (see `storage.pickles`), and refuses every other.
"""

import dataclasses
import gzip
import io
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from medmerge_jax.data.official.records import Records, described
from medmerge_jax.data.splits import stratified_group_split
from medmerge_jax.errors import UserError
from medmerge_jax.storage.pickles import (
    ForbiddenError,
    Placeholder,
    PlainUnpickler,
    RefusedError,
    StandIn,
    shown,
)

_DOWNLOADS = "https://www.cs.toronto.edu/~kriz"
_SIDE = 32
_VALUES = 3 * _SIDE * _SIDE

_VALIDATION = 0.1
"""Of the 50,000 training images: 5,000."""

_MAX_BYTES = 2**28
"""Of a file in the archive; the largest has 155 MB. A small archive can unpack to any size."""

_MAX_ARCHIVE = 2**29
"""Bytes of all files together; 186 MB are published."""


class _Variant(NamedTuple):
    """What differs between CIFAR-10 and CIFAR-100."""

    archive: str
    folder: str
    """What the archive unpacks to."""
    train: tuple[str, ...]
    test: str
    meta: str
    label_key: str
    """Of the labels in a file of images."""
    names_key: str
    """Of the class names in the file `meta`."""

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train, self.test, self.meta)


_CIFAR10 = _Variant(
    "cifar-10-python.tar.gz",
    "cifar-10-batches-py",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test_batch",
    "batches.meta",
    "labels",
    "label_names",
)
_CIFAR100 = _Variant(
    "cifar-100-python.tar.gz",
    "cifar-100-python",
    ("train",),
    "test",
    "meta",
    "fine_labels",
    "fine_label_names",
)


def read_cifar10(root: Path) -> Records:
    """CIFAR-10; `root` holds (or is) `cifar-10-python.tar.gz` or `cifar-10-batches-py`.

    A tenth of the training images, the same number of each class and always the same ones, is
    the validation split.
    """
    return _read(root, _CIFAR10)


def read_cifar100(root: Path) -> Records:
    """CIFAR-100 with its 100 fine labels; otherwise as `read_cifar10`."""
    return _read(root, _CIFAR100)


def _read(root: Path, variant: _Variant) -> Records:
    files = _folder_files(root, variant) or _archive_files(root, variant)
    classes = _class_names(files[variant.meta], variant)
    batches = [files[name] for name in (*variant.train, variant.test)]
    parts = [_batch(batch, variant, classes) for batch in batches]
    labels = np.concatenate([labels for _, labels in parts])
    num_test = len(parts[-1][1])
    num_train = len(labels) - num_test
    fractions = (1 - _VALIDATION, _VALIDATION, 0.0)
    held_out = stratified_group_split(labels[:num_train], None, fractions, seed=0)
    # These are the ids that TFDS gives the images.
    ids = [f"train_{row:05d}" for row in range(num_train)]
    ids += [f"test_{row:05d}" for row in range(num_test)]
    pixels = np.empty((len(labels), _SIDE, _SIDE, 3), np.uint8)
    np.concatenate([part for part, _ in parts], out=pixels)
    return Records(
        classes=classes,
        ids=tuple(ids),
        paths=tuple(
            batch.path for batch, (_, own) in zip(batches, parts, strict=True) for _ in own
        ),
        labels=labels,
        splits=tuple([("train", "val")[part] for part in held_out] + ["test"] * num_test),
        pixels=pixels,
    )


@dataclasses.dataclass(frozen=True)
class _File:
    """An unpickled file: where it lies on the disk, its name in messages, what it holds."""

    path: Path
    name: str
    content: dict[str, Any]

    def get(self, key: str) -> Any:
        if key not in self.content:
            raise UserError(
                f"{self.name}: there is no {key!r}, only {sorted(self.content)}; fetch it again"
            )
        return self.content[key]


def _folder_files(root: Path, variant: _Variant) -> dict[str, _File] | None:
    """None where neither the folder nor what it holds is there."""
    folder = next(
        (home for home in (root / variant.folder, root) if (home / variant.meta).is_file()), None
    )
    if folder is None:
        return None
    files = {}
    for path in (folder / name for name in variant.files):
        try:
            with path.open("rb") as file:
                files[path.name] = _unpickle(file, path, str(path))
        except FileNotFoundError as error:
            raise UserError(
                f"{path}: is missing; the files {', '.join(variant.files)} are wanted"
            ) from error
    return files


def _archive_files(root: Path, variant: _Variant) -> dict[str, _File]:
    path = root if root.is_file() else root / variant.archive
    files: dict[str, _File] = {}
    try:
        with _Bounded(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                name = member.name.rsplit("/", 1)[-1]
                content = archive.extractfile(member) if name in variant.files else None
                if content is None:
                    continue
                where = f"{path}: {member.name}"
                if name in files:
                    raise UserError(f"{where}: is there twice; fetch the archive again")
                if member.size > _MAX_BYTES:
                    raise UserError(
                        f"{where}: has {member.size} bytes, more than any file of CIFAR; fetch "
                        "the archive again"
                    )
                files[name] = _unpickle(io.BytesIO(content.read()), path, where)
    except FileNotFoundError as error:
        raise UserError(
            f"{root}: neither {variant.archive} nor {variant.folder} is there; download "
            f"{_DOWNLOADS}/{variant.archive}"
        ) from error
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise UserError(f"{path}: is damaged or incomplete ({error}); download it again") from error
    missing = [name for name in variant.files if name not in files]
    if missing:
        raise UserError(
            f"{path}: lacks {', '.join(missing)}; is it the Python version, {variant.archive}?"
        )
    return files


class _Bounded(gzip.GzipFile):
    """A file that is not unpacked further, or into more memory, than CIFAR needs."""

    def read(self, size: int | None = -1) -> bytes:
        self._check(self.tell() + (size or 0))
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._check(offset)
        return super().seek(offset, whence)

    def _check(self, position: int) -> None:
        if position > _MAX_ARCHIVE:
            raise tarfile.ReadError(f"it unpacks to more than {_MAX_ARCHIVE} bytes")


def _class_names(file: _File, variant: _Variant) -> tuple[str, ...]:
    names = file.get(variant.names_key)
    texts = [_text(name) for name in names] if isinstance(names, list) else []
    if not texts or not all(isinstance(name, str) for name in texts):
        raise UserError(
            f"{file.name}: {variant.names_key!r} is {shown(names)}; a list of names is wanted"
        )
    return tuple(texts)


def _batch(
    file: _File, variant: _Variant, classes: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (n, 32, 32, 3) and labels (n,) of one file."""
    data, labels = file.get("data"), file.get(variant.label_key)
    if not isinstance(data, _Array):
        raise UserError(f"{file.name}: 'data' is {type(data).__name__}; an array is wanted")
    try:
        values = data.values()
    except (RefusedError, UnicodeEncodeError) as error:
        raise UserError(f"{file.name}: {error}; fetch it again") from None
    if not isinstance(labels, list) or len(labels) != len(values):
        number = f"{len(labels)} labels" if isinstance(labels, list) else "no list of labels"
        raise UserError(
            f"{file.name}: {variant.label_key!r} holds {number} for {len(values)} images; as many "
            "are wanted"
        )
    for row, label in enumerate(labels):
        if type(label) is not int or not 0 <= label < len(classes):
            raise UserError(
                f"{file.name}, row {row}: the label is {shown(label)}; a number from 0 to "
                f"{len(classes) - 1} is wanted"
            )
    # A row holds one colour plane after the other.
    pixels = values.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
    return pixels, np.array(labels, np.int32)


class _Array:
    """In place of an array of numpy: the state that its pickle gives it, once."""

    __slots__ = ("_state",)

    def __init__(self, state: Any = None) -> None:
        self._state = state

    def __setstate__(self, state: Any) -> None:
        if self._state is not None:
            raise ForbiddenError("the pickle modifies an array; refused")
        self._state = state

    def values(self) -> np.ndarray:
        """uint8 (n, 3072)."""
        if not isinstance(self._state, tuple) or len(self._state) != 5:
            raise RefusedError("its pickle holds an array without content")
        _, shape, dtype, fortran, raw = self._state
        raw = raw.encode("latin-1") if isinstance(raw, str) else raw
        if not isinstance(dtype, _DType) or _text(dtype.name) not in ("u1", "uint8"):
            name = _text(dtype.name) if isinstance(dtype, _DType) else dtype
            raise RefusedError(f"the images are an array of type {shown(name)}; u1 is wanted")
        sane = isinstance(shape, tuple) and len(shape) == 2 and type(shape[0]) is int
        if not sane or shape[0] < 1 or shape[1] != _VALUES:
            raise RefusedError(
                f"the images are an array of shape {shown(shape)}; (n, {_VALUES}) is wanted"
            )
        if not isinstance(raw, bytes | bytearray) or len(raw) != shape[0] * _VALUES:
            size = len(raw) if isinstance(raw, bytes | bytearray) else "no"
            raise RefusedError(f"the {shape[0]} images have {size} bytes; {_VALUES} each wanted")
        values = np.frombuffer(raw, np.uint8)
        return values.reshape(shape[::-1]).T if fortran else values.reshape(shape)


class _DType:
    """In place of a dtype of numpy: its name; the byte order does not matter to uint8."""

    __slots__ = ("name",)

    def __init__(self, name: Any) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None:
        """Ignores the byte order."""


def _text(value: Any) -> Any:
    """Python 2 wrote text as byte strings."""
    return value.decode("latin-1") if isinstance(value, bytes) else value


def _from_buffer(raw: Any, dtype: Any, shape: Any, order: Any = "C", *_: Any) -> _Array:
    return _Array((1, shape, dtype, order in ("F", b"F"), raw))


def _encode(text: Any, encoding: Any) -> str:
    """`_codecs.encode`: what Python 3 makes of bytes in the protocol of Python 2.

    Whoever wants the bytes encodes them: a pickle may call this often.
    """
    if not isinstance(text, str) or encoding != "latin1":
        raise ForbiddenError("its pickle encodes something that is not text; refused")
    return text


# The official files name the first three; files that newer versions wrote again, the others.
# `_reconstruct` makes an empty array, whose state follows.
_GLOBALS: dict[tuple[str, str], Callable[..., Any] | None] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): lambda name, *_: _DType(name),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(PlainUnpickler):
    """Builds nothing but plain containers, numbers, strings and this module's stand-ins."""

    def find_class(self, module: str, name: str) -> StandIn | Placeholder:
        if (module, name) not in _GLOBALS:
            return super().find_class(module, name)
        return StandIn(f"{module}.{name}", _GLOBALS[module, name])


def _unpickle(file: IO[bytes], path: Path, name: str) -> _File:
    try:
        content = _Unpickler(file, "bytes").load()
        if not isinstance(content, dict):
            raise RefusedError(f"its pickle holds {type(content).__name__}; a dict is wanted")
        return _File(path, name, {str(_text(key)): value for key, value in content.items()})
    except ForbiddenError as error:
        raise UserError(
            f"{name}: {error}. The official files hold arrays, lists and names only; fetch it "
            "again, from its authors"
        ) from None
    except RefusedError as error:
        raise UserError(f"{name}: {error}; fetch it again") from None
    except Exception as error:  # A malformed pickle can raise anything.
        raise UserError(
            f"{name}: is damaged or incomplete ({type(error).__name__}: {error}); fetch it again"
        ) from error


CIFAR10 = described("cifar10", lambda root, variant: read_cifar10(root))
CIFAR100 = described("cifar100", lambda root, variant: read_cifar100(root))
