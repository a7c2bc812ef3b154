"""Exact selection of the k largest elements of an array, without sorting it.

The k-th largest value is found bit by bit: non-negative IEEE floats are ordered as their bit patterns, so
each bit of the threshold is settled by counting the elements above a candidate. That is 31 reductions (63
for float64) with no temporary array, against a sort or `top_k` with k in the millions; reductions also stay
correct on any sharding. Among elements equal to the threshold the lowest flat (row-major) indices win, so
that a result does not depend on a sort's order, a device or a mesh.

Not done: approximate selection by sampling; matrices of 2**31 elements or more (refused).
"""

import math
from fractions import Fraction

import jax.numpy as jnp
from jax import lax

from fusejax.errors import InputError
from fusejax.types import Array

__all__ = ["count_of_fraction", "kth_largest", "largest_mask"]

_MAX_DENOMINATOR = 46340  # the square stays below 2**31


def count_of_fraction(fraction: float, total: Array) -> Array:
    """Returns floor(fraction * total) exactly, in integers.

    A float product would round: 0.1 is read as 1/10 (the nearest fraction with a denominator of at most
    46340), so that a tenth of 30 is 3 on every device, also for totals beyond 2**24.

    Args:
      fraction: a Python number in [0, 1].
      total: [] int32, a count.

    Returns:
      [] int32.
    """
    ratio = Fraction(fraction).limit_denominator(_MAX_DENOMINATOR)
    whole, rest = total // ratio.denominator, total % ratio.denominator
    return ratio.numerator * whole + (ratio.numerator * rest) // ratio.denominator


def largest_mask(values: Array, count: Array) -> Array:
    """Marks the `count` largest elements; of equal elements at the threshold the lowest flat index wins.

    Args:
      values: [...] float32 or float64, not negative.
      count: [] int32, how many to mark; 0 marks none.

    Returns:
      [...] bool, with exactly min(count, values.size) elements true.

    Raises:
      InputError: for 2**31 elements or more, which int32 cannot count.
    """
    if values.size > jnp.iinfo(jnp.int32).max:
        raise InputError(f"cannot select among {values.size} elements of one matrix: the limit is 2**31 - 1.")
    values = jnp.abs(lax.stop_gradient(values))  # abs turns -0.0 into +0.0
    width = values.dtype.itemsize * 8
    bits = lax.bitcast_convert_type(values, jnp.uint32 if width == 32 else jnp.uint64)
    count = jnp.minimum(jnp.asarray(count, jnp.int32), values.size)
    threshold = _kth_largest(bits, count, width)
    above, tied = bits > threshold, bits == threshold
    needed = count - _count(above)
    bound = _index_bound(tied, needed)
    return (above | (tied & (_flat_index(values.shape) < bound))) & (count > 0)


def kth_largest(values: Array, count: Array) -> Array:
    """Returns the `count`-th largest element (1 is the largest) of non-negative values, [...] -> []."""
    values = jnp.abs(lax.stop_gradient(values))
    width = values.dtype.itemsize * 8
    bits = lax.bitcast_convert_type(values, jnp.uint32 if width == 32 else jnp.uint64)
    return lax.bitcast_convert_type(_kth_largest(bits, jnp.asarray(count, jnp.int32), width), values.dtype)


def _count(mask: Array) -> Array:
    return jnp.sum(mask, dtype=jnp.int32)


def _kth_largest(bits: Array, count: Array, width: int) -> Array:
    """The largest threshold with at least `count` elements at or above it."""

    def settle(step: Array, threshold: Array) -> Array:
        shift = (width - 2 - step).astype(bits.dtype)  # the sign bit is never set
        candidate = threshold | (jnp.ones((), bits.dtype) << shift)
        return jnp.where(_count(bits >= candidate) >= count, candidate, threshold)

    return lax.fori_loop(0, width - 1, settle, jnp.zeros((), bits.dtype))


def _flat_index(shape: tuple[int, ...]) -> Array:
    # From iotas rather than by a reshape, which would gather a sharded matrix.
    index = jnp.zeros(shape, jnp.int32)
    for axis in range(len(shape)):
        index += lax.broadcasted_iota(jnp.int32, shape, axis) * math.prod(shape[axis + 1 :])
    return index


def _index_bound(tied: Array, needed: Array) -> Array:
    """The smallest m such that `needed` tied elements have a flat index below m."""
    index = _flat_index(tied.shape)

    def halve(bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        enough = _count(tied & (index < middle)) >= needed
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    size = jnp.int32(tied.size)
    low = jnp.where(_count(tied) <= needed, size - 1, 0)  # all ties are kept: nothing to search
    return lax.while_loop(lambda bounds: bounds[1] - bounds[0] > 1, halve, (low, size))[1]
