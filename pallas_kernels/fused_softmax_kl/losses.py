"""Sparse divergences as plain jax.numpy on `[T, G]` arrays: no vocabulary axis here.

A position's target is K events with probabilities P_k and the rest P_rest. An event is a set of token ids;
its mass under the model is `Q_k = sum_v softmax(z / temperature)_v`, a segment log-sum-exp over the gathered
logits; `Q_rest = 1 - sum_k Q_k`. All in log space.

Conventions, each tested:
* An entry with logprob -inf is not an event: its ids belong to the rest, so adding such entries changes nothing.
* An event without any id of the vocabulary cannot be told from the rest: its probability joins P_rest.
* The same id twice in one event counts once, and events that share an id, also by way of others, are one event with
  the summed probability (`merge_duplicates`), as in a dense target that adds up.
* `Q_rest` is floored at `REST_FLOOR`: below it, `1 - sum Q_k` is rounding noise in float32. The gradient keeps
  its direction there and stays bounded. `P_rest` is floored alike where its logarithm is needed (reverse KL).
* No gradient flows to the targets. A masked position gives exact zeros in value and gradient, whatever it holds.
* A row of logits that are all -inf is no distribution: its losses are +inf, its gradient zero.

Tails: "bucket" keeps the rest as one more event; "renormalize" scales the P_k to sum to 1 and has no rest;
"zero" takes the P_k as they are and has no rest. The model's softmax is never renormalised over the support:
that would leave its mass elsewhere unpunished.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = [
    "DIVERGENCES",
    "REST_FLOOR",
    "TAILS",
    "TokenLosses",
    "check_options",
    "clm_nats",
    "divergence_sum",
    "event_divergence",
    "merge_duplicates",
    "rest_floored",
    "segment_logsumexp",
    "z_loss",
]

Array = jax.Array
DIVERGENCES = ("kl", "ce", "reverse_kl", "jsd")
TAILS = ("bucket", "renormalize", "zero")
REST_FLOOR = 1e-6


class TokenLosses(NamedTuple):
    """Unreduced losses of each position, float32; the first two in nats."""

    clm: Array  # [T], cross-entropy of the label
    kl: Array  # [T] or [T, M], divergence from each target distribution
    z_loss: Array  # [T], (log sum exp logits)^2 where there is a cross-entropy


def check_options(*, divergence: str, tail: str, temperature: float) -> None:
    """Raises ValueError for an unknown or impossible combination of loss options."""
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is unknown; choose one of {', '.join(DIVERGENCES)}")
    if tail not in TAILS:
        raise ValueError(f"tail={tail!r} is unknown; choose one of {', '.join(TAILS)}")
    if divergence == "reverse_kl" and tail != "bucket":
        raise ValueError(f"divergence='reverse_kl' is infinite without a rest event; use tail='bucket', not {tail!r}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def clm_nats(z_label: Array, lse: Array, mask: Array) -> Array:
    """Returns the cross-entropy `lse - z_label` [T] in nats: exact zeros where not `mask`, +inf where `lse` is -inf."""
    alive = mask & (lse != -jnp.inf)
    nats = jnp.where(alive, jnp.where(alive, lse, 0.0) - jnp.where(alive, z_label, 0.0), 0.0)
    return jnp.where(mask & ~alive, jnp.inf, nats)


def z_loss(lse: Array, mask: Array) -> Array:
    """Returns `lse^2` [T]: PaLM's auxiliary loss, which keeps a softmax's normaliser near one.

    Args:
      lse: [T] float32, log sum exp of the logits themselves (temperature 1, not relative to anything).
      mask: [T] bool; False gives exact zeros in value and gradient.
    """
    alive = mask & (lse != -jnp.inf)
    return jnp.where(mask & ~alive, jnp.inf, jnp.where(alive, lse, 0.0) ** 2)


def _logsumexp(x: Array) -> Array:
    """Log-sum-exp over the last axis that takes empty and all -inf rows, with finite gradients."""
    top = lax.stop_gradient(x.max(axis=-1, initial=-jnp.inf))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    total = jnp.exp(x - top[..., None]).sum(axis=-1)
    return jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + top, -jnp.inf)


@jax.custom_vjp
def _segment_logsumexp(z: Array, event: Array, slots: Array) -> Array:
    return _segment_forward(z, event, slots)[0]


def _segment_forward(z: Array, event: Array, slots: Array) -> tuple[Array, tuple]:
    member = event[:, None, :] == slots[:, None]
    top = jnp.where(member, z[:, None, :], -jnp.inf).max(axis=-1, initial=-jnp.inf)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    # One exponential per id, not one per id and event.
    above = jnp.take_along_axis(top, jnp.maximum(event, 0), axis=-1, mode="clip")
    total = jnp.where(member, jnp.exp(z - above)[:, None, :], 0.0).sum(axis=-1)
    out = jnp.log(total) + top
    return out, (z, event, out)


def _segment_backward(saved: tuple, cotangent: Array) -> tuple[Array, None, None]:
    z, event, out = saved
    slot = jnp.maximum(event, 0)
    lse = jnp.take_along_axis(out, slot, axis=-1, mode="clip")
    live = (event >= 0) & (lse > -jnp.inf)
    share = jnp.where(live, jnp.exp(z - jnp.where(live, lse, 0.0)), 0.0)
    return jnp.where(live, share * jnp.take_along_axis(cotangent, slot, axis=-1, mode="clip"), 0.0), None, None


_segment_logsumexp.defvjp(_segment_forward, _segment_backward)


def segment_logsumexp(z: Array, event: Array, events: int) -> Array:
    """Returns `log sum exp` [T, E] of `z` [T, G] within each event `event` [T, G] in 0..E-1; -inf if empty."""
    if events == 0:
        return jnp.zeros((z.shape[0], 0), z.dtype)
    return _segment_logsumexp(z, event, jnp.arange(events, dtype=event.dtype))


@jax.custom_jvp
def _log_rest(log_inside: Array) -> Array:
    """Returns `log(1 - exp(log_inside))`, floored at `REST_FLOOR`; `log_inside` may exceed 0 by rounding."""
    return jnp.log(jnp.maximum(-jnp.expm1(log_inside), REST_FLOOR))


@_log_rest.defjvp
def _log_rest_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    (x,), (dx,) = primals, tangents
    slope = jnp.exp(jnp.minimum(x, 0.0)) / jnp.maximum(-jnp.expm1(x), REST_FLOOR)
    return _log_rest(x), -slope * jnp.where(slope > 0, dx, 0.0)


def rest_floored(rest_logprob: Array, mask: Array) -> Array:
    """Returns where a target's rest [T, M] (nats) is below `REST_FLOOR` and `mask` [T, M] is set: what to count."""
    return mask & (jnp.where(mask, rest_logprob, 0.0) < jnp.log(REST_FLOOR))


