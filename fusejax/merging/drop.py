"""Methods that drop elements of the task vectors at random before they merge them: DARE and DELLA.

Both keep an element with some probability and enlarge what is kept. `variant` says how: "paper" divides every kept
element by its probability, so the expected task vector is the task vector; "mergekit" (0.1.5) multiplies all kept
elements by one factor that keeps the L1 norm, which for DELLA favours large elements twice.

The draws are a function of the key, the path, the layer, the target's index and the element's flat index, and of
nothing else: not of the order of the tensors, the mesh, nor whether the layers are stacked.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from fusejax.merging.average import weighted_sum
from fusejax.merging.task_vectors import consensus
from fusejax.types import Array

__all__ = ["DROP_VARIANTS", "dare_linear", "dare_ties", "della", "della_linear"]

DROP_VARIANTS = ("paper", "mergekit")


def dare_linear(
    base: Array, targets: Array, *, key: Array, weights: Array, density: Array, normalize: bool = False,
    rescale: bool = True, variant: str = "paper", scale: Array = 1.0,
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

    Returns:
      [...] float32, the merged matrix.
    """
    vectors = _dropped(targets - base, key, _even(density, targets), rescale, variant)
    return base + scale * _sum(vectors, jnp.asarray(weights, base.dtype), normalize)


def dare_ties(
    base: Array, targets: Array, *, key: Array, weights: Array, density: Array, normalize: bool = False,
    rescale: bool = True, variant: str = "paper", scale: Array = 1.0,
) -> Array:  # fmt: skip
    """Drops elements at random, then merges those that agree with the elected sign (DARE with TIES; as above)."""
    vectors = _dropped(targets - base, key, _even(density, targets), rescale, variant)
    return base + scale * consensus(vectors, jnp.asarray(weights, base.dtype), normalize)


def della_linear(
    base: Array, targets: Array, *, key: Array, weights: Array, density: Array, epsilon: Array,
    normalize: bool = False, rescale: bool = True, variant: str = "paper", scale: Array = 1.0,
) -> Array:  # fmt: skip
    """Drops small elements with higher probability, then adds the task vectors (DELLA, arXiv 2406.11617).

    Args:
      base: [...] float32.
      targets: [J, ...] float32, one matrix of every target.
      key, weights, normalize, rescale, variant, scale: as `dare_linear`.
      density: [J] float, the mean probability to keep an element.
      epsilon: [J] float; within a row (the last axis) the probability rises with the rank of the magnitude from
        density - epsilon to density + epsilon; both must be in [0, 1].

    Returns:
      [...] float32, the merged matrix.
    """
    differences = targets - base
    vectors = _dropped(differences, key, _by_rank(differences, density, epsilon), rescale, variant)
    return base + scale * _sum(vectors, jnp.asarray(weights, base.dtype), normalize)


def della(
    base: Array, targets: Array, *, key: Array, weights: Array, density: Array, epsilon: Array,
    normalize: bool = True, rescale: bool = True, variant: str = "paper", scale: Array = 1.0,
) -> Array:  # fmt: skip
    """Drops small elements with higher probability, then merges by elected signs (DELLA; as `della_linear`)."""
    differences = targets - base
    vectors = _dropped(differences, key, _by_rank(differences, density, epsilon), rescale, variant)
    return base + scale * consensus(vectors, jnp.asarray(weights, base.dtype), normalize)


def _sum(vectors: Array, weights: Array, normalize: bool) -> Array:
    return weighted_sum(weights / jnp.sum(weights) if normalize else weights, vectors)


def _even(density: Array, targets: Array) -> Array:
    return jnp.asarray(density, targets.dtype).reshape((-1,) + (1,) * (targets.ndim - 1))


def _by_rank(differences: Array, density: Array, epsilon: Array) -> Array:
    """Probabilities to keep, [J, ...]; within a row they rise with the magnitude, equal ones rank by their index."""
    order = jnp.argsort(jnp.abs(_with_whole_rows(differences)), axis=-1, stable=True)
    rank = jnp.argsort(order, axis=-1, stable=True).astype(differences.dtype)
    last = differences.shape[-1] - 1
    centred = 2 * rank / last - 1 if last else jnp.zeros_like(rank)
    return _even(density, differences) + _even(epsilon, differences) * centred


def _with_whole_rows(vector: Array) -> Array:
    """On a mesh with explicit axes a sort wants its axis on one device; elsewhere the compiler sees to that."""
    sharding = jax.typeof(vector).sharding
    if not sharding.spec or sharding.spec[-1] is None:
        return vector
    return jax.sharding.reshard(vector, PartitionSpec(*sharding.spec[:-1], None))


def _dropped(vectors: Array, key: Array, keep: Array, rescale: bool, variant: str) -> Array:
    """Keeps each element with its probability, and enlarges what is kept if `rescale`."""
    typed = jax.random.wrap_key_data(key, impl="threefry2x32")

    def draw(j: Array) -> Array:
        return jax.random.uniform(jax.random.fold_in(typed, j), vectors.shape[1:], jnp.float32)

    kept = lax.map(draw, jnp.arange(len(vectors))) < keep  # one after another: the program stays small
    if rescale and variant == "paper":
        return jnp.where(kept, vectors / jnp.where(keep == 0, 1, keep), 0)
    remaining = jnp.where(kept, vectors, 0)
    if not rescale:
        return remaining
    axes = tuple(range(1, vectors.ndim))
    before, after = (jnp.sum(jnp.abs(x), axis=axes, keepdims=True) for x in (vectors, remaining))
    # Nothing dropped must change nothing, whatever order the two sums were taken in.
    whole = (after == 0) | jnp.all(kept, axis=axes, keepdims=True)
    return remaining * jnp.where(whole, 1, before / jnp.where(after == 0, 1, after))
