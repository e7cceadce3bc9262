"""Files that are either whole or absent, and the folders of this library."""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any

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


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Deletes what a killed process left below `folder` while it wrote one of the `names`.

    That is `.<name>.` and eight characters of `tempfile`, as `write_atomically` and
    `weights.save_model` name their temporaries; nothing else is touched.
    """
    known = "|".join(map(re.escape, names))
    leftover = re.compile(rf"\.({known})\.[a-z0-9_]{{8}}")
    for parent, folders, found in os.walk(folder):
        for name in filter(leftover.fullmatch, found):
            Path(parent, name).unlink(missing_ok=True)
        for name in filter(leftover.fullmatch, folders):
            shutil.rmtree(Path(parent, name), ignore_errors=True)
        folders[:] = [name for name in folders if not leftover.fullmatch(name)]


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 `text` atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