def _together(event: Array, first: Array, events: int, rounds: int) -> Array:
    """Returns of each event [T, E] the least one that it hangs together with: by a shared id, or by way of others.

    Args:
      event: [T, G] int32, -1 for padding.
      first: [T, G] int32 in 0..G-1, the first position of each id.
      events: E.
      rounds: how often ways are doubled; 0: only events that share an id directly with the least one.
    """
    slots = jnp.arange(events, dtype=event.dtype)
    owner = jnp.take_along_axis(event, first, axis=-1)
    if rounds == 0:
        of_event = event[:, None, :] == slots[:, None]
        return jnp.minimum(jnp.where(of_event, owner[:, None, :], events).min(axis=-1), slots)
    # An edge from each event of an id to the first: [T, E, E], while pairs of ids would be [T, G, G].
    rows, nowhere = jnp.arange(len(event))[:, None], jnp.where(event >= 0, event, events)
    edges = jnp.zeros((len(event), events, events)).at[rows, nowhere, owner].set(1.0, mode="drop")
    way = edges + edges.swapaxes(1, 2) + jnp.eye(events)
    for _ in range(rounds):
        way = (way > 0).astype(jnp.float32)
        way = jnp.einsum("tef,tfg->teg", way, way)
    return jnp.where(way > 0, slots, events).min(axis=-1).astype(event.dtype)


