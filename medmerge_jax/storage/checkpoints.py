"""Checkpoints of a stage: Orbax, asynchronous and atomic, with checksums."""

import contextlib
import errno
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint.experimental import v1 as ocp

from medmerge_jax.merging.trees import flatten, unflatten
from medmerge_jax.runtime import processes
from medmerge_jax.runtime.progress import say
from medmerge_jax.storage import atomic
from medmerge_jax.storage.npz import read_npz

_KEPT = 2
_KEPT_MODEL = ".model.npz"
_METADATA = "_CHECKPOINT_METADATA"
_BLOCK = 2**20


class StageCheckpoints:
    """The newest checkpoints of one stage, in `directory`.

    A checkpoint is a tree of arrays and a few JSON values. Saving returns as soon as the arrays
    are copied; a checkpoint that was being written when the process died is ignored later. What
    lies in `<number>/` has its checksums in `<number>.json`, because a damaged array may still be
    one that can be read; one that does not match is left as `<number>.damaged`.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        # While the folder is open, no other gets its inode: `is_at` can tell one made anew.
        self._held = os.open(directory, os.O_RDONLY)
        self._failed = False
        self._summing: threading.Thread | None = None
        self._checkpointer = self._open()

    def _open(self) -> Any:
        # Orbax reads the metadata of all checkpoints at once and does not start if one is damaged.
        for number in self._numbers():
            problem = self._damage(number, _METADATA)
            metadata = _read_object(self._path(number) / _METADATA)
            if problem or not isinstance(metadata.get("custom_metadata"), dict):
                self._set_aside(number, problem or f"{_METADATA} cannot be read")
        return ocp.training.Checkpointer(
            self._directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(_KEPT),
            cleanup_tmp_directories=True,
        )

    def __enter__(self) -> "StageCheckpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self.close()
        except OSError:
            if not isinstance(error, Exception):
                raise  # or it would hide what came first, as that the workdir has vanished
        finally:
            os.close(self._held)

    def restore(self, like: Callable[[dict[str, Any]], Any]) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint that is whole, and its values, or None if there is none.

        Says so if a newer one is damaged, and renames that. What was saved with some values has the
        structure, and comes to the devices, of the tree of arrays that `like` makes of them.
        """
        while (newest := self._checkpointer.latest) is not None:
            problem = self._damage(newest.step)
            if not problem:
                try:
                    values = dict(self._checkpointer.metadata(newest.step).custom_metadata)
                    return self._checkpointer.load(newest.step, _abstract(like(values))), values
                except Exception as error:  # what Orbax and TensorStore raise is of many kinds
                    if _read_object(self._path(newest.step, ".json")):
                        raise  # it is whole, so something else is wrong
                    problem = f"{type(error).__name__} while it was read"
            self._checkpointer.close()
            self._set_aside(newest.step, problem)
            self._checkpointer = self._open()
        return None

    def _numbers(self) -> list[int]:
        """Of the checkpoints, in order."""
        names = (path.name for path in self._directory.iterdir() if path.is_dir())
        return sorted(int(name) for name in names if name.isdecimal())

    def _path(self, number: int, suffix: str = "") -> Path:
        return self._directory / f"{number}{suffix}"

    def _set_aside(self, number: int, problem: str) -> None:
        """Renames a damaged checkpoint, so that its number is free and it can be looked at."""
        before = [one for one in self._numbers() if one < number]
        processes.wait_for_all()
        if processes.is_first():
            shutil.rmtree(self._path(number, ".damaged"), ignore_errors=True)
            self._path(number).rename(self._path(number, ".damaged"))
            self._path(number, ".json").unlink(missing_ok=True)
        processes.wait_for_all()
        say(
            f"checkpoint {self._path(number)} is damaged ({problem}) and was renamed to "
            f"{number}.damaged; before it there is {f'number {before[-1]}' if before else 'none'}"
        )

    def _damage(self, number: int, pattern: str = "**/*") -> str:
        """What differs from the checksums, if there are any."""
        recorded = _read_object(self._path(number, ".json"))
        current = _checksums(self._path(number), pattern)
        for name in sorted(recorded if pattern == "**/*" else recorded.keys() & {pattern}):
            if current.get(name) != recorded[name]:
                return f"{name} {'has changed' if name in current else 'is missing'}"
        return ""

    def _sum(self, number: int, saving: Any) -> None:
        """Writes the checksums of a checkpoint when it is on the disk."""
        with contextlib.suppress(Exception):  # of the saving, which `wait` raises; or a full disk
            saving.result()
            atomic.write_json(self._path(number, ".json"), _checksums(self._path(number)))
            for old in self._directory.glob("*.json"):
                if not old.with_suffix("").exists():
                    old.unlink(missing_ok=True)

    def _join(self) -> None:
        if self._summing is not None:
            self._summing.join()

    def save(self, number: int, tree: Any, values: dict[str, Any]) -> None:
        """Starts saving, once an earlier save is done, with a number above all earlier ones'.

        Raises:
          OSError: The disk is full, or the folder is gone or cannot be written; also where an
            earlier save found it so.
        """
        with self._os_errors():
            if not atomic.is_at(self._directory, self._held):  # Orbax would make it anew
                raise FileNotFoundError(self._directory)
            # Without force, Orbax skips a checkpoint while the one before is being written.
            saving = self._checkpointer.save_async(number, tree, force=True, custom_metadata=values)
        self._join()
        if processes.is_first():
            self._summing = threading.Thread(target=self._sum, args=(number, saving))
            self._summing.start()

    def keep(self, epoch: int, variables: Any) -> None:
        """Writes a model that is a result of the stage, beside its checkpoints, to stay there."""
        arrays: Any = {path: np.asarray(leaf) for path, leaf in flatten(variables).items()}
        processes.from_first(
            lambda: atomic.write_atomically(
                self._path(epoch, _KEPT_MODEL), lambda file: np.savez(file, **arrays)
            )
        )

    def kept(self, epoch: int) -> Any:
        """What `keep` wrote, in NumPy; a UserError if the file is gone or damaged."""
        return unflatten(read_npz(self._path(epoch, _KEPT_MODEL)))

    def wait(self) -> None:
        """Returns when everything saved is on the disk."""
        with self._os_errors():
            self._checkpointer.wait()
        self._join()

    def close(self) -> None:
        """Waits and frees the threads."""
        with self._os_errors():
            self._checkpointer.close()
        self._join()
        self._remove_unfinished()

    @contextlib.contextmanager
    def _os_errors(self) -> Iterator[None]:
        """Turns what Orbax and TensorStore raise, as on a full disk, into an OSError."""
        try:
            yield
        except Exception as error:
            is_there = atomic.is_at(self._directory, self._held)
            number = self._os_error_number(error) if is_there else errno.ENOENT
            if not number:
                raise
            self._failed = True
            self._remove_unfinished()
            raise OSError(number, os.strerror(number), str(self._directory)) from error

    def _os_error_number(self, error: Exception) -> int:
        """0 if it is none."""
        if isinstance(error, OSError):
            return error.errno or 0
        # TensorStore says it in the text of a ValueError.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code:
            return int(code.group(1))
        # Orbax misses what it wrote itself, while somebody is removing the folder.
        return errno.ENOENT if str(self._directory.absolute()) in str(error) else 0

    def _remove_unfinished(self) -> None:
        """What a full disk left; again after closing, when Orbax starts no more threads."""
        if self._failed:
            for thread in threading.enumerate():
                if thread.name == "serialize_shardings":  # Orbax forgets it after an error
                    with contextlib.suppress(Exception):  # it raises what the thread raised
                        thread.join(timeout=60)
            for unfinished in self._directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)


def _abstract(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), tree
    )


def _read_object(path: Path) -> dict[str, Any]:
    """Empty if the process was killed before it was written, or if it is damaged."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text())
        return value if isinstance(value, dict) else {}
    return {}


def _checksums(folder: Path, pattern: str = "**/*") -> dict[str, list[int]]:
    """Size and CRC-32 of files, by path below `folder`."""
    checksums = {}
    for path in sorted(folder.glob(pattern)):
        if path.is_file():
            size = checksum = 0
            try:
                with path.open("rb") as file:
                    while block := file.read(_BLOCK):
                        size, checksum = size + len(block), zlib.crc32(block, checksum)
            except OSError:
                size = -1
            checksums[path.relative_to(folder).as_posix()] = [size, checksum]
    return checksums
