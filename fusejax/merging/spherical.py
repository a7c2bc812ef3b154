"""Interpolation along arcs: between two models, and means of several on a sphere.

Directions and lengths of a matrix are merged apart: a linear average of nearly orthogonal matrices is shorter than
any of them. Matrices are flattened to one vector unless said otherwise. Equal targets give themselves bit by bit.
Where no direction is defined (opposite or zero matrices) the result is the linear average.

All but `slerp` find factors of `gram.spanned` vectors from their inner products (the `*_factors` functions), and add
the vectors up. Zero vectors have no direction and are left out of it, but count in the mean length.
"""

import jax.numpy as jnp
from jax import lax

from fusejax.errors import InputError
from fusejax.merging.average import weighted_sum
from fusejax.merging.gram import gram, root, spanned
from fusejax.types import Array

__all__ = [
    "karcher", "karcher_factors", "multislerp", "multislerp_factors", "nuslerp", "nuslerp_factors", "slerp",
]  # fmt: skip

_NEARLY_PARALLEL = 0.9995  # mergekit's; above it the sine is too small to divide by
_SMALL = 1e-8  # the sine or length of what has no direction
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
    axis = None if flatten else (0 if row_wise else -1)
    vectors = spanned(base, targets)
    merged = weighted_sum(nuslerp_factors(gram(vectors, axis), jnp.asarray(weights, targets.dtype)), vectors)
    return merged if base is None else jnp.where(_all_equal(targets), targets[0], base + merged)


def nuslerp_factors(products: Array, weights: Array) -> Array:
    """Returns the factors [2, ...] of the start and of what leads from it to the end, of their products [2, 2, ...]."""
    total = weights[0] + weights[1]
    t = jnp.where(total == 0, 0.5, weights[1] / jnp.where(total == 0, 1, total))
    along, across = (products[i, 1] / _nonzero(products[0, 0]) for i in range(2))
    length = 1 + 2 * along + across  # squared, of the end; the start has 1
    cosine, sine = 1 + along, root(across - jnp.square(along))
    undirected = (products[0, 0] == 0) | (length <= 0)
    angle = jnp.where(undirected, jnp.pi / 2, jnp.arctan2(sine, jnp.where(undirected, 1, cosine)))
    straight = jnp.sin(angle) < _SMALL
    sine = jnp.where(straight, 1, jnp.sin(angle))
    from_end = jnp.where(straight, t, jnp.sin(t * angle) / sine)
    return jnp.stack([jnp.where(straight, 1, jnp.sin((1 - t) * angle) / sine + from_end), from_end])


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
    vectors = spanned(base, targets)
    weights = jnp.asarray(weights, targets.dtype)
    merged = weighted_sum(multislerp_factors(gram(vectors), weights, normalize_weights=normalize_weights), vectors)
    merged = merged if base is None else base + merged
    return jnp.where(_all_equal(targets), targets[0], merged) if normalize_weights else merged


def multislerp_factors(products: Array, weights: Array, *, normalize_weights: bool = True) -> Array:
    """Returns the factors [J] of `gram.spanned` vectors for `multislerp`, from their products [J, J]."""
    weights = weights / jnp.sum(weights) if normalize_weights else weights
    inputs, lengths = _inputs(products)
    return _along(weighted_sum(weights, _units(inputs, lengths)), weights, inputs, lengths, products)


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
    vectors = spanned(None, targets)
    merged = weighted_sum(karcher_factors(gram(vectors), max_iter=max_iter, tol=tol), vectors)
    return jnp.where(_all_equal(targets), targets[0], merged)


def karcher_factors(products: Array, *, max_iter: int = 10, tol: float = 1e-5) -> Array:
    """Returns the factors [J] of `gram.spanned` vectors for `karcher`, from their products [J, J]."""
    count = len(products)
    weights = jnp.full(count, 1 / count, products.dtype)
    inputs, lengths = _inputs(products)
    units = _units(inputs, lengths)
    mean = weighted_sum(weights, units)

    def improve(_, state):
        point, finished = state
        tangent = weighted_sum(weights, jnp.stack([_towards(point, unit, products) for unit in units]))
        step = root(_inner(tangent, tangent, products))
        moved = jnp.cos(step) * point + _sinc(step) * tangent
        finished |= step < tol
        return jnp.where(finished, point, moved / _nonzero(root(_inner(moved, moved, products)))), finished

    # A fixed number of steps, which a gradient can be taken through; they cost nothing beside the products.
    start = mean / _nonzero(root(_inner(mean, mean, products)))
    point, _ = lax.fori_loop(0, max_iter, improve, (start, jnp.zeros((), bool)))
    undirected = _inner(mean, mean, products) <= _SMALL**2
    return _along(jnp.where(undirected, 0, point), weights, inputs, lengths, products)


def _nonzero(x: Array) -> Array:
    return jnp.where(x == 0, 1, x)


def _all_equal(targets: Array) -> Array:
    return jnp.all(targets == targets[0])


def _inner(x: Array, y: Array, products: Array) -> Array:
    """The inner product of two combinations [J]; not by dot products, which accelerators round."""
    return jnp.sum(x[:, None] * products * y[None, :])


def _inputs(products: Array) -> tuple[Array, Array]:
    """The inputs as combinations [J, J] of the spanning vectors, and their lengths [J]."""
    inputs = jnp.eye(len(products), dtype=products.dtype).at[:, 0].set(1)
    squares = products[0, 0] + 2 * products[0] + jnp.diagonal(products)
    return inputs, root(squares.at[0].set(products[0, 0]))


def _units(inputs: Array, lengths: Array) -> Array:
    return jnp.where(lengths[:, None] == 0, 0, inputs / _nonzero(lengths)[:, None])


def _along(direction: Array, weights: Array, inputs: Array, lengths: Array, products: Array) -> Array:
    """The direction with the weighted mean length of the inputs; their linear mean if there is no direction."""
    norm = root(_inner(direction, direction, products))
    straight = norm < _SMALL
    return jnp.where(
        straight,
        weighted_sum(weights, inputs),
        direction * (jnp.sum(weights * lengths) / jnp.where(straight, 1, norm)),
    )


def _towards(point: Array, unit: Array, products: Array) -> Array:
    """The tangent at `point` whose arc ends at `unit`."""
    cosine = jnp.clip(_inner(point, unit, products), -1, 1)
    across = unit - cosine * point
    sine = root(_inner(across, across, products))
    small = sine < _SMALL
    return across * jnp.where(small, 1, jnp.arctan2(sine, cosine) / jnp.where(small, 1, sine))


def _sinc(angle: Array) -> Array:
    """sin(angle) / angle."""
    return jnp.where(angle < _SMALL_ANGLE, 1 - jnp.square(angle) / 6, jnp.sin(angle) / _nonzero(angle))