def merge_duplicates(ids: Array, event: Array, logprobs: Array, *, sets: bool = True) -> tuple[Array, Array]:
    """Returns `(event, logprobs)` with repeated ids counted once and events that share an id made one.

    Args:
      ids: [T, G] int32; equal ids mean the same token.
      event: [T, G] int32 in 0..M*K-1, -1 for padding; event e belongs to distribution e // K.
      logprobs: [T, M, K] nats.
      sets: False: no event has more than one id, so that none hangs together with another by way of a third.
    """
    (tokens, mixed, k), g = logprobs.shape, ids.shape[1]
    if g == 0 or mixed * k == 0:
        return event, logprobs
    part = jnp.where(event >= 0, event // k, -1)
    same = (ids[:, :, None] == ids[:, None, :]) & (part[:, :, None] == part[:, None, :]) & (event >= 0)[:, None, :]
    first = jnp.argmax(same, axis=-1)  # of each gathered id, its first occurrence in the same distribution
    slots = jnp.arange(mixed * k)
    alias = _together(event, first, mixed * k, (k - 1).bit_length() if sets else 0)
    flat = logprobs.reshape(tokens, mixed * k)
    merged = _logsumexp(jnp.where(alias[:, None, :] == slots[:, None], flat[:, None, :], -jnp.inf))
    repeated = first != jnp.arange(g)
    event = jnp.where(repeated | (event < 0), -1, jnp.take_along_axis(alias, jnp.maximum(event, 0), axis=-1))
    return event, merged.reshape(logprobs.shape)


def _clean_targets(
    event: Array, logprobs: Array, rest: Array, active: Array, *, tail: str
) -> tuple[Array, Array, Array, Array]:
    """Returns (event, log P [T, M, K], log P_rest [T, M], used [T, M, K]) after the conventions above."""
    (tokens, mixed, k) = logprobs.shape
    logprobs = jnp.where(active[..., None], logprobs, -jnp.inf)
    rest = jnp.where(active, rest, -jnp.inf)
    slots = jnp.arange(mixed * k, dtype=event.dtype)
    filled = (event[:, None, :] == slots[:, None]).any(axis=-1).reshape(logprobs.shape)
    used = filled & (logprobs > -jnp.inf)
    homeless = _logsumexp(jnp.where(filled, -jnp.inf, logprobs))
    rest = jnp.logaddexp(rest, homeless)
    keep = jnp.take_along_axis(used.reshape(tokens, mixed * k), jnp.maximum(event, 0), axis=-1, mode="clip")
    event = jnp.where(keep & (event >= 0), event, -1)
    if tail == "renormalize":
        logprobs = logprobs - jnp.where(used.any(-1), _logsumexp(jnp.where(used, logprobs, -jnp.inf)), 0.0)[..., None]
    return event, jnp.where(used, logprobs, 0.0), rest, used


def _forward_terms(log_p: Array, log_q: Array, divergence: str) -> Array:
    return jnp.exp(log_p) * (-log_q if divergence == "ce" else log_p - log_q)


def _reverse_terms(log_p: Array, log_q: Array) -> Array:
    live = log_q > -jnp.inf
    return jnp.where(live, jnp.exp(log_q) * (jnp.where(live, log_q, 0.0) - log_p), 0.0)


def _half_jsd_terms(log_p: Array, log_q: Array) -> Array:
    middle = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    return 0.5 * (jnp.exp(log_p) * (log_p - middle) + _reverse_terms(middle, log_q))


def divergence_sum(
    log_p: Array, rest: Array, log_q: Array, log_q_rest: Array, used: Array, *, divergence: str, tail: str
) -> Array:
    """Returns the divergence [...] in nats of events whose two log-probabilities are known.

    Args:
      log_p, log_q: [..., K] nats, target and model; finite where not `used` [..., K].
      rest, log_q_rest: [...] nats of what is outside the events; -inf in `rest`: nothing.
      divergence, tail: as in `event_divergence`.
    """
    bucket = tail == "bucket"
    has_rest = rest > -jnp.inf
    log_p_rest = jnp.where(has_rest, rest, 0.0)
    if divergence in ("kl", "ce"):
        total = jnp.where(used, _forward_terms(log_p, log_q, divergence), 0.0).sum(axis=-1)
        tail_term = jnp.where(has_rest, _forward_terms(log_p_rest, log_q_rest, divergence), 0.0)
        return total + tail_term if bucket else total
    if divergence == "reverse_kl":
        floored = jnp.maximum(rest, jnp.log(REST_FLOOR))
        return jnp.where(used, _reverse_terms(log_p, log_q), 0.0).sum(axis=-1) + _reverse_terms(floored, log_q_rest)
    total = jnp.where(used, _half_jsd_terms(log_p, log_q), 0.0).sum(axis=-1)
    alone = 0.5 * jnp.log(2.0) * jnp.exp(log_q_rest)  # P_rest = 0
    return total + (jnp.where(has_rest, _half_jsd_terms(log_p_rest, log_q_rest), alone) if bucket else alone)


def event_divergence(
    z: Array,
    lse: Array,
    event: Array,
    logprobs: Array,
    rest_logprob: Array,
    mask: Array,
    *,
    divergence: str = "kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
) -> Array:
    """Returns the divergence [T, M] in nats of the model from M sparse targets per position, unreduced.

    Args:
      z: [T, G] float32 logits at the gathered ids, as `lse_gather` returns them.
      lse: [T] float32, log sum exp(logits / temperature).
      event: [T, G] int32 in 0..M*K-1: event e is entry e % K of distribution e // K; -1: no event. Ids of
        one distribution must be distinct; see `merge_duplicates`.
      logprobs: [T, M, K] nats, taken as they are (they are not tempered again); -inf: unused entry.
      rest_logprob: [T, M] nats, log of the probability outside the K events.
      mask: [T, M] bool; False gives exact zeros in value and gradient.
      divergence: "kl" (P to Q), "ce" (-sum P log Q), "reverse_kl" (Q to P), "jsd" (half and half).
      tail: "bucket", "renormalize" or "zero", as the module says; "reverse_kl" needs "bucket".
      temperature: divides the model's logits; positive.
      scale_by_temperature_squared: multiplies the loss, and so its gradient, by temperature ** 2.

    Raises:
      ValueError: unknown or impossible options.
    """
    check_options(divergence=divergence, tail=tail, temperature=temperature)
    tokens, mixed, k = logprobs.shape
    if mixed == 0:
        return jnp.zeros((tokens, 0), jnp.float32)
    logprobs, rest = lax.stop_gradient((logprobs.astype(jnp.float32), rest_logprob.astype(jnp.float32)))
    empty = (lse == -jnp.inf)[:, None] & mask
    mask &= ~empty
    alive = mask.any(axis=-1)
    z, lse = jnp.where(alive[:, None], z, 0.0) / temperature, jnp.where(alive, lse, 0.0)
    event, log_p, rest, used = _clean_targets(event, logprobs, rest, mask, tail=tail)
    log_q = segment_logsumexp(z, event, mixed * k).reshape(tokens, mixed, k) - lse[:, None, None]
    log_q_rest = _log_rest(_logsumexp(jnp.where(used, log_q, -jnp.inf)))
    total = divergence_sum(log_p, rest, jnp.where(used, log_q, 0.0), log_q_rest, used, divergence=divergence, tail=tail)
    scale = temperature**2 if scale_by_temperature_squared else 1.0
    return jnp.where(empty, jnp.inf, scale * jnp.where(mask, total, 0.0))
