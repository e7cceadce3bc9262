"""Checkpoints of a stage: Orbax, asynchronous and atomic."""

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from medmerge_jax import files

_KEPT = 2


class StageCheckpoints:
    """The newest checkpoints of one stage, in `directory`.

    A checkpoint is a tree of arrays and a few JSON values. Saving returns as soon as the arrays
    are copied; a checkpoint that was being written when the process died is ignored later.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._disk_was_full = False
        self._checkpointer = ocp.training.Checkpointer(
            directory.absolute(),
            preservation_policy=ocp.training.preservation_policies.LatestN(_KEPT),
            cleanup_tmp_directories=True,
        )

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """The newest checkpoint and its values, or None if there is none.

        Args:
          like: A tree of arrays with the structure, and on the devices, of what was saved.
        """
        newest = self._checkpointer.latest
        if newest is None:
            return None
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        tree = self._checkpointer.load(newest.step, abstract)
        return tree, self._checkpointer.metadata(newest.step).custom_metadata

    def save(self, number: int, tree: Any, values: dict[str, Any]) -> None:
        """Starts saving, once an earlier save is done, with a number above all earlier ones'.

        Raises:
          OSError: The disk is full, also where an earlier save found it so.
        """
        with self._full_disk():
            # Without force, Orbax skips a checkpoint while the one before is being written.
            self._checkpointer.save_async(number, tree, force=True, custom_metadata=values)

    def wait(self) -> None:
        """Returns when everything saved is on the disk."""
        with self._full_disk():
            self._checkpointer.wait()

    def close(self) -> None:
        """Waits and frees the threads."""
        with self._full_disk():
            self._checkpointer.close()
        self._remove_unfinished()

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        """Turns what Orbax and TensorStore raise on a full disk into an OSError."""
        try:
            yield
        except Exception as error:
            number = _os_error_number(error)
            if number not in files.DISK_FULL:
                raise
            self._disk_was_full = True
            self._remove_unfinished()
            raise OSError(number, os.strerror(number), str(self._directory)) from error

    def _remove_unfinished(self) -> None:
        """What a full disk left; again after closing, when Orbax starts no more threads."""
        if self._disk_was_full:
            for thread in threading.enumerate():
                if thread.name == "serialize_shardings":  # Orbax forgets it after an error
                    thread.join(timeout=60)
            for unfinished in self._directory.glob("*.orbax-checkpoint-tmp"):
                shutil.rmtree(unfinished, ignore_errors=True)


def _os_error_number(error: Exception) -> int:
    if isinstance(error, OSError):
        return error.errno or 0
    # TensorStore says it in the text of a ValueError.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found.group(1)) if found else 0
