"""Tensors between files and the devices of a mesh: every device reads and writes its own rows.

A merge has no use for the axes of a model: every element is treated alike. So a matrix is cut by rows over all devices
of the mesh, whatever their axes are called; one whose rows do not divide is held by every device.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fusejax.io.stream_read import StoredTensor, dtype_of

__all__ = ["place_rows", "written_rows"]


def place_rows(tensor: StoredTensor, mesh: Any) -> jax.Array:
    """Returns a stored tensor laid over a mesh by rows; each device's part is read for itself."""
    shape, dtype = tensor.shape, dtype_of(tensor.dtype)
    divides = bool(shape) and shape[0] % mesh.size == 0
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names) if divides else PartitionSpec())
    width = int(np.prod(shape[1:]))

    def read(index: tuple[slice, ...] | None) -> np.ndarray:
        first, last, _ = index[0].indices(shape[0]) if shape and index else (0, 1, 1)
        part = np.empty((last - first) * width, dtype)
        tensor.read_into(first * width, part.view(np.uint8))
        return part.reshape((last - first, *shape[1:]) if shape else ())

    return jax.make_array_from_callback(shape, sharding, read)


def written_rows(array: jax.Array) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (first byte, values) of every different part of an array, one device's at a time."""
    if any(_columns_cut(shard, array) for shard in array.addressable_shards):
        yield 0, np.ascontiguousarray(array)
        return
    row = int(np.prod(array.shape[1:])) * array.dtype.itemsize
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            first = shard.index[0].indices(array.shape[0])[0] if array.ndim else 0
            yield first * row, np.ascontiguousarray(shard.data)


def _columns_cut(shard: Any, array: jax.Array) -> bool:
    return shard.data.shape[1:] != array.shape[1:]
