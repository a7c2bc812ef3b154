"""The losses of others for distillation across tokenizers, from their papers: to compare with, at small scale.

ULD (Boizard et al., 2402.12030, equations 4 and 5): both distributions of a position sorted, and the L1 distance of
what remains, whatever the tokens are. It is the Wasserstein distance where every transport costs the same. Positions
are paired by their number; the shorter vocabulary is padded with zeros.

ALM (Minixhofer et al., 2503.20083): text is cut in the smallest chunks at whose ends both tokenizers have a boundary;
of a chunk only the two models' likelihoods are compared, tempered as p^(1 / tau), as events of a coin: f(p || q)
summed over "this chunk" and "any other".

Deliberately not here: ALM's debiasing of chunks by the probability of what may follow them, its loss of hidden
states, and its weights by gradient; ULD's teacher beyond the stored entries (see `uld_distance`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from fusejax.types import TopK
from pallas_kernels.fused_softmax_kl import divergence_sum

__all__ = ["Chunks", "alm_divergence", "chunk_logprobs", "uld_distance"]

Array = jax.Array
_LEAST = 1e-30  # of the probability of "any other chunk", so that its logarithm exists


class Chunks(NamedTuple):
    """The model's chunks of a batch, each told at the position that predicts its last token; leaves [B, T]."""

    logprob: Array  # float32 nats, of the whole chunk; 0 where no chunk ends
    ends: Array  # bool, where a chunk ends that is whole and trained
    covered: Array  # bool, positions that belong to such a chunk


def uld_distance(logits: Array, source: TopK, mask: Array, *, tail: str = "bucket", temperature: float = 1.0) -> Array:
    """Returns the L1 distance [n] of two sorted distributions, in 0..2, unreduced.

    Of the source only K probabilities are known. Tails: "bucket" compares the sums of what is outside the K likeliest
    on both sides, the least that the true distance can be; "zero" takes the source to have nothing there;
    "renormalize" scales its K to sum to 1. With all entries stored they are the same, and the paper's.

    Args:
      logits: [n, V], of the model.
      source: ids [n, K] of any vocabulary, only -1 (unused) means something; logprobs [n, K], most likely first;
        residual_logprob [n].
      mask: [n] bool; False gives exact zeros in value and gradient.
      tail: see above.
      temperature: divides the model's logits.

    Raises:
      ValueError: another tail.
    """
    if tail not in ("bucket", "zero", "renormalize"):
        raise ValueError(f"tail={tail!r} is unknown; choose one of bucket, zero, renormalize")
    vocab, k = logits.shape[-1], source.ids.shape[-1]
    q = jax.nn.softmax(jnp.where(mask[:, None], logits.astype(jnp.float32), 0.0) / temperature)
    live = mask[:, None] & (source.ids >= 0)
    p = jax.lax.stop_gradient(jnp.where(live, jnp.exp(source.logprobs.astype(jnp.float32)), 0.0))
    rest = jax.lax.stop_gradient(jnp.where(mask, jnp.exp(source.residual_logprob.astype(jnp.float32)), 0.0))
    if tail != "bucket":
        rest = jnp.zeros_like(rest)
    if tail == "renormalize":
        p = p / jnp.maximum(p.sum(axis=-1, keepdims=True), _LEAST)
    likeliest = jnp.sort(q, axis=-1, descending=True)
    first = jnp.pad(likeliest[:, :k], [(0, 0), (0, max(k - vocab, 0))])
    total = jnp.abs(first - p).sum(axis=-1) + jnp.abs(likeliest[:, k:].sum(axis=-1) - rest)
    return jnp.where(mask, total, 0.0)


def chunk_logprobs(label_logprobs: Array, lengths: Array, positions: Array, mask: Array) -> Chunks:
    """Returns the model's log-probabilities of chunks of its own labels.

    A chunk is left out where one of its labels is not trained, where its beginning is not in the row (a document cut
    by packing), or where it reaches back over the end of another chunk (two sources with different chunks meet).

    Args:
      label_logprobs: [B, T] nats.
      lengths: [B, T] int32, at the position that predicts a chunk's last token: how many tokens it has; else 0.
      positions: [B, T] int32, position within the document, so that no chunk crosses documents.
      mask: [B, T] bool, trained labels.
    """
    rows, width = lengths.shape
    at = jnp.arange(width, dtype=jnp.int32)
    said = (lengths > 0) & (lengths <= positions + 1)
    # The next end at or after every position, and how long its chunk is.
    end = jax.lax.cummin(jnp.where(said, at, width), axis=1, reverse=True)
    inside = (end < width) & (at > end - jnp.take_along_axis(lengths, jnp.minimum(end, width - 1), axis=1))
    slot = jnp.where(inside, end, width) + (width + 1) * jnp.arange(rows, dtype=jnp.int32)[:, None]

    def summed(values: Array) -> Array:
        found = jax.ops.segment_sum(values.reshape(-1), slot.reshape(-1), rows * (width + 1))
        return found.reshape(rows, width + 1)[:, :width]

    counted = summed((inside & mask).astype(jnp.int32))
    ends = said & (counted == lengths)
    covered = inside & jnp.take_along_axis(ends, jnp.minimum(end, width - 1), axis=1)
    logprob = summed(jnp.where(covered, label_logprobs, 0.0))
    return Chunks(jnp.where(ends, logprob, 0.0), ends, covered)


def _log_other(logprob: Array) -> Array:
    """Returns log(1 - exp(logprob)), floored, for log-probabilities <= 0."""
    return jnp.log(jnp.maximum(-jnp.expm1(logprob), _LEAST))


def alm_divergence(
    source_logprob: Array, model_logprob: Array, mask: Array, *, temperature: float = 1.0, divergence: str = "kl"
) -> Array:
    """Returns f(p || q) + f(1 - p || 1 - q) in nats, with p and q the likelihoods of a chunk to the power of 1 / tau.

    Args:
      source_logprob, model_logprob: [...] nats, of the same chunk.
      mask: [...] bool; False gives exact zeros in value and gradient.
      temperature: tau.
      divergence: f, "kl" (the paper's default), "reverse_kl", "jsd" or "ce".
    """
    p = jax.lax.stop_gradient(jnp.where(mask, source_logprob, -1.0)) / temperature
    q = jnp.minimum(jnp.where(mask, model_logprob, -1.0), 0.0) / temperature
    rest = jnp.where(p < 0, _log_other(p), -jnp.inf)
    used = jnp.ones((*p.shape, 1), bool)
    found = divergence_sum(p[..., None], rest, q[..., None], _log_other(q), used, divergence=divergence, tail="bucket")
    return jnp.where(mask, found, 0.0)
