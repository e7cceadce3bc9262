"""Folders that are either whole or absent."""

import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from medmerge_jax.errors import UserError


def replace_directory(
    directory: Path, write: Callable[[Path], object], names: Collection[str]
) -> None:
    """Writes a folder whole or not at all; an existing one is replaced.

    Args:
      directory: The folder.
      write: Fills the new folder that it is given, which is not there yet.
      names: Of the files that an existing one may hold.

    Raises:
      UserError: An existing one holds anything else, which would be lost.
    """
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file; give the folder of a model")
    there = {path.name for path in directory.iterdir()} if directory.exists() else set()
    if others := sorted(there - set(names)):
        raise UserError(
            f"{directory}: holds {', '.join(others[:4])}, which would be lost with the model that "
            "is replaced; choose another folder, or empty this one"
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        new = scratch / "new"
        write(new)
        if directory.exists():
            directory.rename(scratch / "old")
        try:
            new.rename(directory)
        except BaseException:
            if (scratch / "old").exists():
                (scratch / "old").rename(directory)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
