"""Interpolation along arcs: between two models, and means of several on a sphere.

Directions and lengths of a matrix are merged apart: a linear average of nearly orthogonal matrices is shorter than
any of them. Matrices are flattened to one vector unless said otherwise. Equal targets give themselves bit by bit.
Where no direction is defined (opposite or zero matrices) the result is the linear average.
"""

import jax.numpy as jnp
from jax import lax

from fusejax.errors import InputError
from fusejax.merging.average import sum_targets, weighted_sum
from fusejax.types import Array

__all__ = ["karcher", "multislerp", "nuslerp", "slerp"]

_NEARLY_PARALLEL = 0.9995  # mergekit's; above it the sine is too small to divide by
_SMALL_ANGLE = 1e-3  # below it arcs and chords agree in float32, and an arc cosine does not


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


def nuslerp(
    base: Array | None, targets: Array, *, weights: Array, flatten: bool = True, row_wise: bool = False
) -> Array:
    """Interpolates along the arc between two matrices, or between their task vectors if there is a base.

    Args:
      base: [...] float32, added to the interpolated task vectors; or None.
      targets: [2, ...] float32.
      weights: [2] float; the second's share of the sum is the position on the arc (one half if they sum to 0).
      flatten: one angle for the matrix; otherwise one for every vector.
      row_wise: without `flatten`, the vectors lie along the first axis instead of the last (mergekit's words).

    Returns:
      [...] float32, the merged matrix.
    """
    start, end = targets if base is None else targets - base
    axes = None if flatten else (0 if row_wise else -1)
    weights = jnp.asarray(weights, targets.dtype)
    total = weights[0] + weights[1]
    t = jnp.where(total == 0, 0.5, weights[1] / jnp.where(total == 0, 1, total))
    angle, sine = _angle(start, end, axes)
    straight = sine < 1e-8
    sine = jnp.where(straight, 1, sine)
    arc = (jnp.sin((1 - t) * angle) * start + jnp.sin(t * angle) * end) / sine
    merged = jnp.where(straight, start + t * (end - start), arc)
    return merged if base is None else jnp.where(_all_equal(targets), targets[0], base + merged)


def multislerp(base: Array | None, targets: Array, *, weights: Array, normalize_weights: bool = True) -> Array:
    """Scales the direction of the mean of unit vectors to the mean length (Goddard's barycentric interpolation).

    The published method maps the unit vectors to the plane that touches the sphere at their weighted mean, averages
    there, and maps back; projected along the mean, their weighted sum there is 0, so the mean is the result.

    Args:
      base: [...] float32: interpolate the task vectors and add them to it; or None.
      targets: [J, ...] float32.
      weights: [J] float.
      normalize_weights: divide them by their sum, which must not be 0.

    Returns:
      [...] float32, the merged matrix.
    """
    weights = jnp.asarray(weights, targets.dtype)
    weights = weights / jnp.sum(weights) if normalize_weights else weights
    vectors = targets if base is None else targets - base
    merged = _along(weighted_sum(weights, _units(vectors)), weights, vectors)
    merged = merged if base is None else base + merged
    return jnp.where(_all_equal(targets), targets[0], merged) if normalize_weights else merged


def karcher(base: Array | None, targets: Array, *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    """Finds the mean of the directions on the sphere (Karcher 1977), scaled to the mean length.

    Args:
      base: not used; may be None.
      targets: [J, ...] float32.
      max_iter: steps of the fixed-point iteration at most.
      tol: ends it when a step is shorter, in radians.

    Returns:
      [...] float32, the merged matrix.
    """
    del base
    units = _units(targets)
    weights = jnp.full(len(targets), 1 / len(targets), targets.dtype)
    mean = weighted_sum(weights, units)

    def unfinished(state):
        step, length, _ = state
        return (step < max_iter) & (length >= tol)

    def improve(state):
        step, _, point = state
        tangent = sum_targets(jnp.stack([_towards(point, unit) for unit in units])) / len(targets)
        length = _norm(tangent)
        moved = jnp.cos(length) * point + _sinc(length) * tangent
        return step + 1, length, jnp.where(length >= tol, moved / _nonzero(_norm(moved)), point)

    start = (jnp.int32(0), jnp.full_like(mean, jnp.inf, shape=()), mean / _nonzero(_norm(mean)))
    point = lax.while_loop(unfinished, improve, start)[2]
    return jnp.where(_all_equal(targets), targets[0], _along(jnp.where(_norm(mean) == 0, 0, point), weights, targets))


def _norm(x: Array, axes: int | None = None) -> Array:
    squares = jnp.square(x)
    total = jnp.sum(squares, axis=axes, keepdims=axes is not None)
    # The sum again about the mean: a plain float32 sum was 5e-6 off for 1024 elements, which scales the result.
    count = x.size // max(total.size, 1)
    mean = total / count
    squares = count * mean + jnp.sum(squares - mean, axis=axes, keepdims=axes is not None)
    return jnp.where(squares == 0, 0, jnp.sqrt(_nonzero(squares)))  # with a gradient at 0


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)


def _units(vectors: Array) -> Array:
    return jnp.stack([x / _nonzero(_norm(x)) for x in vectors])


def _all_equal(targets: Array) -> Array:
    return jnp.all(targets == targets[0])


def _along(direction: Array, weights: Array, vectors: Array) -> Array:
    """The direction with the weighted mean length of the vectors; their linear mean if there is no direction."""
    norm = _norm(direction)
    length = sum(weights[j] * _norm(vectors[j]) for j in range(len(vectors)))
    return jnp.where(norm < 1e-8, weighted_sum(weights, vectors), direction * (length / _nonzero(norm)))


def _angle(start: Array, end: Array, axes: int | None) -> tuple[Array, Array]:
    """The angle between two vectors and its sine, from the chord, which small angles do not cancel in."""
    one, other = (x / _nonzero(_norm(x, axes)) for x in (start, end))
    angle = 2 * jnp.arctan2(_norm(one - other, axes), _norm(one + other, axes))
    angle = jnp.where((_norm(start, axes) == 0) | (_norm(end, axes) == 0), jnp.pi / 2, angle)
    return angle, jnp.sin(angle)


def _towards(point: Array, unit: Array) -> Array:
    """The tangent at `point` whose arc ends at `unit`."""
    cosine = jnp.clip(jnp.sum(point * unit), -1, 1)
    across = unit - cosine * point
    sine = _norm(across)
    return across * jnp.where(sine < 1e-8, 1, jnp.arctan2(sine, cosine) / _nonzero(sine))


def _sinc(angle: Array) -> Array:
    """sin(angle) / angle."""
    return jnp.where(angle < _SMALL_ANGLE, 1 - jnp.square(angle) / 6, jnp.sin(angle) / _nonzero(angle))
