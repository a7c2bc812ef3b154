"""Methods that decide element by element how much of one or several targets enters the base.

`nearswap` takes elements that lie near, `arcee_fusion` those that matter most, and `ram` tells elements that one
target alone changed from those that several did. None of the three has a published derivation of its thresholds;
they follow the programs that introduced them.
"""

import math

import jax
import jax.numpy as jnp

from fusejax.merging.average import sum_targets
from fusejax.merging.selection import kth_largest
from fusejax.types import Array

__all__ = ["RAM_VARIANTS", "arcee_fusion", "nearswap", "ram"]

RAM_VARIANTS = ("ram", "ramplus_tl")
_NEAR = 1e-6  # distances below this count as this, as in the program that introduced nearswap
_SERIES = 0.1  # below it 1 - r - exp(-r) is summed as a series; float32 would cancel


def nearswap(base: Array, targets: Array, *, t: Array) -> Array:
    """Moves every element towards the target by at most `t`: `base + clip(t / |x - base|, 0, 1) (x - base)`.

    Args:
      base: [...] float32.
      targets: [1, ...] float32.
      t: [] float, at least 0.

    Returns:
      [...] float32, the merged matrix: the target's elements where they lie within `t`.
    """
    difference = targets[0] - base
    share = jnp.clip(t / jnp.maximum(jnp.abs(difference), _NEAR), 0, 1)
    return base + share * difference


def arcee_fusion(base: Array, targets: Array) -> Array:
    """Takes the target's elements whose importance is an outlier, and the base's elsewhere.

    Importance is |x - base| times the KL divergence between the softmax of the row (last axis) of x and of base; an
    outlier is at least the median plus 1.5 interquartile ranges, over all elements of the matrix (no sampling).

    Args:
      base: [...] float32.
      targets: [1, ...] float32.

    Returns:
      [...] float32, the merged matrix.
    """
    difference = targets[0] - base
    importance = jnp.abs(difference) * _row_divergence(base, difference)
    lower, median, upper = (_quantile(importance, share) for share in (0.25, 0.5, 0.75))
    return jnp.where(importance >= median + 1.5 * (upper - lower), targets[0], base)


def ram(
    base: Array, targets: Array, *, epsilon: Array, variant: str = "ram", r: Array = 0.1, alpha: Array = 0.2
) -> Array:
    """Adds what one target alone changed, and averages what several did (RAM and RAM+).

    Args:
      base: [...] float32.
      targets: [J, ...] float32.
      epsilon: [] float; a change is a difference larger than this.
      variant: "ram", or "ramplus_tl": what target j alone changed is multiplied by 1 + r clip(s_j / u_j, 0, alpha),
        with u_j the number of elements that it alone changed and s_j of those that it shares.
      r, alpha: [] float, for "ramplus_tl".

    Returns:
      [...] float32, the merged matrix.
    """
    differences = targets - base
    active = jnp.abs(differences) > epsilon
    together = sum_targets(active.astype(base.dtype))
    shared = sum_targets(jnp.where(active, differences, 0)) / jnp.maximum(together, 1)
    alone = active & (together == 1)
    factors = jnp.ones(len(targets), base.dtype)
    if variant == "ramplus_tl":
        axes = tuple(range(1, targets.ndim))
        unique, common = (jnp.sum(mask, axis=axes).astype(base.dtype) for mask in (alone, active & (together > 1)))
        # Nothing of its own: the factor is not used.
        factors = 1 + r * jnp.clip(common / jnp.where(unique == 0, 1, unique), 0, alpha)
    unique_part = sum_targets(jnp.where(alone, factors.reshape((-1,) + (1,) * base.ndim) * differences, 0))
    return base + jnp.where(together == 1, unique_part, jnp.where(together > 1, shared, 0))


def _row_divergence(base: Array, difference: Array) -> Array:
    """KL(softmax(base + difference), softmax(base)) over the last axis, [..., 1], without cancellation."""
    before = jax.nn.softmax(base, axis=-1)
    shift = jnp.log1p(jnp.sum(before * jnp.expm1(difference), axis=-1, keepdims=True))
    ratio = difference - shift  # log p - log q
    # sum p log(p/q) = sum p (r - 1 + exp(-r)), as q sums to 1: every term is positive and of the second order.
    series = jnp.square(ratio) * (1 / 2 - ratio * (1 / 6 - ratio * (1 / 24 - ratio * (1 / 120 - ratio / 720))))
    terms = jnp.where(jnp.abs(ratio) < _SERIES, series, ratio + jnp.expm1(-ratio))
    return jnp.sum(before * jnp.exp(ratio) * terms, axis=-1, keepdims=True)


def _quantile(values: Array, share: float) -> Array:
    """The quantile of non-negative values, linear between two neighbours, without sorting."""
    place = share * (values.size - 1)
    below = math.floor(place)
    low = kth_largest(values, values.size - below)
    high = kth_largest(values, values.size - min(below + 1, values.size - 1))
    return low + (place - below) * (high - low)
