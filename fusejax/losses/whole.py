"""The training loss from whole logits, for what the fused kernels cannot gather: at small vocabularies, for comparison.

A scan over chunks of tokens holds one chunk's logits, forward and, recomputed, backward; JAX differentiates it. Used
where a distribution has as many entries as the vocabulary (`capture.top_k: all`): the probability of an event is
then summed over all its tokens, whatever their number, and what is outside is summed too, not `1 - sum`. Used as well
for the losses of `fusejax.losses.rivals`, whose targets have other meanings: of ULD, entries are the source's in
falling order, whatever tokens they are; of ALM, the one entry of the position that predicts a chunk's last token has
the chunk's number of tokens in the place of the id, and its log-probability under the source.

Deliberately not here: a vocabulary split over devices, and any speed. A step costs several passes over
`[tokens, V]`, each distribution one scatter more; `fusejax.losses.fused` is what trains large models.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from fusejax.errors import InputError
from fusejax.losses.rivals import alm_divergence, chunk_logprobs, uld_distance
from fusejax.losses.weights import batch_metrics, position_weights, supervision_masks
from fusejax.parallel.sharding import ShardingRules
from fusejax.types import EventGroups, FusionBatch, TopK
from pallas_kernels.fused_softmax_kl import check_options, divergence_sum

__all__ = ["batch_whole_loss", "symbol_tables", "whole_divergence"]

Array = jax.Array
_CHUNK_ENTRIES = 2**22  # logits held at once: 16 MiB, and about ten arrays like them backward
_FLOOR = 1e-30  # of an event's probability under the model


class _Rows(NamedTuple):
    """Tokens of a batch, one after another; leaves [N, ...]."""

    hidden: Array  # [N, D]
    labels: Array  # [N]
    targets: TopK  # ids [N, M, K]
    partition: Array  # [N, M]
    masks: tuple[Array, Array]  # [N], [N, M] bool


def symbol_tables(groups: EventGroups | None, vocab: int) -> Array:
    """Returns the symbol [S, V] int32 of every token in each stacked partition, V where it has none.

    Args:
      groups: offsets [S, V + 1], members [S, V]; None: every token is its own symbol, S = 1.
      vocab: V.
    """
    if groups is None:
        return jnp.arange(vocab, dtype=jnp.int32)[None]
    slots = jnp.arange(vocab, dtype=jnp.int32)

    def table(offsets: Array, members: Array) -> Array:
        symbols = jnp.searchsorted(offsets, slots, side="right").astype(jnp.int32) - 1
        at = jnp.where(members >= 0, members, vocab)
        return jnp.full(vocab, vocab, jnp.int32).at[at].set(symbols, mode="drop")

    return jax.vmap(table)(groups.offsets, groups.members)


def whole_divergence(
    logits: Array,
    targets: TopK,
    tables: Array,
    partition: Array,
    mask: Array,
    *,
    divergence: str = "kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
) -> Array:
    """Returns the divergence [n] in nats of a model from one distribution per position, of any number of entries.

    The conventions are those of `pallas_kernels.fused_softmax_kl.losses`: repeated entries are one, an entry whose
    symbol has no token belongs to the rest.

    Args:
      logits: [n, V] float32.
      targets: ids [n, K] symbols, -1: unused; logprobs [n, K]; residual_logprob [n].
      tables: [S, V] int32, the symbol of every token in each partition, V: none; see `symbol_tables`.
      partition: [n] int32, the row of `tables` that holds at a position.
      mask: [n] bool; False gives exact zeros in value and gradient.
      divergence, tail, temperature, scale_by_temperature_squared: as in `event_divergence`.
    """
    check_options(divergence=divergence, tail=tail, temperature=temperature)
    vocab = logits.shape[1]
    q = jax.nn.softmax(jnp.where(mask[:, None], logits, 0.0) / temperature)
    live = mask[:, None] & (targets.ids >= 0) & (targets.logprobs > -jnp.inf)
    ids = jnp.where(live, targets.ids, vocab)
    rows = jnp.arange(len(ids))[:, None]
    p = jnp.zeros_like(q).at[rows, ids].add(jnp.where(live, jnp.exp(targets.logprobs), 0.0), mode="drop")
    row = jnp.clip(partition, 0, len(tables) - 1)
    named = jnp.zeros(tables.shape, bool).at[jnp.arange(len(tables))[:, None], tables].set(True, mode="drop")
    symbols, used = tables[row], named[row] & (p > 0)
    homeless = jnp.where(used, 0.0, p).sum(axis=-1)
    rest = jnp.where(mask, jnp.logaddexp(targets.residual_logprob, jnp.log(homeless)), -jnp.inf)
    if tail == "renormalize":
        p = p / jnp.maximum(jnp.where(used, p, 0.0).sum(axis=-1, keepdims=True), _FLOOR)
    mass = jnp.zeros_like(q).at[rows, symbols].add(q, mode="drop")
    nowhere = jnp.where(symbols == vocab, q, 0.0).sum(axis=-1)
    outside = nowhere + jnp.where(used, 0.0, mass).sum(axis=-1)
    p, rest = jax.lax.stop_gradient((p, rest))
    total = divergence_sum(
        jnp.log(jnp.where(used, p, 1.0)),
        rest,
        jnp.log(jnp.maximum(jnp.where(used, mass, 1.0), _FLOOR)),
        jnp.log(jnp.maximum(outside, _FLOOR)),
        used,
        divergence=divergence,
        tail=tail,
    )
    return (temperature**2 if scale_by_temperature_squared else 1.0) * jnp.where(mask, total, 0.0)


def _clm(logits: Array, labels: Array, mask: Array) -> Array:
    """Returns the cross-entropy [n] in nats; a label outside the vocabulary has none."""
    known = mask & (labels >= 0) & (labels < logits.shape[1])
    chosen = jnp.take_along_axis(logits, jnp.where(known, labels, 0)[:, None], axis=1)[:, 0]
    return jnp.where(known, jax.nn.logsumexp(logits, axis=1) - chosen, 0.0)


def _in_chunks(rows: _Rows, head: Array, layout: str, size: int, terms: Callable[..., Array]) -> tuple[Array, Array]:
    """Returns (clm [N], terms [N, M]) of all tokens, `size` at a time."""
    count = len(rows.labels)
    parts = -(-count // size)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, parts * size - count)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(parts, size, *x.shape[1:])

    @jax.checkpoint
    def chunk(part: _Rows) -> tuple[Array, Array]:
        wanted = part.masks[0] | part.masks[1].any(axis=-1)
        hidden = jnp.where(wanted[:, None], part.hidden, 0)
        logits = jnp.einsum(f"cd,{layout}->cv", hidden, head, preferred_element_type=jnp.float32)
        return _clm(logits, part.labels, part.masks[0]), terms(logits, part)

    out = jax.lax.map(chunk, jax.tree.map(split, rows))
    return jax.tree.map(lambda x: x.reshape(parts * size, *x.shape[2:])[:count], out)


def _divergences(tables: Array, options: dict[str, Any]) -> Callable[[Array, _Rows], Array]:
    """What computes the divergences [n, M] of one chunk; zeros for ALM, which needs no more than the labels."""
    divergence = options.get("divergence", "kl")
    of_uld = {name: options[name] for name in ("tail", "temperature") if name in options}

    def terms(logits: Array, part: _Rows) -> Array:
        found = []
        for m in range(part.partition.shape[1]):
            one, mask = TopK(*(x[:, m] for x in part.targets)), part.masks[1][:, m]
            if divergence == "uld":
                found.append(uld_distance(logits, one, mask, **of_uld))
            else:
                found.append(whole_divergence(logits, one, tables, part.partition[:, m], mask, **options))
        return jnp.stack(found, axis=1)

    return (lambda logits, part: jnp.zeros(part.partition.shape)) if divergence == "alm" else terms


def _of_chunks(batch: FusionBatch, clm: Array, masks: tuple, temperature: float) -> tuple[Array, Array, Array]:
    """ALM's divergences [B, T, M] where chunks end, where that is, and the positions [B, T] that chunks cover."""
    found, ends, covered = [], [], jnp.zeros_like(masks[0])
    for m in range(batch.partition.shape[2]):
        lengths = jnp.where(masks[1][..., m], batch.targets.ids[..., m, 0], 0)
        chunks = chunk_logprobs(-clm, lengths, batch.positions, masks[0])
        said = batch.targets.logprobs[..., m, 0]
        found.append(alm_divergence(said, chunks.logprob, chunks.ends, temperature=temperature))
        ends.append(chunks.ends)
        covered |= chunks.covered
    return jnp.stack(found, axis=-1), jnp.stack(ends, axis=-1), covered


