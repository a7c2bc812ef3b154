"""The loss of a training step: hidden states and head in, one scalar out, no `[B, T, V]` array in between.

`batch_fusion_loss` joins the batch, the partitions and the kernel. On a mesh it owns the `shard_map`: tokens over
`token_axes`, the vocabulary over `vocab_axis`. Gradients are computed inside the forward `shard_map` and scaled by
the cotangent, so nothing differentiates through a collective, and Auto and Explicit meshes behave alike. Per chunk
the collectives are a `pmax` of `[c]` and a `psum` of `[c, n + G]`; logits are never gathered. The head is gathered
over the token axes if it is stored split over them (fsdp), as in any such step.

Deliberately not here: sources with different partitions are never averaged as probabilities, they are mixed as a
weighted sum of divergences (the M axis); nothing is tempered on the target's side.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fusejax.errors import InputError
from fusejax.losses.events import count_folded, expand_events
from fusejax.losses.weights import batch_metrics, position_weights, supervision_masks
from fusejax.types import EventGroups, FusionBatch, TopK
from pallas_kernels.fused_softmax_kl import (
    LinearOptions,
    Targets,
    TokenLosses,
    chunk_tokens,
    linear_loss_and_gradients,
    merge_duplicates,
    weighted_sum,
)

__all__ = ["accelerator_chunk", "batch_fusion_loss"]

Array = jax.Array


class _Placement(NamedTuple):
    """Where the arrays lie; hashable, so that it can be a static argument."""

    mesh: Mesh | None
    token_axes: tuple[str, ...]
    vocab_axis: str | None

    def tokens(self) -> P:
        return P(self.token_axes or None)

    def head(self, layout: str) -> P:
        return P(None, self.vocab_axis) if layout == "dv" else P(self.vocab_axis, None)


class _Rows(NamedTuple):
    """The supervision of a batch; leaves [B, T, ...]."""

    labels: Array
    targets: TopK
    partition: Array


def _symbols(rows: _Rows) -> tuple[Array, Array, Array]:
    """Returns (symbol [c, M, K], event [c, M * K], logprobs [c, M, K]), repeated symbols counted once."""
    tokens, mixed, k = rows.targets.ids.shape
    slots = jnp.broadcast_to(jnp.arange(mixed * k, dtype=jnp.int32), (tokens, mixed * k))
    symbols = rows.targets.ids.reshape(tokens, mixed * k)
    event, logprobs = merge_duplicates(symbols, slots, rows.targets.logprobs.astype(jnp.float32), sets=False)
    live = (event >= 0) & (logprobs.reshape(tokens, mixed * k) > -jnp.inf)
    return jnp.where(live, symbols, -1).reshape(tokens, mixed, k), event, logprobs


def _expand(rows: _Rows, groups: EventGroups | None, max_members: int) -> Targets:
    symbols, event, logprobs = _symbols(rows)
    tokens, mixed, k = symbols.shape
    rest = rows.targets.residual_logprob.astype(jnp.float32)
    if groups is None or mixed * k == 0:
        return Targets(rows.labels, symbols.reshape(tokens, mixed * k), event, logprobs, rest)
    members, event, _ = expand_events(symbols, groups, max_members=max_members, partition=rows.partition)
    event = jnp.where(event >= 0, event + k * jnp.arange(mixed, dtype=jnp.int32)[:, None], -1)
    return Targets(rows.labels, members.reshape(tokens, -1), event.reshape(tokens, -1), logprobs, rest)


def _folded(rows: _Rows, groups: EventGroups | None, max_members: int) -> Array:
    """Returns the number of events [c] that find no room and join the rest."""
    symbols, _, _ = _symbols(rows)
    if groups is None or symbols.size == 0:
        return jnp.zeros_like(rows.labels)
    return count_folded(symbols, groups, max_members=max_members, partition=rows.partition).sum(axis=-1)


def _local(
    hidden: Array,
    head: Array,
    rows: _Rows,
    groups: EventGroups | None,
    masks: tuple,
    weights: TokenLosses | None,
    *,
    options: LinearOptions,
    max_members: int,
    token_axes: tuple[str, ...],
) -> tuple:
    """One device's part: returns (losses [b, t, ...], folded [b, t], (dhidden, dhead) or None)."""
    shape = hidden.shape[:2]
    flatten: Any = functools.partial(jax.tree.map, lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]))
    restore: Any = functools.partial(jax.tree.map, lambda x: x.reshape(*shape, *x.shape[1:]))
    options = options._replace(expand=lambda chunk: _expand(chunk, groups, max_members))
    flat, rows, masks, weights = flatten((hidden, rows, masks, weights))
    out, dhidden, dhead = linear_loss_and_gradients(flat, head, rows, masks, weights, options)
    out, folded = restore((out, _folded(rows, groups, max_members)))
    if dhidden is None or dhead is None:
        return out, folded, None
    if token_axes:
        dhead = jax.lax.psum(dhead, token_axes)
    return out, folded, (restore(dhidden), dhead.astype(head.dtype))


