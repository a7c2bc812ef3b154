"""Weighted averages of the targets: `linear`, the baseline of every merging paper, and `passthrough`, a copy.

A normalised average is written as `x_0 + sum_j c_j (x_j - x_0)`: the differences of fine-tuned models are
small, so this loses less than summing the weights themselves, and equal models merge to themselves bit by bit.
"""

import jax.numpy as jnp

from fusejax.types import Array

__all__ = ["linear", "linear_coefficients", "passthrough", "sum_targets", "weighted_sum"]


def sum_targets(values: Array) -> Array:
    """Returns the sum of [J, ...] over the targets."""
    # Term by term: XLA's CPU code for a reduction over a stacked leading axis can be a hundred times slower.
    return sum((values[j] for j in range(1, len(values))), start=values[0])


def weighted_sum(coefficients: Array, targets: Array) -> Array:
    """Returns sum_j c_j x_j for coefficients [J] (or [J, ...], per element) and targets [J, ...]."""
    # Not a dot product either: accelerators would multiply in a narrower type.
    return sum((coefficients[j] * targets[j] for j in range(1, len(targets))), start=coefficients[0] * targets[0])


def linear_coefficients(base: Array | None, targets: Array, *, weights: Array, normalize: bool = True) -> Array:
    """Returns the factor of every target, [J]: the weights, divided by their sum if `normalize`."""
    del base
    weights = jnp.asarray(weights, targets.dtype)
    return weights / jnp.sum(weights) if normalize else weights


def linear(base: Array | None, targets: Array, *, weights: Array, normalize: bool = True) -> Array:
    """Averages the targets with given weights (model soups, arXiv 2203.05482).

    Args:
      base: not used; may be None.
      targets: [J, ...] float32, one matrix of every target.
      weights: [J] float, any sign; their sum must not be 0 if `normalize`.
      normalize: divide by the sum of the weights.

    Returns:
      [...] float32, the merged matrix.
    """
    coefficients = linear_coefficients(base, targets, weights=weights, normalize=normalize)
    if not normalize:
        return weighted_sum(coefficients, targets)
    if targets.shape[0] == 1:
        return targets[0]  # also keeps the sign of zeros
    return targets[0] + weighted_sum(coefficients, targets - targets[0])


def passthrough(base: Array | None, targets: Array, *, scale: Array = 1.0) -> Array:
    """Copies the one target, multiplied by `scale`: the pieces of which stacked models are built.

    Args:
      base: not used; may be None.
      targets: [1, ...] float32.
      scale: [] float.

    Returns:
      [...] float32.
    """
    del base
    return scale * targets[0]
