"""Methods that decide element by element how much of one or several targets enters the base.

`nearswap` takes elements that lie near, `arcee_fusion` those that matter most, and `ram` tells elements that one
target alone changed from those that several did. None of the three has a published derivation of its thresholds;
they follow the programs that introduced them.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fusejax.merging.average import sum_targets
from fusejax.merging.selection import kth_largest
from fusejax.types import Array

__all__ = [
    "RAM_VARIANTS",
    "arcee_fusion",
    "importance",
    "nearswap",
    "outlying",
    "quantile_ranks",
    "ram",
    "ram_counts",
    "ram_factors",
]

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
    values = importance(base, targets)
    ranked = [kth_largest(values, rank) for ranks in quantile_ranks(values.size) for rank in ranks[:2]]
    return jnp.where(values >= outlying(ranked, values.size), targets[0], base)


def importance(base: Array, targets: Array) -> Array:
    """Returns what `arcee_fusion` compares, [...] float32, for whole rows of a matrix (arguments as there)."""
    difference = targets[0] - base
    return jnp.abs(difference) * _row_divergence(base, difference)


def quantile_ranks(size: int) -> list[tuple[int, int, float]]:
    """Returns, for the three quartiles of `size` values, two ranks (1 is the largest) and the place between them."""
    found = []
    for share in (0.25, 0.5, 0.75):
        place = share * (size - 1)
        below = math.floor(place)
        found.append((size - below, size - min(below + 1, size - 1), place - below))
    return found


def outlying(ranked: Sequence[Any], size: int) -> Any:
    """Returns the median plus 1.5 interquartile ranges from the values at the `quantile_ranks`, in their order."""
    between = [share for _, _, share in quantile_ranks(size)]
    lower, median, upper = (
        low + share * (high - low) for low, high, share in zip(ranked[::2], ranked[1::2], between, strict=True)
    )
    return median + 1.5 * (upper - lower)


def ram(
    base: Array, targets: Array, *, epsilon: Array, variant: str = "ram", r: Array = 0.1, alpha: Array = 0.2,
    factors: Array | None = None,
) -> Array:  # fmt: skip
    """Adds what one target alone changed, and averages what several did (RAM and RAM+).

    Args:
      base: [...] float32.
      targets: [J, ...] float32.
      epsilon: [] float; a change is a difference larger than this.
      variant: "ram", or "ramplus_tl": what target j alone changed is multiplied by 1 + r clip(s_j / u_j, 0, alpha),
        with u_j the number of elements that it alone changed and s_j of those that it shares.
      r, alpha: [] float, for "ramplus_tl".
      factors: [J] float, of `ram_factors`, where the matrix is a piece of one.

    Returns:
      [...] float32, the merged matrix.
    """
    differences, active, together = _changed(base, targets, epsilon)
    shared = sum_targets(jnp.where(active, differences, 0)) / jnp.maximum(together, 1)
    alone = active & (together == 1)
    if variant == "ram":
        factors = jnp.ones(len(targets), base.dtype)
    elif factors is None:
        factors = ram_factors(*ram_counts(base, targets, epsilon=epsilon), r=r, alpha=alpha)
    factors = jnp.asarray(factors, base.dtype)
    unique_part = sum_targets(jnp.where(alone, factors.reshape((-1,) + (1,) * base.ndim) * differences, 0))
    return base + jnp.where(together == 1, unique_part, jnp.where(together > 1, shared, 0))


def ram_counts(base: Array, targets: Array, *, epsilon: Array) -> tuple[Array, Array]:
    """Returns how many elements each target changed alone, and how many with others, [J] int32 each."""
    _, active, together = _changed(base, targets, epsilon)
    axes = tuple(range(1, targets.ndim))
    alone, shared = (jnp.sum(active & mask, axis=axes, dtype=jnp.int32) for mask in (together == 1, together > 1))
    return alone, shared


def ram_factors(alone: Array, shared: Array, *, r: Array, alpha: Array) -> Array:
    """Returns the factor of what each target changed alone, [J], for "ramplus_tl"."""
    # Nothing of its own: the factor is not used.
    return 1 + r * jnp.clip(shared / jnp.where(alone == 0, 1, alone), 0, alpha)


def _changed(base: Array, targets: Array, epsilon: Array) -> tuple[Array, Array, Array]:
    differences = targets - base
    active = jnp.abs(differences) > epsilon
    return differences, active, sum_targets(active.astype(base.dtype))


def _row_divergence(base: Array, difference: Array) -> Array:
    """KL(softmax(base + difference), softmax(base)) over the last axis, [..., 1], without cancellation."""
    before = jax.nn.softmax(base, axis=-1)
    shift = jnp.log1p(jnp.sum(before * jnp.expm1(difference), axis=-1, keepdims=True))
    ratio = difference - shift  # log p - log q
    # sum p log(p/q) = sum p (r - 1 + exp(-r)), as q sums to 1: every term is positive and of the second order.
    series = jnp.square(ratio) * (1 / 2 - ratio * (1 / 6 - ratio * (1 / 24 - ratio * (1 / 120 - ratio / 720))))
    terms = jnp.where(jnp.abs(ratio) < _SERIES, series, ratio + jnp.expm1(-ratio))
    return jnp.sum(before * jnp.exp(ratio) * terms, axis=-1, keepdims=True)