def _run(static: tuple, hidden: Array, head: Array, rows: _Rows, groups: Any, masks: tuple, weights: Any) -> tuple:
    place, options, max_members = static
    local = functools.partial(_local, options=options, max_members=max_members, token_axes=place.token_axes)
    if place.mesh is None:
        return local(hidden, head, rows, groups, masks, weights)
    tokens, kernel = place.tokens(), place.head(options.head_layout)
    mapped = jax.shard_map(
        local,
        mesh=place.mesh,
        in_specs=(tokens, kernel, tokens, P(), tokens, tokens),
        out_specs=(tokens, tokens, None if weights is None else (tokens, kernel)),
        check_vma=False,
    )
    return mapped(hidden, head, rows, groups, masks, weights)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static: tuple, hidden: Array, head: Array, rows: _Rows, groups: Any, masks: tuple, weights: Any) -> tuple:
    out, folded, _ = _run(static, hidden, head, rows, groups, masks, None)
    return weighted_sum(out, weights), out, folded


def _fused_forward(static: tuple, hidden: Array, head: Array, *rest: Any) -> tuple:
    out, folded, gradients = _run(static, hidden, head, *rest)
    return (weighted_sum(out, rest[-1]), out, folded), gradients


def _fused_backward(static: tuple, gradients: tuple, cotangent: tuple) -> tuple:
    scale = cotangent[0]
    return *(g * scale.astype(g.dtype) for g in gradients), None, None, None, None


_fused.defvjp(_fused_forward, _fused_backward)


def _placement(
    mesh: Mesh | None, token_axes: tuple[str, ...], vocab_axis: str, batch_rows: int, vocab: int
) -> _Placement:
    if mesh is None:
        return _Placement(None, (), None)
    axes = tuple(a for a in token_axes if a in mesh.shape)
    split = vocab_axis if mesh.shape.get(vocab_axis, 1) > 1 else None
    ways = 1
    for axis in axes:
        ways *= mesh.shape[axis]
    if batch_rows % ways:
        raise InputError(f"a batch of {batch_rows} rows cannot be split over {ways} devices; use a multiple of {ways}")
    if split and vocab % mesh.shape[split]:
        raise InputError(
            f"a head of {vocab} rows cannot be split over {mesh.shape[split]} devices of mesh axis {split!r}; "
            "pad the vocabulary (and give valid_vocab) or use a smaller tensor axis"
        )
    return _Placement(mesh, axes, split)


def _put(tree: Any, place: _Placement, spec: P) -> Any:
    """Gives arrays the sharding that the `shard_map` expects; Auto meshes do so by themselves."""
    if place.mesh is None or AxisType.Explicit not in place.mesh.axis_types:
        return tree
    sharding = NamedSharding(place.mesh, spec)
    return jax.tree.map(lambda x: jax.sharding.reshard(x, sharding), tree)


def accelerator_chunk(tokens: int, vocab: int) -> int:
    """Returns how many tokens' logits an accelerator holds at once, of `tokens` and `vocab` on one device."""
    return chunk_tokens(tokens, vocab)


