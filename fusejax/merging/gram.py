"""Inner products of a few vectors: all that methods about angles and lengths need to know of a matrix.

A mean on a sphere or an interpolated arc lies in the span of its inputs. So what such a method does is said by one
factor per input, and the factors follow from the inputs' inner products, a matrix of a few numbers. Whoever cannot
hold a matrix at once sums the products over pieces of it, and applies the factors to the pieces.
"""

import jax.numpy as jnp

from fusejax.types import Array

__all__ = ["gram", "root", "spanned"]


def spanned(base: Array | None, targets: Array) -> Array:
    """Returns vectors that span the targets, or the task vectors if there is a base: the first, and what differs.

    Args:
      base: [...] float32; None: the targets themselves.
      targets: [J, ...] float32.

    Returns:
      [J, ...] v_0 and x_j - x_0: nearly equal inputs lose nothing in their inner products.
    """
    first = targets[0] if base is None else targets[0] - base
    return jnp.concatenate([first[None], targets[1:] - targets[0]])


def gram(vectors: Array, axis: int | None = None) -> Array:
    """Returns the inner products [J, J, ...] of [J, ...].

    Args:
      vectors: [J, ...] float32.
      axis: of the vectors, counted without J; None takes a matrix as one vector.

    Returns:
      [J, J] if `axis` is None, else the other axes follow and `axis` has length 1.
    """
    count = len(vectors)
    products = {(i, j): _sum(vectors[i] * vectors[j], axis) for i in range(count) for j in range(i + 1)}
    rows = [jnp.stack([products[max(i, j), min(i, j)] for j in range(count)]) for i in range(count)]
    return jnp.stack(rows)


def root(x: Array) -> Array:
    """Returns the square root of what may be 0, or below it by rounding; with a gradient there."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def _sum(x: Array, axis: int | None) -> Array:
    total = jnp.sum(x, axis=axis, keepdims=axis is not None)
    # The sum again about the mean: a plain float32 sum was 5e-6 off for 1024 elements, which scales the result.
    count = x.size // max(total.size, 1)
    mean = total / max(count, 1)
    return count * mean + jnp.sum(x - mean, axis=axis, keepdims=axis is not None)
