"""The three matmuls of the output layer, for a head `[D, V]` ("dv") or `[V, D]` ("vd").

`add_head_gradient` is the one that needs care. Written as `total + hidden^T dlogits` it makes a second array of the
head's size per chunk, reads both and writes a third: on CPU, where nothing fuses the sum into the matmul, at
T = 2048, D = 512, V = 32000 in chunks of 256 that is 513 ms of processor time for 320 ms of multiplication. Block after
block of the vocabulary, each product is added while it is still in the cache (367 ms), and the temporary is one block.
Accelerators' compilers fuse the sum, and get the whole product.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fused_softmax_kl import tiling

__all__ = ["add_head_gradient", "hidden_gradient", "logits", "vocab_size"]

Array = jax.Array


def vocab_size(head: Array, layout: str) -> int:
    """Returns the columns of the logits that `head` makes."""
    return head.shape[1 if layout == "dv" else 0]


def logits(hidden: Array, head: Array, *, layout: str, dtype: jax.typing.DTypeLike) -> Array:
    """Returns `hidden head` [T, V] in `dtype`."""
    equation = "td,dv->tv" if layout == "dv" else "td,vd->tv"
    return jnp.einsum(equation, hidden, head, preferred_element_type=jnp.dtype(dtype))


def hidden_gradient(dlogits: Array, head: Array, *, layout: str) -> Array:
    """Returns `dlogits head^T` [T, D] float32."""
    equation = "tv,dv->td" if layout == "dv" else "tv,vd->td"
    return jnp.einsum(equation, dlogits, head, preferred_element_type=jnp.float32)


def _product(hidden: Array, dlogits: Array, layout: str) -> Array:
    equation, pair = ("td,tv->dv", (hidden, dlogits)) if layout == "dv" else ("tv,td->vd", (dlogits, hidden))
    return jnp.einsum(equation, *pair, preferred_element_type=jnp.float32)


def _add_whole(total: Array, hidden: Array, dlogits: Array, *, layout: str) -> Array:
    return total + _product(hidden, dlogits, layout)


def _add_in_blocks(total: Array, hidden: Array, dlogits: Array, *, layout: str) -> Array:
    vocab, columns = dlogits.shape[1], tiling.cpu_head_columns(hidden.shape[1])
    transposed = lax.optimization_barrier(hidden.T)  # else XLA folds the transpose into the matmul and takes a slow one

    def add(start: Array | int, size: int, total: Array) -> Array:
        part = lax.dynamic_slice_in_dim(dlogits, start, size, axis=1)
        if layout == "dv":
            axis, part = 1, jnp.matmul(transposed, part, preferred_element_type=jnp.float32)
        else:
            axis, part = 0, jnp.matmul(lax.optimization_barrier(part.T), hidden, preferred_element_type=jnp.float32)
        part += lax.dynamic_slice_in_dim(total, start, size, axis=axis)
        return lax.dynamic_update_slice_in_dim(total, part, start, axis=axis)

    whole, left = divmod(vocab, columns)
    if whole:
        total = lax.fori_loop(0, whole, lambda i, total: add(i * columns, columns, total), total)
    return add(whole * columns, left, total) if left else total


def add_head_gradient(total: Array, hidden: Array, dlogits: Array, *, layout: str) -> Array:
    """Returns `total + hidden^T dlogits`, float32 and in the head's layout, in place where `total` dies."""
    blocks = functools.partial(_add_in_blocks, layout=layout)
    whole = functools.partial(_add_whole, layout=layout)
    if total.size <= tiling.CPU_SMALL:
        return whole(total, hidden, dlogits)
    return lax.platform_dependent(total, hidden, dlogits, cpu=blocks, default=whole)
