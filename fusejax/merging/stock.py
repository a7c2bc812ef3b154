"""Model Stock: how far to go from the base to the targets' mean, from the angle between the targets."""

import jax.numpy as jnp

from fusejax.merging.average import sum_targets
from fusejax.merging.gram import gram, root
from fusejax.types import Array

__all__ = ["model_stock", "stock_ratio"]

_SINGULAR = 1e-6  # exactly opposite targets have no direction to go to; rounding leaves a little of it


def model_stock(base: Array, targets: Array, *, filter_wise: bool = False) -> Array:
    """Interpolates between the base and the mean of the targets (Model Stock, arXiv 2403.19522, equation 4).

    Args:
      base: [...] float32.
      targets: [J, ...] float32, J >= 2.
      filter_wise: one angle per row (vectors along the last axis) instead of one per matrix.

    Returns:
      [...] float32, `t mean(targets) + (1 - t) base` with `t = J cos / (1 + (J - 1) cos)`; the base where that is
      singular. cos is the mean over the pairs of targets; that of a target that did not change is 0.
    """
    differences = targets - base
    ratio = stock_ratio(gram(differences, -1 if filter_wise else None))
    return base + ratio * (sum_targets(differences) / len(targets))


def stock_ratio(products: Array) -> Array:
    """Returns t, [...], for the inner products [J, J, ...] of the task vectors."""
    count = len(products)
    norms = [root(products[i, i]) for i in range(count)]
    cosines = []
    for i in range(count):
        for j in range(i):
            product = norms[i] * norms[j]
            cosines.append(products[i, j] / jnp.where(product == 0, 1, product))
    cosine = sum(cosines[1:], start=cosines[0]) / len(cosines)
    below = 1 + (count - 1) * cosine
    singular = jnp.abs(below) < _SINGULAR
    return jnp.where(singular, 0, count * cosine / jnp.where(singular, 1, below))
