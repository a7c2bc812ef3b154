"""Spherical interpolation between two models."""

import jax.numpy as jnp

from fusejax.errors import InputError
from fusejax.types import Array

__all__ = ["slerp"]

_NEARLY_PARALLEL = 0.9995  # mergekit's; above it the sine is too small to divide by


def slerp(base: Array | None, targets: Array, *, t: Array = 0.5) -> Array:
    """Interpolates along the arc between two matrices, flattened (Shoemake 1985), or linearly if nearly parallel.

    Args:
      base: [...] float32; where the arc starts if there is one target, otherwise not used.
      targets: [1, ...] or [2, ...] float32.
      t: [] float in [0, 1]; 0 gives the start, 1 the end.

    Returns:
      [...] float32, the merged matrix.

    Raises:
      InputError: one target and no base.
    """
    start, end = (base, targets[0]) if targets.shape[0] == 1 else (targets[0], targets[1])
    if start is None:
        raise InputError("slerp needs two targets, or one target and base params.")
    norms = jnp.sqrt(jnp.sum(jnp.square(start))) * jnp.sqrt(jnp.sum(jnp.square(end)))
    cosine = jnp.sum(start * end) / jnp.where(norms == 0, 1, norms)
    parallel = jnp.abs(cosine) > _NEARLY_PARALLEL
    angle = jnp.arccos(jnp.where(parallel, 0, cosine))  # no infinite gradient in the branch that is not taken
    from_start, from_end = jnp.sin((1 - t) * angle) / jnp.sin(angle), jnp.sin(t * angle) / jnp.sin(angle)
    return jnp.where(parallel, start + t * (end - start), from_start * start + from_end * end)
