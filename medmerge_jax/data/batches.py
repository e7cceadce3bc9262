"""Batches in an order that only the seed decides, from the device's memory or from the disk."""

import abc
import collections
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from medmerge_jax.errors import UserError
from medmerge_jax.runtime import mesh as mesh_lib
from medmerge_jax.runtime.cpu import usable_cores
from medmerge_jax.storage.rows import FileRows, file_rows

Batch = dict[str, jax.Array]

LOADERS = ("auto", "resident", "stream")

_CPU_BUDGET = 2 * 2**30
_DEVICE_SHARE = 0.25
_THREADS = 8
"""That read, at most."""
_READ_AHEAD = 8
"""Batches in the host's memory."""
_TRANSFERS_AHEAD = 2
"""Batches on their way to the device."""


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation int32 (num_examples,) of an epoch.

    Sorts the raw bits of a counter-based generator with the key (seed, epoch): the same on every
    platform and with every version of numpy, and any epoch without those before it.

    >>> epoch_order(5, seed=0, epoch=0), epoch_order(5, seed=0, epoch=1)
    (array([0, 2, 1, 4, 3], dtype=int32), array([3, 2, 4, 1, 0], dtype=int32))
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    raw = np.random.Philox(key=key).random_raw(num_examples)
    return np.argsort(raw, kind="stable").astype(np.int32)


