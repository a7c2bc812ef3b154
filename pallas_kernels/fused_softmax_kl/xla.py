"""The portable primitive: row statistics and gathered logits, and the one write of `dlogits`.

Values are kept relative to each row's maximum (`shift`). The losses do not change when a row is shifted, so
nothing is lost, and logits around 1e4 keep their precision: `shift + log(sum)` alone would lose 5e-4 there.

With `vocab_axis`, the logits are one shard of the vocabulary inside a `shard_map`: two small collectives
(`pmax` of `[T]`, `psum` of `[T, n + G]`) make the statistics global; the backward pass needs none, because the
global statistics turn the local exponentials into the global softmax.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["RowGather", "forward", "logits_gradient", "prepare_logits", "valid_ids"]

Array = jax.Array


class RowGather(NamedTuple):
    """What the losses need from the logits; `logsum` and `z` are relative to `shift`."""

    shift: Array  # [T] float32, the row's maximum (0 where that is not finite)
    logsum: Array  # [T, n] float32, log sum exp((z - shift) / temperature)
    z: Array  # [T, G] float32, logits minus shift at the ids; 0 at inert ids


def _offset(vocab_local: int, vocab_axis: str | None) -> Array | int:
    return 0 if vocab_axis is None else lax.axis_index(vocab_axis) * vocab_local


def valid_ids(ids: Array, vocab: int, valid_vocab: int | None) -> Array:
    """Returns where `ids` name a real row of a (whole) vocabulary of `vocab` rows."""
    return (ids >= 0) & (ids < (vocab if valid_vocab is None else min(valid_vocab, vocab)))


def prepare_logits(
    logits: Array, *, softcap: float | None, valid_vocab: int | None, vocab_axis: str | None = None
) -> Array:
    """Returns float32 logits after the soft cap, -inf in the columns at and beyond `valid_vocab`."""
    z = logits.astype(jnp.float32)
    if softcap is not None:
        z = softcap * jnp.tanh(z / softcap)
    if valid_vocab is None:
        return z
    columns = jnp.arange(z.shape[-1]) + _offset(z.shape[-1], vocab_axis)
    return jnp.where(columns < valid_vocab, z, -jnp.inf)


def forward(z: Array, ids: Array, valid: Array, *, temperatures: Sequence[float], vocab_axis: str | None) -> RowGather:
    """Returns the row statistics of prepared logits `z` [T, V] and `z` at `ids` [T, G] where `valid` [T, G]."""
    shift = z.max(axis=-1)
    if vocab_axis is not None:
        shift = lax.pmax(shift, vocab_axis)
    shift = jnp.where(jnp.isfinite(shift), shift, 0.0)
    relative = z - shift[:, None]
    sums = jnp.stack([jnp.exp(relative / t).sum(axis=-1) for t in temperatures], axis=-1)
    local = ids - _offset(z.shape[-1], vocab_axis)
    here = valid & (local >= 0) & (local < z.shape[-1])
    local = jnp.where(here, local, 0)
    gathered = jnp.where(here, jnp.take_along_axis(z, local, axis=-1, mode="clip") - shift[:, None], 0.0)
    if vocab_axis is not None:
        sums, gathered = lax.psum((sums, gathered), vocab_axis)
    return RowGather(shift, jnp.log(sums), gathered)


def logits_gradient(
    z: Array,
    ids: Array,
    valid: Array,
    stats: RowGather,
    grad_logsum: Array,
    grad_z: Array,
    *,
    temperatures: Sequence[float],
    softcap: float | None,
    vocab_axis: str | None,
) -> Array:
    """Returns dlogits [T, V] float32: `sum_i g_i / tau_i softmax_i + scatter(grad_z)`, through the soft cap.

    A row whose cotangents are all zero gets exact zeros, whatever its logits hold (NaN and inf included).
    """
    relative = z - stats.shift[:, None]
    total = jnp.zeros_like(z)
    for i, t in enumerate(temperatures):
        total += (grad_logsum[:, i] / t)[:, None] * jnp.exp(relative / t - stats.logsum[:, i, None])
    local = ids - _offset(z.shape[-1], vocab_axis)
    here = valid & (local >= 0) & (local < z.shape[-1])
    rows = jnp.arange(z.shape[0])[:, None]
    total = total.at[rows, jnp.where(here, local, z.shape[-1])].add(jnp.where(here, grad_z, 0.0), mode="drop")
    if softcap is not None:
        total *= jnp.where(jnp.isfinite(z), 1.0 - (z / softcap) ** 2, 0.0)
    alive = (grad_logsum != 0).any(axis=-1) | (grad_z != 0).any(axis=-1)
    return jnp.where(alive[:, None], total, 0.0)
