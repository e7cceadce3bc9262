"""Batches in an order that only the seed decides, from the device's memory or from the disk."""

import collections
import itertools
import os
from collections.abc import Iterator
from typing import Any, Protocol

import jax
import numpy as np

from medmerge_jax.errors import UserError

Batch = dict[str, jax.Array]

LOADERS = ("auto", "resident", "stream")

_CPU_BUDGET = 2 * 2**30
_DEVICE_SHARE = 0.25
_TRANSFERS_AHEAD = 2


class Batches(Protocol):
    """One split as batches.

    Attributes:
      labels: All labels, in order, on the host.
      num_examples: n.
      batch_size: At most n.
      steps_per_epoch: Full batches in n; training leaves the rest out, another rest each epoch.
    """

    labels: np.ndarray
    num_examples: int
    batch_size: int
    steps_per_epoch: int

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches {"inputs", "labels", "indices"} of one epoch, each (batch_size, ...).

        In the order of `epoch_order(num_examples, seed, epoch)`, from step `start` on. The
        indices, int32 (batch_size,), say which examples of the split these are.
        """
        ...

    def ordered(self) -> Iterator[tuple[Batch, int]]:
        """All examples in order, and the number of valid ones in each batch.

        Every batch is full: the last repeats example 0.
        """
        ...


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation int32 (num_examples,) of an epoch.

    Sorts the raw bits of a counter-based generator with the key (seed, epoch): the same on every
    platform and with every version of numpy, and any epoch without those before it.
    """
    key = np.array([seed % 2**64, epoch], np.uint64)
    raw = np.random.Philox(key=key).random_raw(num_examples)
    return np.argsort(raw, kind="stable").astype(np.int32)


class _Common:
    """Sizes, and the rows of each batch. Subclasses fetch the rows."""

    def __init__(self, labels: np.ndarray, num_inputs: int, batch_size: int):
        self.labels = np.asarray(labels)
        self.num_examples = len(self.labels)
        if num_inputs != self.num_examples or batch_size < 1 or not num_inputs:
            raise ValueError(
                f"{num_inputs} inputs, {self.num_examples} labels, batch size {batch_size}; as "
                "many inputs as labels, at least one, and a batch size of at least 1 are wanted"
            )
        self.batch_size = min(batch_size, self.num_examples)
        self.steps_per_epoch = self.num_examples // self.batch_size

    def _epoch_rows(self, seed: int, epoch: int, start: int) -> np.ndarray:
        order = epoch_order(self.num_examples, seed, epoch)
        return order[: self.steps_per_epoch * self.batch_size].reshape(-1, self.batch_size)[start:]

    def _ordered_rows(self) -> tuple[np.ndarray, list[int]]:
        steps = -(-self.num_examples // self.batch_size)
        rows = np.zeros((steps, self.batch_size), np.int32)
        rows.reshape(-1)[: self.num_examples] = np.arange(self.num_examples)
        last = self.num_examples - (steps - 1) * self.batch_size
        return rows, [self.batch_size] * (steps - 1) + [last]


class ResidentBatches(_Common):
    """Batches out of arrays that are put on the device once.

    Args:
      inputs: (n, ...), uint8 images or float32 features.
      labels: (n,) or (n, classes).
      batch_size: Reduced to n if larger.
    """

    def __init__(self, inputs: np.ndarray | jax.Array, labels: np.ndarray, batch_size: int):
        super().__init__(labels, len(inputs), batch_size)
        self._arrays = jax.device_put({"inputs": inputs, "labels": self.labels})

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Batches.epoch`."""
        for rows in self._epoch_rows(seed, epoch, start):
            yield self._fetch(rows)

    def ordered(self) -> Iterator[tuple[Batch, int]]:
        """See `Batches.ordered`."""
        for rows, valid in zip(*self._ordered_rows(), strict=True):
            yield self._fetch(rows), valid

    def _fetch(self, rows: np.ndarray) -> Batch:
        indices = jax.device_put(rows)
        return {**_take(self._arrays, indices), "indices": indices}


class StreamedBatches(_Common):
    """Batches read by threads of grain while the device works.

    Args:
      inputs: (n, ...), usually mapped from the disk.
      labels: (n,) or (n, classes).
      batch_size: Reduced to n if larger.
      threads: That read.
      prefetch: Batches read ahead; two more are on their way to the device.
    """

    def __init__(
        self,
        inputs: np.ndarray,
        labels: np.ndarray,
        batch_size: int,
        threads: int | None = None,
        prefetch: int = 8,
    ):
        super().__init__(labels, len(inputs), batch_size)
        self._inputs = np.asarray(inputs)
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._prefetch = prefetch

    def epoch(self, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
        """See `Batches.epoch`."""
        return self._stream(self._epoch_rows(seed, epoch, start))

    def ordered(self) -> Iterator[tuple[Batch, int]]:
        """See `Batches.ordered`."""
        rows, valid = self._ordered_rows()
        return zip(self._stream(rows), valid, strict=True)

    def _stream(self, rows: np.ndarray) -> Iterator[Batch]:
        import grain  # takes a second, and resident data does not need it

        def read(step: int) -> dict[str, np.ndarray]:
            indices = rows[step]
            return {
                "inputs": self._inputs[indices],
                "labels": self.labels[indices],
                "indices": indices,
            }

        options = grain.ReadOptions(
            num_threads=self._threads, prefetch_buffer_size=max(self._prefetch, self._threads)
        )
        steps = iter(grain.MapDataset.range(len(rows)).map(read).to_iter_dataset(options))
        ahead = collections.deque(
            jax.device_put(batch) for batch in itertools.islice(steps, _TRANSFERS_AHEAD)
        )
        while ahead:
            yield ahead.popleft()
            ahead.extend(jax.device_put(batch) for batch in itertools.islice(steps, 1))


def make_batches(
    inputs: np.ndarray | jax.Array,
    labels: np.ndarray,
    batch_size: int,
    loader: str = "auto",
    budget_bytes: int | None = None,
) -> Batches:
    """Resident batches if the inputs fit the budget, streamed ones if not.

    Args:
      inputs: (n, ...).
      labels: (n,) or (n, classes).
      batch_size: Reduced to n if larger.
      loader: "auto", or "resident" or "stream" whatever the budget.
      budget_bytes: By default a quarter of an accelerator's memory, or 2 GiB on a CPU.

    Raises:
      UserError: An unknown loader.
    """
    if loader not in LOADERS:
        raise UserError(f"loader {loader!r}: one of {', '.join(LOADERS)} is wanted")
    budget = _default_budget() if budget_bytes is None else budget_bytes
    if loader == "resident" or (loader == "auto" and inputs.nbytes <= budget):
        return ResidentBatches(inputs, labels, batch_size)
    return StreamedBatches(np.asarray(inputs), labels, batch_size)


def _default_budget() -> int:
    device = jax.local_devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit", 0) if device.platform != "cpu" else 0
    return int(limit * _DEVICE_SHARE) or _CPU_BUDGET


@jax.jit
def _take(arrays: Any, rows: jax.Array) -> Any:
    return jax.tree.map(lambda array: array.at[rows].get(mode="promise_in_bounds"), arrays)
