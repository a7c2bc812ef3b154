"""Random keys of matrices: a function of the seed, the tensor's path and its layer, and of nothing else.

So a merge draws the same numbers whatever the order of its tensors, the mesh, and whether layers are stacked
(`layers.mlp.up.kernel`, layer 3) or numbered (`layers.3.mlp.up.kernel`). Tensors of other names draw others: a model
in Hugging Face names and the same model in ours are not thinned alike.
"""

import contextlib
import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.random import threefry2x32_p

from fusejax.errors import InputError
from fusejax.types import Array

__all__ = ["key_data", "matrix_keys", "uniforms"]


def key_data(key: Any) -> Array:
    """Returns the threefry key data, [2] uint32, of a whole number, a jax.random key, or key data itself.

    Raises:
      InputError: anything else.
    """
    if isinstance(key, int) and not isinstance(key, bool) and 0 <= key < 2**32:
        return np.array([0, key], np.uint32)
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    if isinstance(key, np.ndarray | jax.Array) and key.shape == (2,) and key.dtype == np.uint32:
        return key
    raise InputError(f"key must be a whole number in [0, 2**32) or a threefry key of jax.random, got {key!r}.")


def matrix_keys(data: Array, path: str, layers: int | None) -> Array:
    """Returns the key data of the matrices of one leaf.

    Args:
      data: [2] uint32, of the whole merge.
      path: the leaf's dot-joined path; the number of an unstacked layer is taken out of it.
      layers: length of the stacked layer axis; None if the leaf is one matrix.

    Returns:
      [2] or [layers, 2] uint32; numpy if `data` is.
    """
    found = re.search(r"(?:^|\.)layers\.(\d+)\.", path)
    name = path if found is None else path[: found.start(1)] + path[found.end() :]
    host = isinstance(data, np.ndarray)
    with jax.ensure_compile_time_eval() if host else contextlib.nullcontext():
        key = jax.random.fold_in(jax.random.wrap_key_data(data, impl="threefry2x32"), zlib.crc32(name.encode()))
        if found:
            key = jax.random.fold_in(key, int(found[1]))
        elif layers is not None:
            key = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(layers))
        folded = jax.random.key_data(key)
        return np.asarray(folded) if host else folded


def uniforms(key: Array, target: Array, shape: tuple[int, ...], *, start: Array | int = 0) -> Array:
    """Draws numbers in [0, 1) of which each depends on its flat index only, so that a matrix may be drawn in pieces.

    Args:
      key: [2] uint32, of the matrix.
      target: [] int32, the number of the target.
      shape: of the piece.
      start: [] uint32, flat index of its first element; the matrix has at most 2**32.

    Returns:
      [...] float32, what `jax.random.uniform` draws for the whole matrix (with its partitionable threefry).
    """
    folded = jax.random.key_data(jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), target))
    index = jnp.broadcast_to(jnp.asarray(start, jnp.uint32), shape)
    for axis in range(len(shape)):
        step = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * step
    high, low = threefry2x32_p.bind(folded[0], folded[1], jnp.zeros_like(index), index)
    # 23 bits as the fraction of a number in [1, 2).
    return lax.bitcast_convert_type(((high ^ low) >> 9) | np.uint32(0x3F800000), jnp.float32) - 1
