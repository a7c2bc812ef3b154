"""Attention by JAX's own TPU kernel, which never holds the scores of all queries and keys.

The kernel (jax.experimental.pallas.ops.tpu.splash_attention) skips blocks that causality or the sliding window hide;
segments hide the rest inside it. It is chosen while tracing, by the devices that the program is for:
`jax.lax.platform_dependent` would make the backward pass keep what *every* branch needs, the scores included.

Not here: a kernel for GPUs (`fusejax.models.cudnn`).
"""

import functools
import logging
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

__all__ = ["splash_attention", "suits_splash"]

log = logging.getLogger("fusejax")

_LANES = 128  # the kernel's smallest block of positions
_BLOCKS = (512, 256, _LANES)  # larger ones do not fit beside the backward pass's accumulators in every TPU's memory


def suits_splash(q: jax.Array, k: jax.Array, mesh: Mesh | None) -> bool:
    """Returns whether the program is for TPUs and queries and keys are the same whole blocks of positions.

    Rows on TPUs that are no whole blocks are named once: plain operations hold all their scores.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform != "tpu" or q.shape[1] != k.shape[1]:
        return False
    if q.shape[1] % _LANES:
        _say_why_not(q.shape[1])
    return q.shape[1] % _LANES == 0


@functools.cache
def _say_why_not(length: int) -> None:
    log.warning(
        "attention: plain operations in place of the TPU's kernel, as rows of %d positions are no multiple of %d",
        length,
        _LANES,
    )


def splash_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, window: int | None = None, interpret: bool = False
) -> jax.Array:
    """Returns causal attention within segments, `[B, T, N, H]`; on one device.

    Args:
        q: `[B, T, N, H]`; T a multiple of 128.
        k, v: `[B, T, Nkv, H]`, Nkv divides N.
        segments: `[B, T]` int32.
        window: a query sees itself and the `window - 1` positions before it; None: all before it.
        interpret: computes the kernel by plain operations, for tests on processors.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask

    length, heads = q.shape[1:3]
    block = next(size for size in _BLOCKS if length % size == 0)
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = splash_attention_kernel.BlockSizes(
        **dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), block)  # whole rows of blocks in every pass
    )
    if window is None:
        one = splash_attention_mask.CausalMask((length, length))
    else:
        one = splash_attention_mask.LocalMask((length, length), (window - 1, 0), offset=0)
    kernel = splash_attention_kernel.make_splash_mha_single_device(
        splash_attention_mask.MultiHeadMask([one] * heads), block_sizes=sizes, interpret=interpret
    )

    def row(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return cast(jax.Array, kernel(q, k, v, segment_ids=splash_attention_kernel.SegmentIds(ids, ids)))

    scaled = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)  # the kernel does not scale
    first, keys, values = (x.swapaxes(1, 2) for x in (scaled, k, v))
    return jax.vmap(row)(first, keys, values, segments).swapaxes(1, 2).astype(q.dtype)
