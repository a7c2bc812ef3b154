"""Methods that drop elements of the task vectors at random before they merge them: DARE and DELLA.

Both keep an element with some probability and enlarge what is kept. `variant` says how: "paper" divides every kept
element by its probability, so the expected task vector is the task vector; "mergekit" (0.1.5) multiplies all kept
elements by one factor that keeps the L1 norm, which for DELLA favours large elements twice.

The draws are a function of the key, the path, the layer, the target's index and the element's flat index, and of
nothing else: not of the order of the tensors, the mesh, nor whether the layers are stacked. So a matrix may come in
pieces of whole rows: `start` is then the flat index of a piece's first element, and `factors` are those of the whole
matrix that "mergekit" multiplies by: L1 norm before over L1 norm after, of what `thinned` gives.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fusejax.merging.average import weighted_sum
from fusejax.merging.keys import uniforms
from fusejax.merging.task_vectors import consensus
from fusejax.types import Array

__all__ = ["DROP_VARIANTS", "dare_linear", "dare_ties", "della", "della_linear", "thinned"]

DROP_VARIANTS = ("paper", "mergekit")


def dare_linear(
    base: Array, targets: Array, *, key: Array, weights: Array, density: Array, normalize: bool = False,
    rescale: bool = True, variant: str = "paper", scale: Array = 1.0,
    start: Array | int = 0, factors: Array | None = None,
) -> Array:  # fmt: skip
    """Drops elements at random, then adds the task vectors (DARE, arXiv 2311.03099, section 3).

    Args:
      base: [...] float32.
      targets: [J, ...] float32, one matrix of every target.
      key: [2] uint32, threefry key data of this matrix.
      weights: [J] float; their sum must not be 0 if `normalize`.
      density: [J] float in [0, 1], the probability to keep an element (1 - the paper's drop rate).
      normalize: divide by the sum of the weights.
      rescale: enlarge what is kept.
      variant: "paper" or "mergekit", see the module.
      scale: [] float, factor of the merged task vector.
      start, factors: [] int and [J] float, where the matrix is a piece of one, see the module.

    Returns:
      [...] float32, the merged matrix.
    """
    vectors = _dropped(targets - base, key, _even(density, targets), rescale, variant, start, factors)
    return base + scale * _sum(vectors, jnp.asarray(weights, base.dtype), normalize)


def dare_ties(
    base: Array, targets: Array, *, key: Array, weights: Array, density: Array, normalize: bool = False,
    rescale: bool = True, variant: str = "paper", scale: Array = 1.0,
    start: Array | int = 0, factors: Array | None = None,
) -> Array:  # fmt: skip
    """Drops elements at random, then merges those that agree with the elected sign (DARE with TIES; as above)."""
    vectors = _dropped(targets - base, key, _even(density, targets), rescale, variant, start, factors)
    return base + scale * consensus(vectors, jnp.asarray(weights, base.dtype), normalize)


def della_linear(
    base: Array, targets: Array, *, key: Array, weights: Array, density: Array, epsilon: Array,
    normalize: bool = False, rescale: bool = True, variant: str = "paper", scale: Array = 1.0,
    start: Array | int = 0, factors: Array | None = None, ranks: Array | None = None,
) -> Array:  # fmt: skip
    """Drops small elements with higher probability, then adds the task vectors (DELLA, arXiv 2406.11617).

    Args:
      base: [...] float32.
      targets: [J, ...] float32, one matrix of every target.
      key, weights, normalize, rescale, variant, scale, start, factors: as `dare_linear`.
      density: [J] float, the mean probability to keep an element.
      epsilon: [J] float; within a row (the last axis) the probability rises with the rank of the magnitude from
        density - epsilon to density + epsilon; both must be in [0, 1].
      ranks: [J, ...] int, of the magnitudes within their rows from 0, where they are known.

    Returns:
      [...] float32, the merged matrix.
    """
    differences = targets - base
    vectors = _dropped(
        differences, key, _by_rank(differences, density, epsilon, ranks), rescale, variant, start, factors
    )
    return base + scale * _sum(vectors, jnp.asarray(weights, base.dtype), normalize)


def della(
    base: Array, targets: Array, *, key: Array, weights: Array, density: Array, epsilon: Array,
    normalize: bool = True, rescale: bool = True, variant: str = "paper", scale: Array = 1.0,
    start: Array | int = 0, factors: Array | None = None, ranks: Array | None = None,
) -> Array:  # fmt: skip
    """Drops small elements with higher probability, then merges by elected signs (DELLA; as `della_linear`)."""
    differences = targets - base
    vectors = _dropped(
        differences, key, _by_rank(differences, density, epsilon, ranks), rescale, variant, start, factors
    )
    return base + scale * consensus(vectors, jnp.asarray(weights, base.dtype), normalize)


def _sum(vectors: Array, weights: Array, normalize: bool) -> Array:
    return weighted_sum(weights / jnp.sum(weights) if normalize else weights, vectors)


def _even(density: Array, targets: Array) -> Array:
    return jnp.asarray(density, targets.dtype).reshape((-1,) + (1,) * (targets.ndim - 1))


def _by_rank(differences: Array, density: Array, epsilon: Array, ranks: Array | None) -> Array:
    """Probabilities to keep, [J, ...]; within a row they rise with the magnitude, equal ones rank by their index."""
    if ranks is None:
        order = jnp.argsort(jnp.abs(_with_whole_rows(differences)), axis=-1, stable=True)
        ranks = jnp.argsort(order, axis=-1, stable=True)
    rank = ranks.astype(differences.dtype)
    last = differences.shape[-1] - 1
    centred = 2 * rank / last - 1 if last else jnp.zeros_like(rank)
    return _even(density, differences) + _even(epsilon, differences) * centred


def _with_whole_rows(vector: Array) -> Array:
    """On a mesh with explicit axes a sort wants its axis on one device; elsewhere the compiler sees to that."""
    sharding = jax.typeof(vector).sharding
    if not sharding.spec or sharding.spec[-1] is None:
        return vector
    return jax.sharding.reshard(vector, PartitionSpec(*sharding.spec[:-1], None))


def _dropped(
    vectors: Array, key: Array, keep: Array, rescale: bool, variant: str, start: Array | int, factors: Array | None
) -> Array:
    """Keeps each element with its probability, and enlarges what is kept if `rescale`."""
    kept = _kept(vectors, key, keep, start)
    if rescale and variant == "paper":
        return jnp.where(kept, vectors / jnp.where(keep == 0, 1, keep), 0)
    remaining = jnp.where(kept, vectors, 0)
    if not rescale:
        return remaining
    if factors is None:
        axes = tuple(range(1, vectors.ndim))
        before, after = (jnp.sum(jnp.abs(x), axis=axes) for x in (vectors, remaining))
        # Nothing dropped must change nothing, whatever order the two sums were taken in.
        whole = (after == 0) | jnp.all(kept, axis=axes)
        factors = jnp.where(whole, 1, before / jnp.where(after == 0, 1, after))
    return remaining * factors.reshape((-1,) + (1,) * (vectors.ndim - 1))


def thinned(
    base: Array, targets: Array, *, key: Array, density: Array, epsilon: Array | None = None, start: Array | int = 0,
    ranks: Array | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns the task vectors, [J, ...], and what is kept of them, before it is enlarged (arguments as above)."""
    vectors = targets - base
    keep = _even(density, targets) if epsilon is None else _by_rank(vectors, density, epsilon, ranks)
    return vectors, jnp.where(_kept(vectors, key, keep, start), vectors, 0)


def _kept(vectors: Array, key: Array, keep: Array, start: Array | int) -> Array:
    def draw(j: Array) -> Array:
        return uniforms(key, j, vectors.shape[1:], start=start)

    return lax.map(draw, jnp.arange(len(vectors))) < keep  # one after another: the program stays small
