"""Checkpoints of a stage: Orbax, asynchronous and atomic."""

from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

_KEPT = 2


class StageCheckpoints:
    """The newest checkpoints of one stage, one an epoch, in `directory`.

    A checkpoint is a tree of arrays and a few JSON values. Saving returns as soon as the arrays
    are copied; a checkpoint that was being written when the process died is ignored later.
    """

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
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

    def save(self, epoch: int, tree: Any, values: dict[str, Any]) -> None:
        """Starts saving after `epoch` (counted from 1)."""
        self._checkpointer.save_async(epoch, tree, custom_metadata=values)

    def wait(self) -> None:
        """Returns when everything saved is on the disk."""
        self._checkpointer.wait()

    def close(self) -> None:
        """Waits and frees the threads."""
        self._checkpointer.close()