def _chunk_size(vocab: int, chunk: int | None) -> int:
    return max(1, _CHUNK_ENTRIES // vocab) if chunk is None else chunk


def batch_whole_loss(
    hidden: Array,
    head: Array,
    batch: FusionBatch,
    groups: EventGroups | None,
    *,
    clm_weight: float | Array = 0.9,
    fusion_weight: float | Array = 0.1,
    unsupervised: str = "clm",
    head_layout: str = "dv",
    denominator: float | Array | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
    chunk: int | None = None,
    **options: Any,
) -> tuple[Array, dict[str, Array]]:
    """Returns what `fusejax.losses.fused.batch_fusion_loss` does, for distributions of any number of entries.

    Args:
      hidden, head, batch, groups, clm_weight, fusion_weight, unsupervised, head_layout, denominator, rules: as there.
      mesh: an Auto mesh; None: one device.
      chunk: tokens whose logits are held at once; None: as many as make 16 MiB.
      **options: divergence, also "uld" and "alm"; tail, temperature, scale_by_temperature_squared.

    Returns:
      (loss [] float32, metrics: those of `batch_fusion_loss`).

    Raises:
      InputError: a mesh that splits the vocabulary; ValueError: options that cannot be used.
    """
    vocab = head.shape[1 if head_layout == "dv" else 0]
    rules = rules or ShardingRules()
    for axis in rules.vocab:
        if mesh is not None and mesh.shape.get(axis, 1) > 1:
            raise InputError(
                f"whole logits are not split over mesh axis {axis!r}, which has {mesh.shape[axis]} devices; "
                f"set mesh.{axis} 1"
            )
    count = jnp.maximum((batch.mask != 0).sum(dtype=jnp.float32), 1.0) if denominator is None else denominator
    masks, supervised = supervision_masks(batch), None

    def local(hidden: Array, head: Array, tables: Array, rows: tuple) -> tuple[Array, Array]:
        flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), _Rows(hidden, *rows))
        found = _in_chunks(flat, head, head_layout, _chunk_size(vocab, chunk), _divergences(tables, options))
        return jax.tree.map(lambda x: x.reshape(*hidden.shape[:2], *x.shape[1:]), found)

    call: Any = local
    if mesh is not None:
        tokens = P(tuple(a for a in rules.batch if a in mesh.shape) or None)
        specs = {"in_specs": (tokens, P(), P(), tokens), "out_specs": tokens}
        call = jax.shard_map(local, mesh=mesh, **specs, check_vma=False)
    rows = (batch.labels, batch.targets, batch.partition, masks)
    out = call(hidden, head, symbol_tables(groups, vocab), jax.lax.stop_gradient(rows))
    if options.get("divergence") == "alm":
        fusion, ends, supervised = _of_chunks(batch, out[0], masks, options.get("temperature", 1.0))
        out, masks = (out[0], fusion), (masks[0], ends)
    how = {"unsupervised": unsupervised, "supervised": supervised}
    weights = position_weights(batch, masks, clm_weight, fusion_weight, count, **how)
    clm, fusion = (jnp.where(m, w * x, 0.0).sum() for x, m, w in zip(out, masks, weights, strict=True))
    sources = 0 if groups is None else groups.offsets.shape[0]
    nothing = jnp.zeros_like(batch.targets.residual_logprob)  # no rest is floored, no event folded
    return clm + fusion, jax.lax.stop_gradient(batch_metrics(out, nothing[..., 0], masks, batch, nothing, sources))
