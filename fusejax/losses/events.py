"""From symbols of a partition to the token ids that the kernel gathers.

A target over a partition names each event by one token id (its symbol); `EventGroups` says which tokens belong
to it. The layout is static: `max_members` slots per distribution, filled event after event. An event that finds
no room is not cut short (half an event is another event): its probability joins the rest, and it is counted.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fusejax.types import EventGroups

__all__ = ["count_folded", "expand_events", "fold_events"]

Array = jax.Array


class _Layout(NamedTuple):
    first: Array  # [..., K] where the symbol's members start in the flattened table
    begin: Array  # [..., K] its first slot
    end: Array  # [..., K] one past its last slot; equal to `begin` if it has none
    folded: Array  # [...] events with members but without room


def _layout(ids: Array, groups: EventGroups, max_members: int, row: Array) -> _Layout:
    width = groups.offsets.shape[-1]
    known = (ids >= 0) & (ids < width - 1) & (row >= 0)[..., None]
    row = jnp.maximum(row, 0)[..., None]
    at = jnp.where(known, ids, 0) + row * width
    flat = groups.offsets.reshape(-1)
    start = jnp.take(flat, at, mode="clip")
    length = jnp.where(known, jnp.take(flat, at + 1, mode="clip") - start, 0)
    used = jnp.zeros_like(ids, shape=ids.shape[:-1])
    begin, end = [], []
    for k in range(ids.shape[-1]):  # greedy: an event that does not fit leaves its room to the next
        begin.append(used)
        used = jnp.where(used + length[..., k] <= max_members, used + length[..., k], used)
        end.append(used)
    begins, ends = jnp.stack(begin, axis=-1), jnp.stack(end, axis=-1)
    folded = ((length > 0) & (ends == begins)).sum(axis=-1, dtype=jnp.int32)
    return _Layout(start + row * groups.members.shape[-1], begins, ends, folded)


def count_folded(ids: Array, groups: EventGroups, *, max_members: int, partition: Array) -> Array:
    """Returns how many events [...] of each position `expand_events` would find no room for."""
    return _layout(ids, groups, max_members, partition).folded


def expand_events(
    ids: Array, groups: EventGroups, *, max_members: int, partition: Array | None = None
) -> tuple[Array, Array, Array]:
    """Returns the members of each symbol, laid out one after another in a static number of slots.

    Args:
      ids: [..., K] int32 symbols, most probable first, K >= 1; -1: unused.
      groups: one partition (offsets [V + 1], members [V]), or one per source (leading axis S).
      max_members: G, the slots per position.
      partition: [...] int32, the row of stacked groups to read, -1: none; not given: one partition.

    Returns:
      (member ids [..., G] int32, -1: empty slot; event [..., G] int32 in 0..K-1, -1: empty slot;
      count [...] int32 of events that did not fit and have no member here).
    """
    partition = jnp.zeros(ids.shape[:-1], jnp.int32) if partition is None else partition
    layout = _layout(ids, groups, max_members, partition)
    slots = jnp.arange(max_members, dtype=jnp.int32)
    event = (slots[:, None] >= layout.end[..., None, :]).sum(axis=-1, dtype=jnp.int32)
    inside = event < ids.shape[-1]
    at = jnp.take_along_axis(layout.first - layout.begin, event, axis=-1, mode="clip") + slots
    members = jnp.take(groups.members.reshape(-1), jnp.where(inside, at, 0), mode="clip")
    return jnp.where(inside, members, -1), jnp.where(inside, event, -1), layout.folded


def fold_events(logprobs: Array, residual_logprob: Array, event: Array) -> tuple[Array, Array]:
    """Moves the probability of events that have no slot in `event` [..., G] into the rest.

    Args:
      logprobs: [..., K] nats; residual_logprob: [...] nats.
      event: [..., G] int32 in 0..K-1, -1: empty, as `expand_events` returns it.

    Returns:
      (logprobs [..., K], -inf where the event has no member; residual_logprob [...]).
    """
    present = (event[..., None, :] == jnp.arange(logprobs.shape[-1])[:, None]).any(axis=-1)
    homeless = jnp.where(present, -jnp.inf, logprobs)
    both = jnp.concatenate([residual_logprob[..., None], homeless], axis=-1)
    return jnp.where(present, logprobs, -jnp.inf), jax.nn.logsumexp(both, axis=-1)
