"""SCE: select, calculate, erase (FuseChat 2.0, arXiv 2408.07990, section 3.3), per parameter matrix.

Three programs carry this name and give different models, so the variant is a parameter:

* `fuseai` (default): the code that made FuseChat-7B-v2.0 and FuseO1. The variance mask enters only the
  coefficients; the differences that are merged are not masked, and are divided by the coefficients kept.
* `paper`: the equations. Masked differences, no division.
* `mergekit`: version 0.1.5. Masked differences, divided by the coefficients kept (at least 1e-6), and uniform
  coefficients whenever the mean squares sum to less than 1e-6, which ordinary fine-tuning reaches.

With nothing selected at all (no difference anywhere, or a mask without elements) coefficients are uniform.
The variance over targets is taken from differences between targets: the base cancels.
Not done: truncating embeddings of another vocabulary size; that is a decision of whoever reads the files.
"""

import jax.numpy as jnp
from jax import lax

from fusejax.merging.average import sum_targets, weighted_sum
from fusejax.merging.selection import count_of_fraction, largest_mask
from fusejax.types import Array

__all__ = ["SCE_VARIANTS", "sce", "sce_coefficients"]

SCE_VARIANTS = ("fuseai", "paper", "mergekit")
_MERGEKIT_FLOOR = 1e-6


def sce(base: Array, targets: Array, *, select_topk: float = 1.0, variant: str = "fuseai") -> Array:
    """Merges one matrix by SCE.

    Args:
      base: [...] float32, the pivot.
      targets: [J, ...] float32, one matrix of every target.
      select_topk: the share, in [0, 1], of the elements with non-zero variance over the targets that is
        selected; 1 selects everything.
      variant: "fuseai", "paper" or "mergekit".

    Returns:
      [...] float32, the merged matrix.
    """
    if targets.shape[0] == 1 and (variant == "fuseai" or select_topk >= 1):
        return targets[0]  # bit by bit, which base + (target - base) is not
    mask = _selection(targets, select_topk)
    coefficients = _coefficients(base, targets, mask, variant)
    differences = targets - base
    if variant != "fuseai" and mask is not None:
        differences = jnp.where(mask, differences, 0)
    total = sum_targets(differences)
    # The paper's sign of 0 is 0, so exactly opposite differences cancel; both programs count 0 as positive.
    elected = jnp.sign(total) if variant == "paper" else jnp.where(total >= 0, 1, -1).astype(total.dtype)
    kept = (jnp.sign(differences) == elected) & (differences != 0)
    factors = jnp.where(kept, coefficients.reshape((-1,) + (1,) * base.ndim), 0)
    merged = weighted_sum(factors, differences)
    if variant == "paper":
        return base + merged
    norm = sum_targets(factors)
    norm = jnp.where(norm == 0, 1, norm) if variant == "fuseai" else jnp.maximum(norm, _MERGEKIT_FLOOR)
    return base + merged / norm


def sce_coefficients(base: Array, targets: Array, *, select_topk: float = 1.0, variant: str = "fuseai") -> Array:
    """Returns the coefficient of every target in one matrix, [J] float32, summing to 1 (arguments as `sce`)."""
    return _coefficients(base, targets, _selection(targets, select_topk), variant)


def _selection(targets: Array, select_topk: float) -> Array | None:
    """Marks the elements whose variance over targets is largest; None: all of them."""
    if select_topk >= 1:
        return None
    spread = _spread(lax.stop_gradient(targets))
    return largest_mask(spread, count_of_fraction(select_topk, jnp.sum(spread != 0, dtype=jnp.int32)))


def _spread(targets: Array) -> Array:
    """The variance over targets times J**2: the sum of squared differences of all pairs.

    Nothing is divided, so that for bfloat16 inputs it is nearly always exact: equal variances stay equal, and
    neither their order nor that of the targets is decided by rounding.
    """
    count = targets.shape[0]
    pairs = [jnp.square(targets[i] - targets[j]) for i in range(count) for j in range(i)]
    return sum(pairs, start=jnp.zeros_like(targets[0]))


def _coefficients(base: Array, targets: Array, mask: Array | None, variant: str) -> Array:
    squares = jnp.square(targets - base)
    if mask is not None:
        squares = jnp.where(mask, squares, 0)
    energy = jnp.mean(squares, axis=tuple(range(1, squares.ndim)))
    total = jnp.sum(energy)
    degenerate = total < _MERGEKIT_FLOOR if variant == "mergekit" else total == 0
    uniform = jnp.full_like(energy, 1 / energy.size)
    return jnp.where(degenerate, uniform, energy / jnp.where(degenerate, 1, total))
