"""The output matmul fused with the losses: a scan over token chunks, no `[T, V]` array in either direction.

Per chunk: one matmul to the logits, the primitive, the losses of `losses` and their vector-Jacobian
product on `[c, G]` arrays, one write of dlogits, two matmuls. XLA's own matmuls are kept: a hand-written one
would save under a tenth at real widths.

* `linear_fusion_loss` takes its weights in advance, so gradients are computed in the forward scan: 6TDV.
* `linear_fused_softmax_kl` returns unreduced losses and takes any cotangent: it scans again backward, with the
  cotangents as weights: 8TDV. Both run the same chunk body.

The head's gradient accumulates in float32. Positions with zero weight are replaced, not multiplied: a NaN in
them reaches nothing. With `vocab_axis` (inside `jax.shard_map`), `head` is the local shard of the vocabulary,
the cotangents must be equal on all its shards, the gradient of `hidden` is summed over the axis and that of
`head` is local; under `check_vma=True` make `head` varying over the token axes first (`jax.lax.pcast`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.fused_softmax_kl import dispatch, losses, matmuls, primitive, reference, tiling

__all__ = [
    "LinearOptions",
    "Targets",
    "linear_fused_softmax_kl",
    "linear_fusion_loss",
    "linear_loss_and_gradients",
    "weighted_sum",
]

Array = jax.Array


class Targets(NamedTuple):
    """What supervises each position of a chunk."""

    labels: Array  # [T] int32; outside the vocabulary: no CLM loss
    ids: Array  # [T, G] int32, members of the events
    event: Array  # [T, G] int32 in 0..M*K-1, -1: padding
    logprobs: Array  # [T, M, K] nats
    rest_logprob: Array  # [T, M] nats


class LinearOptions(NamedTuple):
    """Static options of the scan; hashable. `expand` turns one chunk of targets into `Targets`."""

    divergence: str = "kl"
    tail: str = "bucket"
    temperature: float = 1.0
    scale_by_temperature_squared: bool = False
    head_layout: str = "dv"
    chunk: int | None = None
    softcap: float | None = None
    valid_vocab: int | None = None
    vocab_axis: str | None = None
    implementation: str | None = None
    logits_dtype: str | None = None
    z_loss_weight: float = 0.0
    interpret: bool = False
    expand: Callable[[Any], Targets] | None = None


class _Chunk(NamedTuple):
    hidden: Array  # [c, D]
    targets: Any  # leaves [c, ...]
    masks: tuple[Array, Array]  # ([c], [c, M]) bool: which losses are wanted
    weights: losses.TokenLosses  # ([c], [c, M], [c]) float32: the cotangents of the losses


def _logits(hidden: Array, head: Array, options: LinearOptions) -> Array:
    return matmuls.logits(hidden, head, layout=options.head_layout, dtype=options.logits_dtype or jnp.float32)


def _spec(options: LinearOptions) -> primitive.Spec:
    temperatures = (1.0,) if options.temperature == 1.0 else (1.0, options.temperature)
    fields = options.softcap, options.valid_vocab, options.vocab_axis, options.implementation, options.interpret
    return primitive.Spec(temperatures, *fields)


def _losses(
    lse: Array, z: Array, shift: Array, targets: Targets, chunk: _Chunk, options: LinearOptions, vocab: int
) -> losses.TokenLosses:
    """Returns the chunk's losses from the log-sum-exps at 1 (and the temperature) and z at [label, ids].

    Both are relative to `shift` [c], which only the z-loss needs.
    """
    real = primitive.valid_ids(targets.labels, vocab, options.valid_vocab) & chunk.masks[0]
    clm = losses.clm_nats(z[:, 0], lse[:, 0], real)
    event = jnp.where(primitive.valid_ids(targets.ids, vocab, options.valid_vocab), targets.event, -1)
    kl = losses.event_divergence(
        z[:, 1:],
        lse[:, -1],
        event,
        targets.logprobs,
        targets.rest_logprob,
        chunk.masks[1],
        divergence=options.divergence,
        tail=options.tail,
        temperature=options.temperature,
        scale_by_temperature_squared=options.scale_by_temperature_squared,
    )
    return losses.TokenLosses(clm, kl, losses.z_loss(lse[:, 0] + shift, real))


def _chunk_pass(chunk: _Chunk, head: Array, dhead: Array | None, options: LinearOptions) -> tuple:
    """Returns (the losses, dhidden, `dhead` plus the chunk's part); without `dhead`, no gradients.

    The chunk's weights are the cotangents.
    """
    active = chunk.masks[0] | chunk.masks[1].any(axis=-1)
    hidden = jnp.where(active[:, None], chunk.hidden, 0)
    targets = chunk.targets if options.expand is None else options.expand(chunk.targets)
    spec, axis = _spec(options), options.vocab_axis
    vocab = primitive.whole_vocab(matmuls.vocab_size(head, options.head_layout), spec)
    z = _logits(hidden, head, options)
    ids = jnp.concatenate([targets.labels[:, None], targets.ids], axis=1)
    stats = primitive.statistics(z, ids, spec)

    def from_statistics(logsum: Array, gathered: Array) -> losses.TokenLosses:
        return _losses(logsum, gathered, stats.shift, targets, chunk, options, vocab)

    if dhead is None:
        return from_statistics(stats.logsum, stats.z), None, None
    out, pull = jax.vjp(from_statistics, stats.logsum, stats.z)
    grad_logsum, grad_z = pull(chunk.weights)
    # Else XLA finds the same `z - shift` in both directions and keeps it: another array of the chunk's logits.
    z, stats = lax.optimization_barrier((z, stats))
    dlogits = primitive.logits_gradient(z, ids, stats, grad_logsum, grad_z, spec, dtype=hidden.dtype)
    dhidden = matmuls.hidden_gradient(dlogits, head, layout=options.head_layout)
    if axis is not None:
        dhidden = lax.psum(dhidden, axis)
    dhead = matmuls.add_head_gradient(dhead, hidden, dlogits, layout=options.head_layout)
    return out, dhidden.astype(hidden.dtype), dhead


def _in_chunks(rows: _Chunk, size: int) -> _Chunk:
    """Pads the tokens to a multiple of `size` with untrained positions and splits them: leaves [n, size, ...]."""
    tokens = rows.hidden.shape[0]
    padded = tiling.pad_to(max(tokens, 1), size)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, padded - tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(padded // size, size, *x.shape[1:])

    return jax.tree.map(split, rows)


def _chunk_size(tokens: int, vocab: int, options: LinearOptions) -> int:
    on_cpu = dispatch.platform() == "cpu"
    budget = tiling.CPU_LOGITS_BUDGET_BYTES if on_cpu else tiling.LOGITS_BUDGET_BYTES
    itemsize = jnp.dtype(options.logits_dtype or jnp.float32).itemsize
    return tiling.chunk_tokens(tokens, vocab, itemsize=itemsize, budget_bytes=budget)


def _scan(rows: _Chunk, head: Array, options: LinearOptions, *, gradients: bool) -> tuple:
    """Returns (TokenLosses, dhidden [T, D] or None, dhead float32 or None)."""
    tokens = rows.hidden.shape[0]
    size = options.chunk or _chunk_size(tokens, matmuls.vocab_size(head, options.head_layout), options)
    chunks = _in_chunks(rows, size)

    def body(dhead: Array | None, chunk: _Chunk) -> tuple:
        out, dhidden, dhead = _chunk_pass(chunk, head, dhead, options)
        return dhead, (out, dhidden)

    # The scalar zero gives the carry the axes over which the tokens vary inside a shard_map.
    start = jnp.zeros_like(head, dtype=jnp.float32) + jnp.zeros_like(rows.weights[0], shape=()) if gradients else None
    dhead, (out, dhidden) = lax.scan(body, start, chunks)

    def join(x: Array) -> Array:
        return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:tokens]

    return jax.tree.map(join, out), None if dhidden is None else join(dhidden), dhead


def _dense(rows: _Chunk, head: Array, options: LinearOptions) -> losses.TokenLosses:
    """The same losses from whole logits and the dense primitive, differentiated by jax."""
    active = rows.masks[0] | rows.masks[1].any(axis=-1)
    targets = rows.targets if options.expand is None else options.expand(rows.targets)
    ids = jnp.concatenate([targets.labels[:, None], targets.ids], axis=1)
    lse, z = reference.lse_gather(
        _logits(jnp.where(active[:, None], rows.hidden, 0), head, options),
        ids,
        temperatures=(1.0, options.temperature),
        softcap=options.softcap,
        valid_vocab=options.valid_vocab,
    )
    zero = jnp.zeros_like(lse[:, 0])
    return _losses(lse, z, zero, targets, rows, options, matmuls.vocab_size(head, options.head_layout))


def _check(hidden: Array, head: Array, options: LinearOptions) -> None:
    losses.check_options(divergence=options.divergence, tail=options.tail, temperature=options.temperature)
    if options.head_layout not in ("dv", "vd"):
        raise ValueError(f"head_layout={options.head_layout!r} is unknown; choose 'dv' ([D, V]) or 'vd' ([V, D])")
    width = head.shape[0 if options.head_layout == "dv" else 1]
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != width:
        raise ValueError(f"expected hidden [T, D] and head {options.head_layout}, got {hidden.shape} and {head.shape}")
    if options.chunk is not None and options.chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {options.chunk}")
    dispatch.check_implementation(options.implementation)
    if not options.z_loss_weight >= 0:
        raise ValueError(f"z_loss_weight must not be negative, got {options.z_loss_weight}")
    if options.logits_dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"logits_dtype must be 'float32' or 'bfloat16', got {options.logits_dtype!r}")
    if options.implementation == "reference" and options.vocab_axis is not None:
        raise ValueError("implementation='reference' is dense and cannot take vocab_axis; use 'xla'")


def linear_loss_and_gradients(
    hidden: Array,
    head: Array,
    targets: Any,
    masks: tuple[Array, Array],
    weights: losses.TokenLosses | None,
    options: LinearOptions,
) -> tuple[losses.TokenLosses, Any, Any]:
    """Returns the losses of every position and the gradients of their weighted sum, in one pass.

    Args:
      hidden: [T, D]; head: [D, V] or [V, D] as `options.head_layout` says (the local shard with `vocab_axis`).
      targets: `Targets`, or what `options.expand` turns into them; every leaf has a leading axis T.
      masks: ([T], [T, M]) bool, which of (clm and z-loss, kl) are wanted; the others are exact zeros.
      weights: ([T], [T, M], [T]) float32, the weights of the sum; None: losses only. `options.z_loss_weight` is for
        the callers: here the third of the weights says it.

    Returns:
      (`TokenLosses(clm [T], kl [T, M], z_loss [T])`, dhidden [T, D] in hidden's dtype, dhead float32; None
      both without weights).
    """
    _check(hidden, head, options)
    rows = _Chunk(hidden, targets, masks, weights if weights is not None else _for_each(masks))
    return _scan(rows, head, options, gradients=weights is not None)


def _for_each(masks: tuple) -> losses.TokenLosses:
    """Returns the masks (clm, kl) as one for each loss, float32."""
    return losses.TokenLosses(*(x.astype(jnp.float32) for x in (*masks, masks[0])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _unreduced(
    options: LinearOptions, hidden: Array, head: Array, targets: Targets, masks: tuple
) -> losses.TokenLosses:
    return linear_loss_and_gradients(hidden, head, targets, masks, None, options)[0]


def _unreduced_forward(options: LinearOptions, *arrays: Any) -> tuple[losses.TokenLosses, tuple]:
    return _unreduced(options, *arrays), arrays


def _unreduced_backward(options: LinearOptions, saved: tuple, cotangent: losses.TokenLosses) -> tuple:
    hidden, head, targets, masks = saved
    weights = jax.tree.map(lambda mask, g: jnp.where(mask != 0, g, 0.0), _for_each(masks), cotangent)
    _, dhidden, dhead = linear_loss_and_gradients(hidden, head, targets, masks, weights, options)
    return dhidden, dhead.astype(head.dtype), None, None


_unreduced.defvjp(_unreduced_forward, _unreduced_backward)


def weighted_sum(out: losses.TokenLosses, weights: losses.TokenLosses) -> Array:
    """Returns the sum [] of the losses by their weights; a weight of 0 masks hard."""
    clm, kl, z = (jnp.where(w != 0, w * x, 0.0).sum() for x, w in zip(out, weights, strict=True))
    return clm + kl + z


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _one_pass(
    options: LinearOptions, hidden: Array, head: Array, targets: Targets, masks: tuple, weights: losses.TokenLosses
) -> tuple[Array, losses.TokenLosses]:
    out = linear_loss_and_gradients(hidden, head, targets, masks, None, options)[0]
    return weighted_sum(out, weights), out


def _one_pass_forward(
    options: LinearOptions, hidden: Array, head: Array, targets: Targets, masks: tuple, weights: losses.TokenLosses
) -> tuple:
    out, dhidden, dhead = linear_loss_and_gradients(hidden, head, targets, masks, weights, options)
    return (weighted_sum(out, weights), out), (dhidden, dhead.astype(head.dtype))


def _one_pass_backward(options: LinearOptions, saved: tuple, cotangent: tuple) -> tuple:
    scale, dhidden, dhead = cotangent[0], *saved
    return dhidden * scale.astype(dhidden.dtype), dhead * scale.astype(dhead.dtype), None, None, None


_one_pass.defvjp(_one_pass_forward, _one_pass_backward)


def _normalised(labels: Array, ids: Array, logprobs: Array, rest: Array, event: Array | None) -> tuple[Targets, bool]:
    """Adds the M axis, the default events, and counts repeated ids once."""
    mixed = logprobs.ndim == 3
    logprobs, rest = (logprobs, rest) if mixed else (logprobs[:, None], rest[:, None])
    slots = logprobs.shape[1] * logprobs.shape[2]
    if event is None and ids.shape[1] != slots:
        raise ValueError(
            f"without event, ids must have one column per event: got {ids.shape[1]} columns, {slots} events"
        )
    if rest.shape != logprobs.shape[:2] or {labels.shape[0], ids.shape[0]} != {logprobs.shape[0]}:
        raise ValueError(f"shapes disagree: {labels.shape=} {ids.shape=} {logprobs.shape=} {rest.shape=}")
    sets = event is not None
    event = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), ids.shape) if event is None else event
    event, logprobs = losses.merge_duplicates(ids, event.astype(jnp.int32), lax.stop_gradient(logprobs), sets=sets)
    return Targets(labels, ids, event, logprobs, rest), mixed


def linear_fused_softmax_kl(
    hidden: Array,
    head: Array,
    labels: Array,
    ids: Array,
    logprobs: Array,
    rest_logprob: Array,
    mask: Array,
    *,
    event: Array | None = None,
    **options: Any,
) -> losses.TokenLosses:
    """Returns the unreduced CLM loss and divergence of every position, differentiable in hidden and head.

    Args:
      hidden: [T, D]; head: [D, V], or [V, D] with `head_layout="vd"`.
      labels: [T] int32, the next token; outside the vocabulary: no CLM loss.
      ids: [T, G] int32, members of the events; outside the vocabulary: inert.
      logprobs: [T, K] or [T, M, K] nats; rest_logprob: [T] or [T, M] nats.
      mask: [T]; 0 gives exact zeros in value and gradient.
      event: [T, G] int32 in 0..M*K-1, the event of each id, -1: padding; None: one id per event, G = M * K.
      **options: fields of `LinearOptions` (divergence="kl", tail="bucket", temperature=1.0, head_layout="dv",
        chunk=None, valid_vocab=None, implementation=None, ...).

    Returns:
      `TokenLosses(clm [T], kl [T] or [T, M], z_loss [T])` float32; `z_loss_weight` plays no part here.

    Raises:
      ValueError: shapes or options that cannot be used.
    """
    settings = LinearOptions(**options)
    _check(hidden, head, settings)
    targets, mixed = _normalised(labels, ids, logprobs, rest_logprob, event)
    masks = (mask != 0, jnp.broadcast_to((mask != 0)[:, None], targets.rest_logprob.shape))
    if settings.implementation == "reference":
        out = _dense(_Chunk(hidden, targets, masks, _for_each(masks)), head, settings)
    else:
        out: Any = _unreduced(settings, hidden, head, targets, masks)
    return out if mixed else out._replace(kl=out.kl[:, 0])


def linear_fusion_loss(
    hidden: Array,
    head: Array,
    labels: Array,
    ids: Array,
    logprobs: Array,
    rest_logprob: Array,
    clm_weights: Array,
    kl_weights: Array,
    *,
    event: Array | None = None,
    **options: Any,
) -> tuple[Array, losses.TokenLosses]:
    """Returns `sum(clm_weights * (clm + z_loss_weight * z_loss)) + sum(kl_weights * kl)`.

    The gradient is computed in the forward scan.

    Arguments are those of `linear_fused_softmax_kl`, with weights in the mask's place:
      clm_weights: [T] float32; kl_weights: [T] or [T, M] float32; 0 masks hard, and no gradient flows to them.

    Returns:
      (loss [] float32, `TokenLosses(clm [T], kl [T] or [T, M], z_loss [T])` without gradient).

    Raises:
      ValueError: shapes or options that cannot be used.
    """
    settings = LinearOptions(**options)
    _check(hidden, head, settings)
    targets, mixed = _normalised(labels, ids, logprobs, rest_logprob, event)
    kl_weights = kl_weights if mixed else kl_weights[:, None]
    clm_weights, kl_weights = lax.stop_gradient((clm_weights.astype(jnp.float32), kl_weights.astype(jnp.float32)))
    masks = clm_weights != 0, kl_weights != 0
    weights = losses.TokenLosses(clm_weights, kl_weights, settings.z_loss_weight * clm_weights)
    if settings.implementation == "reference":
        out = _dense(_Chunk(hidden, targets, masks, weights), head, settings)
        loss = weighted_sum(out, weights)
    else:
        both: Any = _one_pass(settings, hidden, head, targets, masks, weights)
        loss, out = both
    return loss, lax.stop_gradient(out if mixed else out._replace(kl=out.kl[:, 0]))
