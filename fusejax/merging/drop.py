"""Methods that drop elements of the task vectors at random before they merge them: DARE and DELLA.

Both keep an element with some probability and enlarge what is kept. `variant` says how: "paper" divides every kept
element by its probability, so the expected task vector is the task vector; "mergekit" (0.1.5) multiplies all kept
elements by one factor that keeps the L1 norm, which for DELLA favours large elements twice.

The draws are a function of the key, the path, the layer, the target's index and the element's flat index, and of
nothing else: not of the order of the tensors, the mesh, nor whether the layers are stacked.
"""

import jax
import jax.numpy as jnp
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


def _even(density: Array, targets: Array) -> list[Array]:
    density = jnp.asarray(density, targets.dtype)
    return [density[j] for j in range(len(targets))]


def _by_rank(differences: Array, density: Array, epsilon: Array) -> list[Array]:
    """Probabilities to keep, of the shape of each task vector; equal magnitudes rank by their index."""
    density, epsilon = (jnp.asarray(value, differences.dtype) for value in (density, epsilon))
    last = max(differences.shape[-1] - 1, 1)
    probabilities = []
    for j, vector in enumerate(differences):
        order = jnp.argsort(jnp.abs(_with_whole_rows(vector)), axis=-1, stable=True)
        rank = jnp.argsort(order, axis=-1, stable=True).astype(vector.dtype)
        centred = 2 * rank / last - 1 if differences.shape[-1] > 1 else jnp.zeros_like(rank)
        probabilities.append(density[j] + epsilon[j] * centred)
    return probabilities


def _with_whole_rows(vector: Array) -> Array:
    """On a mesh with explicit axes a sort wants its axis on one device; elsewhere the compiler sees to that."""
    sharding = jax.typeof(vector).sharding
    if not sharding.spec or sharding.spec[-1] is None:
        return vector
    return jax.sharding.reshard(vector, PartitionSpec(*sharding.spec[:-1], None))


def _dropped(vectors: Array, key: Array, keep: list[Array], rescale: bool, variant: str) -> Array:
    """Keeps each element with its probability, and enlarges what is kept if `rescale`."""
    results = []
    typed = jax.random.wrap_key_data(key, impl="threefry2x32")
    for j, (vector, probability) in enumerate(zip(vectors, keep, strict=True)):
        draw = jax.random.uniform(jax.random.fold_in(typed, j), vector.shape, jnp.float32)
        kept = draw < probability
        if not rescale:
            results.append(jnp.where(kept, vector, 0))
        elif variant == "paper":
            results.append(jnp.where(kept, vector / jnp.where(probability == 0, 1, probability), 0))
        else:
            remaining = jnp.where(kept, vector, 0)
            before, after = jnp.sum(jnp.abs(vector)), jnp.sum(jnp.abs(remaining))
            # Nothing dropped must change nothing, whatever order the two sums were taken in.
            factor = jnp.where((after == 0) | jnp.all(kept), 1, before / jnp.where(after == 0, 1, after))
            results.append(remaining * factor)
    return jnp.stack(results)