class Batches(abc.ABC):
    """One split as batches.

    On several devices `inputs` are split over them and have rows too many if the devices do not
    divide the batch, see `runtime.mesh`; labels and indices are whole on each.

    Args:
      inputs: (n, ...), uint8 images or float32 features.
      labels: (n,) or (n, classes).
      batch_size: Reduced to n if larger.
      mesh: The devices, see `runtime.mesh`.
      accumulate: Parts of each batch, see `training.accumulation`.

    Attributes:
      labels: All labels, in order, on the host.
      num_examples: n.
      batch_size: At most n.
      steps_per_epoch: Full batches in n; training leaves the rest out, another rest each epoch.
    """

    def __init__(
        self,
        inputs: np.ndarray | jax.Array,
        labels: np.ndarray,
        batch_size: int,
        mesh: Mesh | None = None,
        accumulate: int = 1,
    ):
        self.labels = np.asarray(labels)
        self.num_examples = len(self.labels)
        if len(inputs) != self.num_examples or batch_size < 1 or not len(inputs):
            raise ValueError(
                f"{len(inputs)} inputs, {self.num_examples} labels, batch size {batch_size}; as "
                "many inputs as labels, at least one, and a batch size of at least 1 are wanted"
            )
        self.batch_size = min(batch_size, self.num_examples)
        self.steps_per_epoch = self.num_examples // self.batch_size
        self._mesh = mesh
        self._parts = min(accumulate, self.batch_size)
        self._hold(inputs)

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch | tuple[Batch, ...]]:
        """Batches {"inputs", "labels", "indices"} of one epoch, each (batch_size, ...).

        In the order of `epoch_order(num_examples, seed, epoch)`, from step `start` on. The
        indices, int32 (batch_size,), say which examples of the split these are. With `accumulate`
        above 1 each is a tuple of as many parts of about one size.
        """
        order = epoch_order(self.num_examples, seed, epoch)
        rows = order[: self.steps_per_epoch * self.batch_size].reshape(-1, self.batch_size)[start:]
        if self._parts == 1:
            return self._stream(list(rows))
        parts = self._stream(
            [part for batch in rows for part in np.array_split(batch, self._parts)]
        )
        # `zip` draws from the one iterator as often as a batch has parts.
        return zip(*[parts] * self._parts, strict=True)

    def ordered(self) -> Iterator[tuple[Batch, int]]:
        """All examples in order, and the number of valid ones in each batch.

        Every batch is full: the last repeats example 0.
        """
        size = -(-self.batch_size // self._parts)
        steps = -(-self.num_examples // size)
        rows = np.zeros((steps, size), np.int32)
        rows.reshape(-1)[: self.num_examples] = np.arange(self.num_examples)
        last = self.num_examples - (steps - 1) * size
        return zip(self._stream(list(rows)), [size] * (steps - 1) + [last], strict=True)

    @abc.abstractmethod
    def _hold(self, inputs: np.ndarray | jax.Array) -> None:
        """Keeps the inputs for `_stream`."""

    @abc.abstractmethod
    def _stream(self, rows: Sequence[np.ndarray]) -> Iterator[Batch]:
        """The examples of each of `rows`, int32 (n,), in this order."""

    def _own(self, rows: np.ndarray, size: int) -> np.ndarray:
        """This process's part of the rows, with the first example up to `size` of all."""
        filled = np.concatenate([rows, np.zeros(size - len(rows), rows.dtype)])
        return filled[mesh_lib.own_rows(size, self._mesh)]


class ResidentBatches(Batches):
    """Batches out of arrays that are put on the device once; on each, if there are several.

    >>> batches = ResidentBatches(np.zeros((5, 2, 2, 3)), np.array([0, 1, 0, 1, 1]), batch_size=2)
    >>> [batch["indices"].tolist() for batch in batches.epoch(seed=0, epoch=0)]
    [[0, 2], [1, 4]]
    """

    def _hold(self, inputs: np.ndarray | jax.Array) -> None:
        if isinstance(inputs, np.memmap):  # On a CPU every step would read the file again.
            rows = file_rows(inputs)
            inputs = rows.whole() if isinstance(rows, FileRows) else rows
        self._arrays = mesh_lib.replicate({"inputs": inputs, "labels": self.labels}, self._mesh)

    def _stream(self, rows: Sequence[np.ndarray]) -> Iterator[Batch]:
        for step in rows:
            indices = mesh_lib.replicate(step, self._mesh)
            if self._mesh is None:
                yield {**_take(self._arrays, indices), "indices": indices}
                continue
            size = mesh_lib.padded_size(len(step), self._mesh)
            split = mesh_lib.split_rows(self._own(step, size), size, self._mesh)
            yield {
                "inputs": _take(self._arrays["inputs"], split),
                "labels": _take(self._arrays["labels"], indices),
                "indices": indices,
            }


class StreamedBatches(Batches):
    """Batches read by threads of grain while the device works.

    Each process reads the rows that its devices get. The inputs are usually mapped from the disk.
    """

    def _hold(self, inputs: np.ndarray | jax.Array) -> None:
        self._inputs = file_rows(inputs)

    def _stream(self, rows: Sequence[np.ndarray]) -> Iterator[Batch]:
        import grain  # This takes a second, and resident data does not need it.

        def read(step: int) -> dict[str, np.ndarray]:
            indices = rows[step]
            own = self._own(indices, mesh_lib.padded_size(len(indices), self._mesh))
            return {
                "inputs": self._inputs[own],
                "labels": self.labels[indices],
                "indices": indices,
            }

        threads = min(_THREADS, usable_cores())
        options = grain.ReadOptions(threads, prefetch_buffer_size=max(_READ_AHEAD, threads))
        steps = iter(grain.MapDataset.range(len(rows)).map(read).to_iter_dataset(options))
        ahead = collections.deque(
            self._put(batch) for batch in itertools.islice(steps, _TRANSFERS_AHEAD)
        )
        while ahead:
            yield ahead.popleft()
            ahead.extend(self._put(batch) for batch in itertools.islice(steps, 1))

    def _put(self, batch: dict[str, np.ndarray]) -> Batch:
        size = mesh_lib.padded_size(len(batch["labels"]), self._mesh)
        inputs = mesh_lib.split_rows(batch.pop("inputs"), size, self._mesh)
        return {"inputs": inputs, **mesh_lib.replicate(batch, self._mesh)}


def make_batches(
    inputs: np.ndarray | jax.Array,
    labels: np.ndarray,
    batch_size: int,
    loader: str = "auto",
    budget_bytes: int | None = None,
    mesh: Mesh | None = None,
    accumulate: int = 1,
) -> Batches:
    """Resident batches if the inputs fit the budget, streamed ones if not.

    Args:
      inputs: (n, ...).
      labels: (n,) or (n, classes).
      batch_size: Reduced to n if larger.
      loader: "auto", or "resident" or "stream" whatever the budget.
      budget_bytes: By default a quarter of an accelerator's memory, or 2 GiB on a CPU.
      mesh: The devices, see `runtime.mesh`; each has resident inputs whole.
      accumulate: Parts of each batch, see `training.accumulation`.

    Raises:
      UserError: An unknown loader.
    """
    if loader not in LOADERS:
        raise UserError(f"loader {loader!r}: one of {', '.join(LOADERS)} is wanted")
    budget = _default_budget() if budget_bytes is None else budget_bytes
    if loader == "resident" or (loader == "auto" and inputs.nbytes <= budget):
        return ResidentBatches(inputs, labels, batch_size, mesh, accumulate)
    return StreamedBatches(inputs, labels, batch_size, mesh, accumulate)


def _default_budget() -> int:
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return _CPU_BUDGET // len(devices)  # They share the host's memory.
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    return int(limit * _DEVICE_SHARE) or _CPU_BUDGET


@jax.jit
def _take(arrays: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda array: array.at[rows].get(mode="promise_in_bounds"), arrays)
