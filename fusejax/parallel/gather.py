"""From arrays that are spread over the devices of several processes to arrays of the host."""

from functools import lru_cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fusejax.parallel.processes import is_first

__all__ = ["to_host"]


def to_host(x: Any, *, dtype: Any = None) -> np.ndarray | None:
    """Returns the whole of an array as a numpy array in process 0, None in the others; all processes call it.

    A stacked array (three axes or more) travels one part of its first axis at a time, so that a device holds no more
    than one layer besides its own share.

    Args:
        x: [...] a global `jax.Array` on a mesh, or any array that this process holds whole.
        dtype: of the result; by default that of `x`.
    """
    dtype = x.dtype if dtype is None else dtype
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x).astype(dtype) if is_first() else None
    if not isinstance(x.sharding, NamedSharding):
        raise ValueError(f"expected an array on a mesh, got one with sharding {x.sharding}")
    whole = NamedSharding(x.sharding.mesh, PartitionSpec())
    if x.ndim < 3:
        found = jax.block_until_ready(_replicated(whole)(x))
        return np.asarray(found.addressable_data(0)).astype(dtype) if is_first() else None
    result = np.empty(x.shape, dtype) if is_first() else None
    for part in range(x.shape[0]):
        found = jax.block_until_ready(_part(whole)(x, part))  # no two of them at once, in any process
        if result is not None:
            result[part] = np.asarray(found.addressable_data(0))
    return result


@lru_cache(maxsize=8)
def _replicated(whole: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=whole)


@lru_cache(maxsize=8)
def _part(whole: NamedSharding) -> Any:
    return jax.jit(partial(jax.lax.dynamic_index_in_dim, axis=0, keepdims=False), out_shardings=whole)
