"""The parts of a decoder layer, as functions of arrays.

Norms, rotations and softmax are computed in float32 whatever the activations are. `attention` is the one
door to the attention implementation. Not here: dropout.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import InputError
from fusejax.models.cudnn import check_cudnn, cudnn_attention, document_lengths, suits_cudnn
from fusejax.models.splash import splash_attention, suits_splash
from fusejax.parallel.sharding import Layout

__all__ = [
    "activate",
    "alibi_bias",
    "apply_rope",
    "attention",
    "attention_mask",
    "expert_weights",
    "layer_norm",
    "rms_norm",
]


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Returns `x / rms(x) * scale` over the last axis, computed in float32, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, *, eps: float) -> jax.Array:
    """Returns `(x - mean(x)) / std(x) * scale + bias` over the last axis, in float32, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + eps)
    scaled = normed * scale.astype(jnp.float32)
    return (scaled if bias is None else scaled + bias.astype(jnp.float32)).astype(x.dtype)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel pairs (i, i + R/2) of `x` `[B, T, N, H]` by the angles of cos and sin `[B, T, R/2]`.

    The channels from R on, where there are any, are left as they are.
    """
    half = cos.shape[-1]
    ends = (half,) if 2 * half == x.shape[-1] else (half, 2 * half)
    first, second, *rest = jnp.split(x.astype(jnp.float32), ends, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, *rest], axis=-1).astype(x.dtype)


def alibi_bias(num_heads: int, length: int, *, bias_max: float, rows: jax.Array | None = None) -> jax.Array:
    """Returns the linear biases `[1, N, T, S]` (float32) of Press et al., arXiv:2108.12409, as MPT has them.

    S is `length`, and the T queries stand at the positions `rows` of it: all of them by default.

    A key d positions back costs `slope * d`; the slopes of N heads are `2 ** -(bias_max * i / N)` for N a power
    of two, and every second one of the next power first otherwise. Rows count positions: within a segment the
    distance is the same.
    """
    power = 2 ** math.ceil(math.log2(num_heads))
    slopes = 2.0 ** (-bias_max * np.arange(1, power + 1) / power)
    if power != num_heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:num_heads]
    index = jnp.arange(length)
    distance = ((index if rows is None else rows)[:, None] - index[None, :]).astype(jnp.float32)
    return -jnp.asarray(slopes, jnp.float32)[None, :, None, None] * distance


def attention_mask(
    segment_ids: jax.Array,
    *,
    sliding_window: int | None = None,
    queries: jax.Array | None = None,
    rows: jax.Array | None = None,
) -> jax.Array:
    """Returns which keys `[B, 1, T, S]` each query may read: earlier ones of its own segment.

    Padding is a segment of its own (0), so that no query is left without a key and nothing becomes NaN.

    Args:
        segment_ids: `[B, S]` int32 of the keys.
        sliding_window: a query sees itself and the `sliding_window - 1` positions before it.
        queries, rows: segments `[B, T]` and positions `[T]` of the queries; those of the keys by default.
    """
    keys = jnp.arange(segment_ids.shape[-1])
    distance = (keys if rows is None else rows)[:, None] - keys[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    same = (segment_ids if queries is None else queries)[:, :, None] == segment_ids[:, None, :]
    return (visible[None] & same)[:, None]


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array,
    layout: Layout,
    *,
    bias: jax.Array | None = None,
    segments: jax.Array | None = None,
    window: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Returns softmax(q k^T / sqrt(H) + bias) v, `[B, T, N, H]`, with grouped queries.

    On a mesh it runs once per device on whole rows and whole groups of heads (no communication).
    Where the mask is given by segments and there is no bias, it is the device's kernel: `fusejax.models.splash` on
    TPUs, `fusejax.models.cudnn` on NVIDIA GPUs.

    Args:
        q: `[B, T, N, H]`.
        k, v: `[B, S, Nkv, H]`, Nkv divides N; S is T but where a cache is read.
        mask: `[B, 1, T, S]` bool, true where a query may read a key.
        layout: where the arrays lie.
        bias: `[1, N, T, S]` float32, added to the scores.
        segments, window: `[B, T]` int32, where the mask is `attention_mask(segments, sliding_window=window)`.
        implementation: "xla" for plain operations anywhere, "auto" for the device's kernel where it serves, "cudnn" for
            cuDNN's or an error; "auto_rows" and "cudnn_rows" where also no row holds two documents.

    Raises:
        InputError: cuDNN was asked for where it cannot be had.
    """
    kernel, given = _kernel(q, k, mask, layout, bias, segments, window, implementation)
    if layout.mesh is None:
        return _attend(q, k, v, mask, bias) if kernel is None else kernel(q, k, v, given)
    if layout.rules.kv_heads != layout.rules.heads:  # key heads are whole where query heads are split
        groups = q.shape[2] // k.shape[2]
        k, v = (_repeat_heads(x, groups, layout) for x in (k, v))
    head_spec = layout.sharding(("batch", None, "heads", "head_dim")).spec
    if kernel is not None and given is not None:
        by_row = ("batch", *[None] * (given.ndim - 1))
        sharded = jax.shard_map(
            kernel,
            mesh=layout.mesh,
            in_specs=(head_spec, head_spec, head_spec, layout.sharding(by_row).spec),
            out_specs=head_spec,
            check_vma=False,  # the kernels' results do not say along which axes they vary
        )
        return sharded(q, k, v, layout.constrain(given, by_row))
    mask_spec = layout.sharding(("batch", None, None, None)).spec
    bias_axes = (None, "heads", None, None)
    sharded = jax.shard_map(
        _attend,
        mesh=layout.mesh,
        in_specs=(head_spec, head_spec, head_spec, mask_spec, layout.sharding(bias_axes).spec),
        out_specs=head_spec,
    )
    mask = layout.constrain(mask, ("batch", None, None, None))
    return sharded(q, k, v, mask, None if bias is None else layout.constrain(bias, bias_axes))


