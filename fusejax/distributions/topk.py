"""Logits to sparse distributions and back.

Logprobs are stored, never logits, and the residual is stored, never recomputed from them: it is one log-sum-exp here
and worth far more than its two bytes later (the tail as one more event).
"""

import jax
import jax.numpy as jnp

from fusejax.errors import InputError
from fusejax.types import TopK

__all__ = ["empty_topk", "from_dense", "normalize", "to_dense", "topk_from_logits", "total_logprob"]

Array = jax.Array


def _logsumexp(x: Array) -> Array:
    top = x.max(axis=-1, initial=-jnp.inf)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    return jnp.log(jnp.exp(x - top[..., None]).sum(axis=-1)) + top


def topk_from_logits(logits: Array, k: int, *, temperature: float = 1.0, valid_vocab: int | None = None) -> TopK:
    """Returns the `k` most likely tokens of `softmax(logits / temperature)`, most likely first.

    Args:
      logits: [..., V]; k: 1..valid_vocab.
      temperature: positive.
      valid_vocab: columns from here on are padding and get no probability.

    Returns:
      `TopK(ids [..., k] int32, logprobs [..., k] float32 nats, residual_logprob [...] float32 nats)`; the residual
      is summed over the other tokens, not `1 - sum`, so a small one is exact.

    Raises:
      InputError: k or temperature out of range.
    """
    vocab = logits.shape[-1] if valid_vocab is None else min(valid_vocab, logits.shape[-1])
    if not 1 <= k <= vocab:
        raise InputError(f"k={k} most likely tokens of a vocabulary of {vocab} do not exist; use 1 <= k <= {vocab}")
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}")
    z = logits[..., :vocab].astype(jnp.float32) / temperature
    z = z - z.max(axis=-1, keepdims=True)
    # Without the barrier XLA merges the slices below into the selection, and on CPU falls back to a whole sort (60x).
    # One barrier each: a barrier around both makes XLA abort on a mesh (TopkDecomposer, jaxlib 0.10).
    values, ids = (jax.lax.optimization_barrier(x) for x in jax.lax.top_k(z, k))
    last, at = values[..., -1:], ids[..., -1:]
    columns = jnp.arange(vocab)
    outside = (z < last) | ((z == last) & (columns > at))  # top_k breaks ties by the lower id
    lse = jnp.log(jnp.exp(z).sum(axis=-1))
    residual = _logsumexp(jnp.where(outside, z, -jnp.inf)) - lse
    return TopK(ids.astype(jnp.int32), values - lse[..., None], residual)


def total_logprob(dist: TopK) -> Array:
    """Returns the log [...] of all probability, entries and residual; 0 for a proper distribution."""
    return _logsumexp(jnp.concatenate([dist.logprobs, dist.residual_logprob[..., None]], axis=-1))


def normalize(dist: TopK) -> TopK:
    """Returns the distribution scaled to sum to 1; one without any mass stays as it is."""
    total = total_logprob(dist)
    total = jnp.where(total > -jnp.inf, total, 0.0)
    return dist._replace(logprobs=dist.logprobs - total[..., None], residual_logprob=dist.residual_logprob - total)


def empty_topk(shape: tuple[int, ...], k: int) -> TopK:
    """Returns distributions [*shape, k] without entries and without mass."""
    none = jnp.full((*shape, k), -jnp.inf, jnp.float32)
    return TopK(jnp.full((*shape, k), -1, jnp.int32), none, jnp.full(shape, -jnp.inf, jnp.float32))


def to_dense(dist: TopK, vocab: int) -> Array:
    """Returns the entries' probabilities [..., vocab], repeated ids added up; the residual is not spread."""
    chosen = dist.ids[..., None] == jnp.arange(vocab)
    return jnp.where(chosen, jnp.exp(dist.logprobs)[..., None], 0.0).sum(axis=-2)


def from_dense(probabilities: Array, k: int) -> TopK:
    """Returns the `k` largest of `probabilities` [..., V], and the log of all the others' sum as the residual."""
    values, ids = jax.lax.top_k(probabilities, k)
    at = (ids[..., :, None] == jnp.arange(probabilities.shape[-1])).any(axis=-2)
    rest = jnp.where(at, 0.0, probabilities).sum(axis=-1)
    return TopK(ids.astype(jnp.int32), jnp.log(values), jnp.log(rest))
