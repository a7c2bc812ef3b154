"""One distribution from several sources: FuseLLM (2401.10491) section 3.3, MinCE and AvgCE.

The score of a source is its loss on the text, lower is better: bits per byte by default, since a mean per token
compares tokenizers and not models; the papers' per-token cross-entropy in parity mode. It is given, not computed here.

A source without mass at a position takes no part there. Distributions over *different partitions* must not be
averaged; mix their divergences in the loss (the M axis of `FusionBatch`).
"""

import jax
import jax.numpy as jnp

from fusejax.distributions.topk import from_dense
from fusejax.errors import InputError
from fusejax.types import TopK

__all__ = ["avg_ce", "min_ce", "source_weights"]

Array = jax.Array


def _checked(targets: TopK, scores: Array) -> Array:
    """Returns scores [S, ...] with +inf where a source has no mass."""
    lead = targets.residual_logprob.shape
    if targets.ids.ndim < 2 or scores.ndim > len(lead) or lead[: scores.ndim] != scores.shape:
        raise InputError(
            f"scores must have a leading part of the axes [S, ...] of the targets, got {scores.shape} for {lead}"
        )
    scores = jnp.broadcast_to(scores.reshape(scores.shape + (1,) * (len(lead) - scores.ndim)), lead)
    has_mass = (targets.logprobs > -jnp.inf).any(axis=-1)
    return jnp.where(has_mass & ~jnp.isnan(scores), scores, jnp.inf)


def min_ce(targets: TopK, scores: Array) -> tuple[TopK, Array]:
    """Takes, at each position, the distribution of the source with the lowest score.

    Args:
      targets: ids [S, ..., K], one row per source.
      scores: [S, ...] (or a leading part of it, e.g. [S]), lower is better; ties go to the first source.

    Returns:
      (TopK [..., K], chosen source [...] int32; -1, and no mass, where no source has any).
    """
    ranked = _checked(targets, scores)
    choice = jnp.argmin(ranked, axis=0)

    def take(x: Array) -> Array:
        index = choice.reshape(1, *choice.shape, *(1,) * (x.ndim - ranked.ndim))
        return jnp.take_along_axis(x, index, axis=0)[0]

    found = jnp.isfinite(ranked).any(axis=0)
    best = TopK(*(take(jnp.asarray(x)) for x in targets))
    blank = TopK(
        jnp.where(found[..., None], best.ids, -1),
        jnp.where(found[..., None], best.logprobs, -jnp.inf),
        jnp.where(found, best.residual_logprob, -jnp.inf),
    )
    return blank, jnp.where(found, choice, -1).astype(jnp.int32)


def source_weights(targets: TopK, scores: Array, *, temperature: float = 1.0) -> Array:
    """Returns `softmax(-scores / temperature)` [S, ...] over the sources that have mass; 0 where none has."""
    if not temperature > 0:
        raise InputError(f"temperature must be positive, got {temperature}")
    ranked = _checked(targets, scores)
    best = ranked.min(axis=0)
    best = jnp.where(jnp.isfinite(best), best, 0.0)
    raw = jnp.exp(-(ranked - best) / temperature)
    return raw / jnp.maximum(raw.sum(axis=0), jnp.finfo(raw.dtype).tiny)


def avg_ce(targets: TopK, scores: Array, *, temperature: float = 1.0, k: int | None = None) -> tuple[TopK, Array]:
    """Averages the sources' distributions over one common partition, weighted by their scores.

    Args:
      targets: ids [S, ..., K], all in the same vocabulary.
      scores: [S, ...] (or a leading part of it), lower is better.
      temperature: of the softmax over sources.
      k: entries to keep; None: all S * K, so that nothing is lost. What is cut joins the residual.

    Returns:
      (TopK [..., k] with repeated ids added up, most likely first, unused entries -1; weights [S, ...]).
    """
    weights = source_weights(targets, scores, temperature=temperature)
    log_w = jnp.log(weights)
    shape = (*targets.residual_logprob.shape[1:], -1)
    ids = jnp.moveaxis(targets.ids, 0, -2).reshape(shape)
    parts = jnp.moveaxis(targets.logprobs + log_w[..., None], 0, -2).reshape(shape)
    probabilities = jnp.where(ids >= 0, jnp.exp(parts), 0.0)
    residual = jnp.exp(targets.residual_logprob + log_w).sum(axis=0)
    same = ids[..., :, None] == ids[..., None, :]
    first = jnp.argmax(same, axis=-1) == jnp.arange(ids.shape[-1])
    merged = jnp.where(first, (same * probabilities[..., None, :]).sum(axis=-1), 0.0)
    kept = from_dense(merged, ids.shape[-1] if k is None else min(k, ids.shape[-1]))
    names = jnp.take_along_axis(ids, kept.ids, axis=-1)
    residual = residual + jnp.exp(kept.residual_logprob)
    return TopK(jnp.where(kept.logprobs > -jnp.inf, names, -1), kept.logprobs, jnp.log(residual)), weights
