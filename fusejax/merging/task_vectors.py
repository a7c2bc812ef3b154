"""Arithmetic on task vectors, the differences between fine-tuned models and their base.

`task_arithmetic` adds them; `ties` first trims each to its largest elements and lets the targets elect a sign;
`breadcrumbs` drops the very largest elements as well as the smallest ones. TIES trims per matrix, as mergekit does
(the paper trims the whole model at once); its weights also count in the election. Elements of equal size at the
threshold: the lowest flat index is kept (the largest dropped by breadcrumbs are chosen by the same rule).
"""

from collections.abc import Sequence
from fractions import Fraction

import jax.numpy as jnp
from jax import lax

from fusejax.merging.average import sum_targets, weighted_sum
from fusejax.merging.selection import largest_mask
from fusejax.types import Array

__all__ = ["breadcrumb_counts", "breadcrumbs", "breadcrumbs_ties", "consensus", "task_arithmetic", "ties"]


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
    vectors = _trim(targets - base, density, rescale)
    return base + scale * consensus(vectors, jnp.asarray(weights, base.dtype), normalize)


def breadcrumbs(
    base: Array, targets: Array, *, weights: Array, density: Sequence[float], gamma: Sequence[float],
    normalize: bool = False, scale: Array = 1.0,
) -> Array:  # fmt: skip
    """Masks the largest and the smallest elements, then adds (Model Breadcrumbs, arXiv 2312.06795, section 3).

    Args:
      base: [...] float32.
      targets: [J, ...] float32, one matrix of every target.
      weights: [J] float; their sum must not be 0 if `normalize`.
      density: J shares in [0, 1] of a task vector's elements that are kept.
      gamma: J shares in [0, 1] of the elements, the largest, that are dropped; fewer if less than that is left.
      normalize: divide by the sum of the weights.
      scale: [] float, factor of the merged task vector.

    Returns:
      [...] float32, the merged matrix.
    """
    weights = jnp.asarray(weights, base.dtype)
    weights = weights / jnp.sum(weights) if normalize else weights
    return base + scale * weighted_sum(weights, _between(base, targets, density, gamma))


def breadcrumbs_ties(
    base: Array, targets: Array, *, weights: Array, density: Sequence[float], gamma: Sequence[float],
    normalize: bool = False, scale: Array = 1.0,
) -> Array:  # fmt: skip
    """Masks as `breadcrumbs`, then merges the elements that agree with the elected sign, as `ties` does."""
    vectors = _between(base, targets, density, gamma)
    return base + scale * consensus(vectors, jnp.asarray(weights, base.dtype), normalize)


def consensus(vectors: Array, weights: Array, normalize: bool) -> Array:
    """Sums the elements that agree with the sign of the weighted sum, [J, ...] and [J] -> [...].

    A sum of 0 elects plus, zeros never agree; with `normalize` the result is divided by the weights that agree.
    """
    weights = weights.reshape((-1,) + (1,) * (vectors.ndim - 1))
    vectors = vectors * weights
    elected = jnp.where(sum_targets(vectors) >= 0, 1, -1).astype(vectors.dtype)
    kept = jnp.sign(vectors) == elected
    merged = sum_targets(jnp.where(kept, vectors, 0))
    if not normalize:
        return merged
    norm = sum_targets(jnp.where(kept, weights, 0))
    return merged / jnp.where(norm == 0, 1, norm)


def _trim(vectors: Array, density: Sequence[float], rescale: bool) -> Array:
    """Keeps the largest elements of every task vector, at least one."""
    if min(density) >= 1:
        return vectors
    size = vectors[0].size
    trimmed = jnp.where(_largest(vectors, [max(1, _share(share, size)) for share in density]), vectors, 0)
    if not rescale:
        return trimmed
    axes = tuple(range(1, vectors.ndim))
    before, after = (jnp.sum(jnp.abs(x), axis=axes, keepdims=True) for x in (vectors, trimmed))
    return trimmed * jnp.where(after == 0, 1, before / jnp.where(after == 0, 1, after))


def breadcrumb_counts(size: int, density: Sequence[float], gamma: Sequence[float]) -> tuple[list[int], list[int]]:
    """Returns how many of `size` elements are kept of every task vector, and how many larger ones are dropped."""
    kept = [_share(share, size) for share in density]
    return kept, [min(_share(share, size), size - count) for share, count in zip(gamma, kept, strict=True)]


def _between(base: Array, targets: Array, density: Sequence[float], gamma: Sequence[float]) -> Array:
    """Task vectors without their largest and smallest elements."""
    vectors = targets - base
    kept, dropped = breadcrumb_counts(base.size, density, gamma)
    mask = _largest(vectors, [count + more for count, more in zip(kept, dropped, strict=True)])
    if any(dropped):
        mask &= ~_largest(vectors, dropped)
    return jnp.where(mask, vectors, 0)


def _largest(vectors: Array, counts: list[int]) -> Array:
    """Marks the largest elements of every task vector, one after another: the program stays small."""
    return lax.map(lambda row: largest_mask(*row), (lax.stop_gradient(vectors), jnp.array(counts, jnp.int32)))


def _share(fraction: float, size: int) -> int:
    return int(Fraction(fraction).limit_denominator(46340) * size)