def _kernel(
    q: jax.Array,
    k: jax.Array,
    mask: jax.Array,
    layout: Layout,
    bias: jax.Array | None,
    segments: jax.Array | None,
    window: int | None,
    implementation: str,
) -> tuple[Callable[..., jax.Array] | None, jax.Array | None]:
    """The device's kernel and what it is told of who reads whom; None, None for plain operations."""
    if implementation == "xla" or q.shape[1] != k.shape[1]:
        return None, None
    rows = implementation.endswith("_rows") and segments is not None
    if implementation.startswith("cudnn"):
        check_cudnn(q.dtype, layout.mesh)
        if bias is not None:
            raise InputError("attention cudnn is not for linear biases (MPT); set memory.attention auto")
    elif bias is not None or segments is None:
        return None, None
    elif suits_splash(q, k, layout.mesh):
        return partial(splash_attention, window=window), segments
    elif not suits_cudnn(q, k, layout.mesh, window=window, rows=rows):
        return None, None
    return partial(cudnn_attention, window=window), document_lengths(segments) if rows else mask  # type: ignore


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, bias: jax.Array | None) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, bias=bias, mask=mask)


def expert_weights(scores: jax.Array, *, count: int) -> jax.Array:
    """Returns the weights `[B, T, E]` (float32) of experts: softmax over the `count` largest of `scores`, else 0."""
    chosen, index = jax.lax.top_k(scores.astype(jnp.float32), count)
    weights = jax.nn.softmax(chosen, axis=-1)
    return jnp.sum(jax.nn.one_hot(index, scores.shape[-1]) * weights[..., None], axis=-2)


def activate(x: jax.Array, kind: str) -> jax.Array:
    """Returns the activation "silu", "gelu" (exact) or "gelu_tanh" of `x`."""
    return jax.nn.silu(x) if kind == "silu" else jax.nn.gelu(x, approximate=kind == "gelu_tanh")


def _repeat_heads(x: jax.Array, groups: int, layout: Layout) -> jax.Array:
    batch, length, heads, width = x.shape
    wide = jnp.broadcast_to(x[:, :, :, None, :], (batch, length, heads, groups, width))
    return layout.constrain(wide.reshape(batch, length, heads * groups, width), ("batch", None, "heads", "head_dim"))
