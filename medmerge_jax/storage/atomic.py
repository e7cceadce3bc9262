"""Files that are either whole or absent, and the folders of this library."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NoReturn

LOCK = ".lock"
"""How the file in a directory begins that whoever works in it holds, see `locks.held`."""

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder(name: str) -> Path:
    """`$MEDMERGE_JAX_CACHE/<name>`, by default under the user's cache folder."""
    root = os.environ.get("MEDMERGE_JAX_CACHE")
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return (base if root else base / "medmerge_jax") / name


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes beside `path`, flushes to the disk, then renames: readers never see a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a write, unlike an open, does not say where
        raise


def is_at(path: Path, file: int) -> bool:
    """Whether a path is still that of an open file, whose inode no other gets meanwhile."""
    with contextlib.suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(file))
    return False


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Deletes what a killed process left below `folder` while it wrote one of the `names`.

    That is `.<name>.` and eight characters of `tempfile`, as `write_atomically` and
    `weights.save_model` name their temporaries; nothing else is touched. Folders with a lock of
    their own are left to whoever holds it, who may be writing there now.
    """
    written = "|".join(map(re.escape, names))
    leftover = re.compile(rf"\.({written})\.[a-z0-9_]{{8}}")
    for parent, folders, files in os.walk(folder):
        for name in filter(leftover.fullmatch, files):
            Path(parent, name).unlink(missing_ok=True)
        for name in filter(leftover.fullmatch, folders):
            shutil.rmtree(Path(parent, name), ignore_errors=True)
        folders[:] = [
            name
            for name in folders
            if not leftover.fullmatch(name) and not any(Path(parent, name).glob(f"{LOCK}*"))
        ]


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 `text` atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The value in a file, if `write_json` could write it again.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is no JSON, has numbers or texts that JSON has not, or is nested too deeply.
    """
    try:
        value = json.loads(path.read_bytes(), parse_constant=_no_number, parse_float=_number)
        if _depth(value) > _DEEPEST:
            raise RecursionError
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    return value


_DEEPEST = 50


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
