"""A divergence between the model's softmax and `TopK` targets, from whole logits, unreduced.

This is for evaluation, tests and small models: the training step uses `fusejax.losses.fused`, which never makes
the logits. The mathematics is the same function of `pallas_kernels`.
"""

import jax
import jax.numpy as jnp

from fusejax.losses.events import expand_events
from fusejax.types import EventGroups, TopK
from pallas_kernels.fused_softmax_kl import event_divergence, lse_gather, merge_duplicates

__all__ = ["topk_divergence"]

Array = jax.Array


def topk_divergence(
    logits: Array,
    targets: TopK,
    mask: Array,
    *,
    divergence: str = "kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    groups: EventGroups | None = None,
    max_members: int = 256,
    softcap: float | None = None,
    valid_vocab: int | None = None,
) -> Array:
    """Returns the divergence of every position in nats, unreduced.

    Args:
      logits: [..., V].
      targets: ids [..., K] (tokens, or symbols of `groups`), logprobs [..., K], residual_logprob [...].
      mask: [...]; 0 gives exact zeros in value and gradient.
      divergence, tail, temperature, scale_by_temperature_squared: as in `pallas_kernels` `event_divergence`.
      groups: one partition of the vocabulary; None: every id is a token.
      max_members: slots for the members of a position's events; an event that finds none joins the rest.
      softcap, valid_vocab: as in `pallas_kernels.lse_gather`.

    Returns:
      [...] float32.
    """
    vocab, k, shape = logits.shape[-1], targets.ids.shape[-1], targets.residual_logprob.shape
    ids, logprobs = targets.ids.reshape(-1, k), targets.logprobs.reshape(-1, 1, k).astype(jnp.float32)
    one_each = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), ids.shape)
    event, logprobs = merge_duplicates(ids, one_each, jax.lax.stop_gradient(logprobs), sets=False)
    if groups is not None:
        kept = jnp.where(logprobs[:, 0] > -jnp.inf, ids, -1)
        ids, event, _ = expand_events(kept, groups, max_members=max_members)
    limit = vocab if valid_vocab is None else valid_vocab
    rows = lse_gather(
        logits.reshape(-1, vocab),
        ids,
        temperatures=(temperature,),
        softcap=softcap,
        valid_vocab=valid_vocab,
        relative=True,
    )
    out = event_divergence(
        rows.z,
        rows.lse[:, 0],
        jnp.where((ids >= 0) & (ids < limit), event, -1),
        logprobs,
        targets.residual_logprob.reshape(-1, 1),
        mask.reshape(-1, 1) != 0,
        divergence=divergence,
        tail=tail,
        temperature=temperature,
        scale_by_temperature_squared=scale_by_temperature_squared,
    )
    return out[:, 0].reshape(shape)
