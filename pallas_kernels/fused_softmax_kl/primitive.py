"""The one primitive below every loss, on whole or split vocabularies and any backend.

Values are kept relative to each row's maximum (`shift`). The losses do not change when a row is shifted, so
nothing is lost, and logits around 1e4 keep their precision: `shift + log(sum)` alone would lose 5e-4 there.

With `vocab_axis`, the logits are one shard of the vocabulary inside a `shard_map`: two small collectives
(`pmax` of `[T]`, `psum` of `[T, n + G]`) make the statistics global; the backward pass needs none, because the
global statistics turn the local exponentials into the global softmax. A backend sees its shard only.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fused_softmax_kl import dispatch
from pallas_kernels.fused_softmax_kl.xla import RowGradient

__all__ = ["RowGather", "Spec", "logits_gradient", "statistics", "valid_ids", "whole_vocab"]

Array = jax.Array


class Spec(NamedTuple):
    """Static options; hashable."""

    temperatures: tuple[float, ...] = (1.0,)
    softcap: float | None = None
    valid_vocab: int | None = None
    vocab_axis: str | None = None
    implementation: str | None = None
    interpret: bool = False


class RowGather(NamedTuple):
    """What the losses need from the logits; `logsum` and `z` are relative to `shift`."""

    shift: Array  # [T] float32, the row's maximum (0 where that is not finite)
    logsum: Array  # [T, n] float32, log sum exp((z - shift) / temperature)
    z: Array  # [T, G] float32, logits minus shift at the ids; 0 at inert ids


def valid_ids(ids: Array, vocab: int, valid_vocab: int | None) -> Array:
    """Returns where `ids` name a real row of a (whole) vocabulary of `vocab` rows."""
    return (ids >= 0) & (ids < (vocab if valid_vocab is None else min(valid_vocab, vocab)))


def whole_vocab(vocab_local: int, spec: Spec) -> int:
    """Returns the columns of all shards together."""
    return vocab_local * (1 if spec.vocab_axis is None else lax.axis_size(spec.vocab_axis))


def _place(ids: Array, vocab_local: int, spec: Spec) -> tuple[Array, Array, Array | int | None]:
    """Returns (valid [T, G], ids local to the shard or -1 [T, G], number of real local columns or None: all)."""
    axis = spec.vocab_axis
    whole = whole_vocab(vocab_local, spec)
    valid = valid_ids(ids, whole, spec.valid_vocab)
    offset = 0 if axis is None else lax.axis_index(axis) * vocab_local
    local = jnp.where(valid, ids, -1) - offset
    local = jnp.where(valid & (local >= 0) & (local < vocab_local), local, -1).astype(jnp.int32)
    if spec.valid_vocab is None or spec.valid_vocab >= whole:
        return valid, local, None
    return valid, local, spec.valid_vocab if axis is None else jnp.clip(spec.valid_vocab - offset, 0, vocab_local)


def statistics(logits: Array, ids: Array, spec: Spec) -> RowGather:
    """Returns the row statistics of `logits` [T, V] and the logits at `ids` [T, G]; ids are global."""
    valid, local, limit = _place(ids, logits.shape[1], spec)
    top, sums, z = dispatch.forward(logits, local, limit, spec)
    shift = top
    if spec.vocab_axis is not None:
        shift = lax.pmax(top, spec.vocab_axis)
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    if spec.vocab_axis is not None:
        scale = jnp.exp((top - shift)[:, None] / jnp.asarray(spec.temperatures, jnp.float32))
        sums, z = lax.psum((jnp.where(sums == 0, 0.0, sums * scale), z), spec.vocab_axis)
    return RowGather(shift, jnp.log(sums), jnp.where(valid, z - shift[:, None], 0.0))


def logits_gradient(
    logits: Array,
    ids: Array,
    stats: RowGather,
    grad_logsum: Array,
    grad_z: Array,
    spec: Spec,
    *,
    dtype: jnp.dtype,
) -> Array:
    """Returns dlogits [T, V]: `sum_i g_i / tau_i softmax_i + scatter(grad_z)`, through the soft cap.

    A row whose cotangents are all zero gets exact zeros, whatever its logits hold (NaN and inf included).
    """
    _, local, limit = _place(ids, logits.shape[1], spec)
    alive = (grad_logsum != 0).any(axis=-1) | (grad_z != 0).any(axis=-1)
    inverse = jnp.where(jnp.isfinite(stats.logsum), jnp.exp(-stats.logsum), 0.0)
    factor = grad_logsum / jnp.asarray(spec.temperatures, jnp.float32) * inverse
    # Never true, but XLA cannot know: the gathered logits are then read before the gradient takes their memory.
    above = (stats.z > 1.0).any(axis=-1, keepdims=True)
    factor = jnp.where(above & (inverse > 0), 0.0, factor)
    # Else XLA finds the same exponentials in both directions and keeps them: a float32 array of the logits' size.
    rows = RowGradient(lax.optimization_barrier(stats.shift), factor, alive)
    return dispatch.gradient(logits, local, limit, rows, jnp.where(local >= 0, grad_z, 0.0), spec, dtype=dtype)
