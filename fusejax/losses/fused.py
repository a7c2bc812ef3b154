"""The loss of a training step: hidden states and head in, one scalar out, no `[B, T, V]` array in between.

`batch_fusion_loss` joins the batch, the partitions and the kernel. On a mesh it owns the `shard_map`, laid out by
the sharding rules: tokens as `batch`, the head as `embed` and `vocab`. Gradients are computed inside the forward
`shard_map` and scaled by the cotangent, so nothing differentiates through a collective, and Auto and Explicit meshes
behave alike. Per chunk the collectives are a `pmax` of `[c]` and a `psum` of `[c, n + G]`; logits are never gathered.
A head that is stored split over token axes (fsdp) is gathered over them, and its gradient is scattered back: no
device ever holds the sum of it whole.

Deliberately not here: sources with different partitions are never averaged as probabilities, they are mixed as a
weighted sum of divergences (the M axis); nothing is tempered on the target's side.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fusejax.errors import InputError
from fusejax.losses.events import count_folded, expand_events
from fusejax.losses.weights import batch_metrics, position_weights, supervision_masks
from fusejax.parallel.sharding import ShardingRules
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

    mesh: Mesh | None = None
    token_axes: tuple[str, ...] = ()
    vocab_axis: str | None = None
    width_axes: tuple[str, ...] = ()  # token axes over which the head is stored split along its width

    def tokens(self) -> P:
        return P(self.token_axes or None)

    def head(self, layout: str) -> P:
        width = self.width_axes or None
        return P(width, self.vocab_axis) if layout == "dv" else P(self.vocab_axis, width)

    def whole_head(self, head: Array, layout: str) -> Array:
        """Inside the `shard_map`: the head with all of its width."""
        if not self.width_axes:
            return head
        return jax.lax.all_gather(head, self.width_axes, axis=0 if layout == "dv" else 1, tiled=True)

    def summed_gradient(self, dhead: Array, layout: str) -> Array:
        """Inside the `shard_map`: the head's gradient over all tokens, split as the head is stored."""
        if self.width_axes:
            along = 0 if layout == "dv" else 1
            dhead = jax.lax.psum_scatter(dhead, self.width_axes, scatter_dimension=along, tiled=True)
            # libtpu 0.0.52 fails on moving this sum out of the loop over micro-batches, through the rounding after it
            dhead = jax.lax.optimization_barrier(dhead)
        rest = tuple(axis for axis in self.token_axes if axis not in self.width_axes)
        return jax.lax.psum(dhead, rest) if rest else dhead


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
    place: _Placement,
) -> tuple:
    """One device's part: returns (losses [b, t, ...], folded [b, t], (dhidden, dhead) or None)."""
    shape = hidden.shape[:2]
    flatten: Any = functools.partial(jax.tree.map, lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]))
    restore: Any = functools.partial(jax.tree.map, lambda x: x.reshape(*shape, *x.shape[1:]))
    options = options._replace(expand=lambda chunk: _expand(chunk, groups, max_members))
    flat, rows, masks, weights = flatten((hidden, rows, masks, weights))
    whole = place.whole_head(head, options.head_layout)
    out, dhidden, dhead = linear_loss_and_gradients(flat, whole, rows, masks, weights, options)
    out, folded = restore((out, _folded(rows, groups, max_members)))
    if dhidden is None or dhead is None:
        return out, folded, None
    return out, folded, (restore(dhidden), place.summed_gradient(dhead, options.head_layout).astype(head.dtype))


def _run(static: tuple, hidden: Array, head: Array, rows: _Rows, groups: Any, masks: tuple, weights: Any) -> tuple:
    place, options, max_members = static
    local = functools.partial(_local, options=options, max_members=max_members, place=place)
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


def _placement(mesh: Mesh | None, rules: ShardingRules, batch_rows: int, width: int, vocab: int) -> _Placement:
    if mesh is None:
        return _Placement()
    tokens = tuple(axis for axis in rules.batch if axis in mesh.shape)
    widths = tuple(axis for axis in rules.embed if axis in tokens and mesh.shape[axis] > 1)
    split = [axis for axis in rules.vocab if mesh.shape.get(axis, 1) > 1]
    if len(split) > 1:
        raise InputError(f"the loss splits the vocabulary over one mesh axis, the rules name {', '.join(split)}")
    place = _Placement(mesh, tokens, split[0] if split else None, widths)
    if batch_rows % (ways := _ways(mesh, tokens)):
        raise InputError(f"a batch of {batch_rows} rows cannot be split over {ways} devices; use a multiple of {ways}")
    if width % (ways := _ways(mesh, widths)):
        raise InputError(f"a head of width {width} cannot be split over {ways} devices; use a smaller fsdp axis")
    if vocab % (ways := _ways(mesh, split)):
        raise InputError(
            f"a head of {vocab} rows cannot be split over {ways} devices of mesh axis {split[0]!r}; "
            "pad the vocabulary (and give valid_vocab) or use a smaller tensor axis"
        )
    return place


def _ways(mesh: Mesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


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
    rules: ShardingRules | None = None,
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
      mesh: None: one device.
      rules: where rows, vocabulary and the head's width lie on the mesh; the default rules if None.
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
    width, vocab = head.shape if head_layout == "dv" else head.shape[::-1]
    place = _placement(mesh, rules or ShardingRules(), hidden.shape[0], width, vocab)
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
