"""Arithmetic on task vectors, the differences between fine-tuned models and their base.

`task_arithmetic` adds them; `ties` first trims each to its largest elements and lets the targets elect a sign.
TIES trims per matrix, as mergekit does (the paper trims the whole model at once); its weights also count in the
election. Elements of equal size at the threshold: the lowest flat index is kept.
"""

from collections.abc import Sequence
from fractions import Fraction

import jax.numpy as jnp

from fusejax.merging.average import sum_targets, weighted_sum
from fusejax.merging.selection import largest_mask
from fusejax.types import Array

__all__ = ["task_arithmetic", "ties"]


def task_arithmetic(
    base: Array, targets: Array, *, weights: Array, normalize: bool = False, scale: Array = 1.0
) -> Array:
    """Adds weighted task vectors to the base (arXiv 2212.04089, section 2).

    Args:
      base: [...] float32.
      targets: [J, ...] float32, one matrix of every target.
      weights: [J] float, any sign; their sum must not be 0 if `normalize`.
      normalize: divide by the sum of the weights.
      scale: [] float, the paper's lambda.

    Returns:
      [...] float32, the merged matrix.
    """
    weights = jnp.asarray(weights, base.dtype)
    weights = weights / jnp.sum(weights) if normalize else weights
    return base + scale * weighted_sum(weights, targets - base)


def ties(
    base: Array, targets: Array, *, weights: Array, density: Sequence[float], normalize: bool = True,
    rescale: bool = False, scale: Array = 1.0,
) -> Array:  # fmt: skip
    """Trims, elects signs and merges (TIES, arXiv 2306.01708, section 4).

    Args:
      base: [...] float32.
      targets: [J, ...] float32, one matrix of every target.
      weights: [J] float.
      density: J shares in [0, 1] of a task vector's elements that are kept, at least one element.
      normalize: divide by the weights of the elements that were kept.
      rescale: multiply a trimmed task vector so that its L1 norm stays.
      scale: [] float, the paper's lambda.

    Returns:
      [...] float32, the merged matrix.
    """
    vectors = jnp.stack([_trim(target - base, share, rescale) for target, share in zip(targets, density, strict=True)])
    weights = jnp.asarray(weights, base.dtype).reshape((-1,) + (1,) * base.ndim)
    vectors = vectors * weights
    elected = jnp.where(sum_targets(vectors) >= 0, 1, -1).astype(base.dtype)
    kept = jnp.sign(vectors) == elected  # zeros never agree
    merged = sum_targets(jnp.where(kept, vectors, 0))
    if normalize:
        norm = sum_targets(jnp.where(kept, weights, 0))
        merged = merged / jnp.where(norm == 0, 1, norm)
    return base + scale * merged


def _trim(vector: Array, density: float, rescale: bool) -> Array:
    """Keeps the largest elements of one task vector."""
    if density >= 1:
        return vector
    count = max(1, int(Fraction(density).limit_denominator(46340) * vector.size))
    trimmed = jnp.where(largest_mask(vector, count), vector, 0)
    if not rescale:
        return trimmed
    before, after = jnp.sum(jnp.abs(vector)), jnp.sum(jnp.abs(trimmed))
    return trimmed * jnp.where(after == 0, 1, before / jnp.where(after == 0, 1, after))
