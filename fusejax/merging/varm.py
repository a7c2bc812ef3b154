"""VaRM: weigh every target by how much it changed (FuseChat, arXiv 2402.16107, equations 6 and 7).

Of a unit m of the parameters, `W_j = E_j / sum_i E_i` with E_j the mean square of `target_j - pivot` over the unit,
and the merged unit is `sum_j W_j target_j`. The unit is a matrix in the published results; model, layer and module
(the attention or the feed-forward part of a layer, or one of its norms) are wider, parameter is a single element.
Means of one unit share their divisor, so sums of squares give the same weights: every element counts once.

This is the paper. The released script gives every target the same weights (it reads one analysis for all), weighs
layers by means of tensors, and rounds products in bfloat16; none of that is copied.
"""

import re

import jax.numpy as jnp

from fusejax.merging.average import sum_targets, weighted_sum
from fusejax.types import Array

__all__ = ["GRANULARITIES", "varm", "varm_coefficients", "varm_energy", "varm_shares", "varm_unit"]

GRANULARITIES = ("matrix", "model", "layer", "module", "parameter")


def varm(base: Array, targets: Array, *, granularity: str = "matrix", energy: Array | None = None) -> Array:
    """Merges one matrix by VaRM.

    Args:
      base: [...] float32, the pivot.
      targets: [J, ...] float32, one matrix of every target.
      granularity: "matrix", "parameter", or a wider unit, whose `energy` must be given.
      energy: [J] sum of squared changes over the unit that holds this matrix.

    Returns:
      [...] float32, the merged matrix.
    """
    if targets.shape[0] == 1:
        return targets[0]
    differences = targets - base
    energy = jnp.square(differences) if granularity == "parameter" else _energy(base, targets, energy)
    return base + weighted_sum(varm_shares(energy), differences)


def varm_coefficients(
    base: Array, targets: Array, *, granularity: str = "matrix", energy: Array | None = None
) -> Array:
    """Returns the weight of every target, [J]; for "parameter" its mean over elements (arguments as `varm`)."""
    if granularity == "parameter":
        shares = varm_shares(jnp.square(targets - base))
        return jnp.mean(shares, axis=tuple(range(1, shares.ndim)))
    return varm_shares(_energy(base, targets, energy))


def varm_energy(base: Array, targets: Array, *, granularity: str = "matrix") -> Array:
    """Returns the sum of squared changes of every target in one matrix, [J]."""
    del granularity
    return jnp.sum(jnp.square(targets - base), axis=tuple(range(1, targets.ndim)))


def varm_unit(path: str, *, granularity: str) -> tuple[str, bool] | None:
    """Names the unit that a leaf belongs to.

    Args:
      path: dot-joined; layers are stacked (`layers.attention...`) or numbered (`model.layers.3.mlp...`).
      granularity: the parameter of `varm`.

    Returns:
      The unit's name and whether a stacked leaf has one such unit per layer; None: no unit wider than a matrix.
    """
    if granularity in ("matrix", "parameter"):
        return None
    if granularity == "model":
        return "", False
    parts = r"layers(\.\d+)?" if granularity == "layer" else r"layers(\.\d+)?\.[^.]+"
    found = re.search(rf"^(.*\.)?{parts}(?=\.|$)", path)
    return (found[0] if found else path), True


def _energy(base: Array, targets: Array, energy: Array | None) -> Array:
    return varm_energy(base, targets) if energy is None else energy


def varm_shares(energy: Array) -> Array:
    """Returns energies over their sum along the first axis; equal shares where nothing changed."""
    total = sum_targets(energy)
    return jnp.where(total == 0, 1 / energy.shape[0], energy / jnp.where(total == 0, 1, total))