def batch_fusion_loss(
    hidden: Array,
    head: Array,
    batch: FusionBatch,
    groups: EventGroups | None,
    *,
    clm_weight: float | Array = 0.9,
    fusion_weight: float | Array = 0.1,
    unsupervised: str = "clm",
    head_layout: str = "dv",
    max_members: int = 256,
    denominator: float | Array | None = None,
    mesh: Mesh | None = None,
    token_axes: tuple[str, ...] = ("data", "fsdp"),
    vocab_axis: str = "tensor",
    **options: Any,
) -> tuple[Array, dict[str, Array]]:
    """Returns `clm_weight * CLM + fusion_weight * sum_m weights_m * divergence_m` over the trained tokens.

    Args:
      hidden: [B, T, D]; head: [D, V], or [V, D] with `head_layout="vd"`.
      batch: leaves [B, T, ...]; `targets.ids` are symbols of the partition that `partition` names.
      groups: the partitions of the sources, stacked [S, ...]; None: every id is a token, `partition` >= 0 says
        that there is a distribution.
      clm_weight, fusion_weight: may be traced; a literal `fusion_weight=0` leaves out the divergence.
      unsupervised: "clm": CLM takes `clm_weight + fusion_weight` where there is no distribution; "none": it does not.
      max_members: slots for the members of one distribution's events; what does not fit joins the rest.
      denominator: trained tokens of the whole step over all its micro-batches and devices; None: of this batch.
      mesh: None: one device; else tokens are split over `token_axes`, the vocabulary over `vocab_axis`.
      **options: divergence, tail, temperature, scale_by_temperature_squared, chunk, softcap, valid_vocab, logits_dtype,
        z_loss_weight (in parts of CLM's weight).

    Returns:
      (loss [] float32, metrics: float32 scalars `clm_nats` per trained token, `fusion_nats` per supervised token,
      `tokens`, `supervised_tokens`, `folded_events`; `floored_rests`, the distributions whose rest is below the floor;
      with groups also, [S] float32 per row of them: `source_tokens`, the positions it supervises, `source_nats`, its
      mean divergence there, `source_share`, its part of the supervised positions' weights; with a z-loss `z_loss`).

    Raises:
      InputError: sizes that the mesh cannot split; ValueError: options that cannot be used.
    """
    if isinstance(fusion_weight, (int, float)) and fusion_weight == 0:
        none = TopK(*(x[:, :, :0] for x in batch.targets))
        batch = batch._replace(targets=none, partition=batch.partition[..., :0], weights=batch.weights[..., :0])
    settings = LinearOptions(head_layout=head_layout, **options)
    vocab = head.shape[1 if head_layout == "dv" else 0]
    place = _placement(mesh, token_axes, vocab_axis, hidden.shape[0], vocab)
    settings = settings._replace(vocab_axis=place.vocab_axis)
    count = jnp.maximum((batch.mask != 0).sum(dtype=jnp.float32), 1.0) if denominator is None else denominator
    masks = supervision_masks(batch)
    clm, kl = position_weights(batch, masks, clm_weight, fusion_weight, count, unsupervised=unsupervised)
    weights = TokenLosses(clm, kl, settings.z_loss_weight * clm)
    rows, masks, weights = _put(
        (_Rows(batch.labels, batch.targets, batch.partition), masks, weights), place, place.tokens()
    )
    hidden, head = _put(hidden, place, place.tokens()), _put(head, place, place.head(head_layout))
    groups = _put(groups, place, P())
    result: Any = _fused((place, settings, max_members), hidden, head, rows, groups, masks, weights)
    loss, out, folded = result
    sources = 0 if groups is None else groups.offsets.shape[0]
    metrics = batch_metrics(out[:2], folded, masks, batch, batch.targets.residual_logprob, sources)
    if settings.z_loss_weight:
        metrics["z_loss"] = out.z_loss.sum() / jnp.maximum(metrics["tokens"], 1.0)
    return loss, jax.lax.stop_gradient(metrics)
