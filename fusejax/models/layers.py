"""The parts of a decoder layer, as functions of arrays.

Norms, rotations and softmax are computed in float32 whatever the activations are. `attention` is the one
door to the attention implementation. Not here: a cache for generation, and dropout.
"""

import jax
import jax.numpy as jnp

from fusejax.parallel.sharding import Layout

__all__ = ["apply_rope", "attention", "attention_mask", "rms_norm", "swiglu"]


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float) -> jax.Array:
    """Returns `x / rms(x) * scale` over the last axis, computed in float32, in the dtype of `x`."""
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel pairs (i, i + H/2) of `x` `[B, T, N, H]` by the angles of cos and sin `[B, T, H/2]`."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def attention_mask(segment_ids: jax.Array, *, sliding_window: int | None = None) -> jax.Array:
    """Returns which keys `[B, 1, T, T]` each query may read: earlier ones of its own segment.

    Padding is a segment of its own (0), so that no query is left without a key and nothing becomes NaN.

    Args:
        segment_ids: `[B, T]` int32.
        sliding_window: a query sees itself and the `sliding_window - 1` positions before it.
    """
    length = segment_ids.shape[-1]
    distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (visible[None] & same)[:, None]


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, layout: Layout) -> jax.Array:
    """Returns softmax(q k^T / sqrt(H)) v, `[B, T, N, H]`, with grouped queries.

    On a mesh it runs once per device on whole rows and whole groups of heads (no communication).

    Args:
        q: `[B, T, N, H]`.
        k, v: `[B, T, Nkv, H]`, Nkv divides N.
        mask: `[B, 1, T, T]` bool, true where a query may read a key.
        layout: where the arrays lie.
    """
    if layout.mesh is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask)
    if layout.rules.kv_heads != layout.rules.heads:  # key heads are whole where query heads are split
        groups = q.shape[2] // k.shape[2]
        k, v = (_repeat_heads(x, groups, layout) for x in (k, v))
    head_spec = layout.sharding(("batch", None, "heads", "head_dim")).spec
    mask_spec = layout.sharding(("batch", None, None, None)).spec
    sharded = jax.shard_map(
        lambda q, k, v, mask: jax.nn.dot_product_attention(q, k, v, mask=mask),
        mesh=layout.mesh,
        in_specs=(head_spec, head_spec, head_spec, mask_spec),
        out_specs=head_spec,
    )
    return sharded(q, k, v, layout.constrain(mask, ("batch", None, None, None)))


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Returns `silu(gate) * up`."""
    return jax.nn.silu(gate) * up


def _repeat_heads(x: jax.Array, groups: int, layout: Layout) -> jax.Array:
    batch, length, heads, width = x.shape
    wide = jnp.broadcast_to(x[:, :, :, None, :], (batch, length, heads, groups, width))
    return layout.constrain(wide.reshape(batch, length, heads * groups, width), ("batch", None, "heads", "head_dim"))
