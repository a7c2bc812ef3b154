"""cuDNN's flash attention on GPUs, where `memory.attention: cudnn` asks for it; never chosen by itself.

It computes in 16 bits, and it has no segment ids. Where every row holds one document, padded at its end, the documents'
lengths say all that it needs, and no scores of all positions by all positions exist. A packed row needs its mask:
`[B, 1, T, T]` in memory as a bias of 16 bits, which is most of what the kernel saves.

It can be traced only where a GPU is, so tests hand the same arguments to plain operations. It has not run on a GPU.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fusejax.errors import InputError

__all__ = ["check_cudnn", "cudnn_attention", "document_lengths"]

_DTYPES = ("bfloat16", "float16")


def check_cudnn(dtype: Any, mesh: Mesh | None) -> None:
    """Raises an InputError where the program is not for GPUs, or does not compute in 16 bits."""
    if jnp.dtype(dtype).name not in _DTYPES:
        raise InputError(
            f"attention cudnn computes in bfloat16 or float16, got {jnp.dtype(dtype).name}; set train.compute_dtype "
            "bfloat16, or memory.attention auto"
        )
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    if device.platform not in ("gpu", "cuda"):
        raise InputError(
            f"attention cudnn needs NVIDIA GPUs, the devices are {device.platform} ({device.device_kind}); set "
            "memory.attention auto"
        )


def document_lengths(segments: jax.Array) -> jax.Array:
    """Returns how many positions `[B]` of each row `[B, T]` are its document's; at least 1, so that no row is empty."""
    return jnp.maximum(jnp.sum(segments > 0, axis=1, dtype=jnp.int32), 1)


def cudnn_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, given: jax.Array, *, window: int | None = None
) -> jax.Array:
    """Returns causal attention, `[B, T, N, H]`; on one device.

    Args:
        q: `[B, T, N, H]`.
        k, v: `[B, T, Nkv, H]`, Nkv divides N.
        given: `[B]` int32, positions of the one document that each row begins with, or the whole mask `[B, 1, T, T]`.
        window: with lengths: a query sees itself and the `window - 1` positions before it. A mask says it itself.
    """
    if given.ndim == 1:
        local = None if window is None else (window - 1, 0)
        options: dict[str, Any] = {"query_seq_lengths": given, "key_value_seq_lengths": given}
        options |= {"local_window_size": local}
    else:
        options = {"mask": given}
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn", **options)
