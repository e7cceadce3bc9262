"""All devices of all processes as one axis: batches are split along it, all else is on each device.

A mesh is `None` where there is one device: then nothing here does anything, and the programs that
are compiled are those of a library that knows no meshes.

The number of devices changes the speed and not the result: a step computes what one device would
have computed on the whole batch, batch norms included, up to the order in which floating-point
numbers are added. A batch that the devices do not divide is fed with rows too many, which the step
cuts off: the compiler then gives the last devices fewer rows, or none.
"""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXIS = "data"


def data_mesh(devices: list[jax.Device] | None = None) -> Mesh | None:
    """The mesh of one axis over `devices`, by default all of them; None for one device.

    Devices of one process are neighbours, so that each process has consecutive rows of a batch.
    """
    devices = sorted(devices or jax.devices(), key=lambda one: (one.process_index, one.id))
    if len(devices) == 1:
        return None
    return Mesh(np.array(devices), (AXIS,), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Of an array that every device has whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharded(mesh: Mesh) -> NamedSharding:
    """Of an array whose first axis is split over the devices."""
    return NamedSharding(mesh, PartitionSpec(AXIS))


def padded_size(size: int, mesh: Mesh | None) -> int:
    """The next multiple of the number of devices."""
    return size if mesh is None else -(-size // mesh.size) * mesh.size


def own_rows(size: int, mesh: Mesh | None) -> slice:
    """Which of `size` rows, a multiple of the number of devices, this process's devices have."""
    if mesh is None:
        return slice(0, size)
    indices = batch_sharded(mesh).addressable_devices_indices_map((size,)).values()
    rows = [index[0].indices(size) for index in indices if index is not None]
    return slice(min(start for start, _, _ in rows), max(stop for _, stop, _ in rows))


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Puts arrays, of the same values in every process, on every device."""
    if mesh is None:
        return jax.device_put(tree)
    sharding = replicated(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding.is_equivalent_to(sharding, leaf.ndim):
            return leaf
        array = np.asarray(leaf)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(put, tree)


def replicate_key(key: jax.Array, mesh: Mesh | None) -> jax.Array:
    """`replicate` of a random key, which is no array to numpy."""
    if mesh is None:
        return key
    data = replicate(np.asarray(jax.random.key_data(key)), mesh)
    return jax.random.wrap_key_data(data, impl=jax.random.key_impl(key))


def split_rows(tree: Any, size: int, mesh: Mesh | None) -> Any:
    """Arrays of `size` rows over all devices, from the rows `own_rows(size, mesh)` in each process.

    They are on the host, and the size is a multiple of the number of devices.
    """
    sharding = None if mesh is None else batch_sharded(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(
            sharding, np.asarray(rows), (size, *np.shape(rows)[1:])
        ),
        tree,
    )


def broadcast_from_first(tree: Any) -> Any:
    """The first process's values in all processes."""
    return tree if jax.process_count() == 1 else multihost_utils.broadcast_one_to_all(tree)


def unreplicate(tree: Any) -> Any:
    """Arrays that every device has, as arrays of one device of this process; nothing is copied."""
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), tree)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on every host. All processes must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))
