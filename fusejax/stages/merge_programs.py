"""The compiled programs of `merge_statistics`: one per method, number of inputs and dtype, as every chunk has one size.

Chunks come raw: bfloat16 as its 16 bits, float16 and float32 as they are. Rows are widened to float32 inside the
program, which XLA fuses with the arithmetic into one loop over the chunk; a result is rounded once, at its end.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from fusejax.merging import MERGE_METHODS
from fusejax.merging.average import sum_targets, weighted_sum
from fusejax.merging.drop import thinned
from fusejax.merging.gram import spanned
from fusejax.merging.swap import importance, ram_counts
from fusejax.merging.task_vectors import consensus
from fusejax.merging.varm import varm_shares

__all__ = [
    "MERGEKIT_FLOOR", "change_bits", "changed_counts", "changes", "combined", "crumbs", "elect", "element_shares",
    "energy_sums", "erase", "first_target", "importance_bits", "line", "outliers", "product_sums", "pure",
    "run_formula", "second_row", "shifted", "spanned_rows", "spread_bits", "sum_of_two", "thinned_sizes",
    "towards_mean", "trimmed_sizes",
]  # fmt: skip

MERGEKIT_FLOOR = 1e-6  # mean squares below it count as none, and so does a divisor


def _widen(raw: jax.Array) -> jax.Array:
    if raw.dtype != jnp.uint16:
        return raw.astype(jnp.float32)
    return jax.lax.bitcast_convert_type(raw.astype(jnp.uint32) << 16, jnp.float32)


def _narrow(values: jax.Array, dtype: str) -> jax.Array:
    """Rounds to the nearest, ties to even; bfloat16 in integers, which is faster than the conversion."""
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(jnp.uint16)


@functools.partial(jax.jit, static_argnames=("formula", "options", "dtype"))
def run_formula(raw: jax.Array, numbers: Any, *, formula: Any, options: Any, dtype: str) -> jax.Array:
    """Applies a formula to the widened rows [R, C] and rounds the result [C] to the raw form of `dtype`."""
    return _narrow(formula(_widen(raw), *numbers, **dict(options)), dtype)


@jax.jit
def changes(raw: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the difference of every later row from row 0, [C] each."""
    rows = _widen(raw)
    return tuple(rows[j] - rows[0] for j in range(1, len(rows)))


@jax.jit
def energy_sums(raw: jax.Array, selected: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Returns sums of squared differences from row 0, as `_folded`; of what is selected, if that is given."""
    rows = _widen(raw)
    found = [rows[j] - rows[0] for j in range(1, len(rows))]
    if selected:
        mask = _mask(_spread(rows), *selected)
        found = [jnp.where(mask, change, 0) for change in found]
    return tuple(_folded(jnp.square(change)) for change in found)


@functools.partial(jax.jit, static_argnames=("kind", "has_base"))
def product_sums(raw: jax.Array, *, kind: str, has_base: bool = True) -> list[list[jax.Array]]:
    """Returns sums of products of vectors, as `_folded`, for i and every j <= i.

    Args:
        raw: [R, C].
        kind: of the vectors: "rows", "changes" from row 0, or "spanned" as `fusejax.merging.gram` has it.
        has_base: whether row 0 is a base, for "spanned".
    """
    rows = _widen(raw)
    if kind == "rows":
        vectors = rows
    elif kind == "changes":
        vectors = rows[1:] - rows[0]
    else:
        vectors = spanned(*_split(rows, has_base))
    return [[_folded(vectors[i] * vectors[j]) for j in range(i + 1)] for i in range(len(vectors))]


def _folded(values: jax.Array) -> jax.Array:
    """Adds up eighths of [C], for numpy to sum the rest pairwise: in one loop with what made the values.

    Half the time of numpy's dot product, which wants the values in memory, and a hundredth of its error.
    """
    parts = math.gcd(len(values), 8)
    return _total(list(values.reshape(parts, -1)))


@jax.jit
def spread_bits(raw: jax.Array) -> jax.Array:
    """Returns the bits, [C] uint32, of the variance over targets (times a constant)."""
    return jax.lax.bitcast_convert_type(_spread(_widen(raw)), jnp.uint32)


@functools.partial(jax.jit, static_argnames="which")
def change_bits(raw: jax.Array, *, which: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Returns the bits, [C] uint32 each, of the size of some targets' differences from row 0."""
    rows = _widen(raw)
    return tuple(jax.lax.bitcast_convert_type(jnp.abs(rows[1 + j] - rows[0]), jnp.uint32) for j in which)


@functools.partial(jax.jit, static_argnames="has_base")
def spanned_rows(raw: jax.Array, *, has_base: bool) -> tuple[jax.Array, ...]:
    """Returns `fusejax.merging.gram.spanned` vectors of a chunk, [C] each."""
    return tuple(spanned(*_split(_widen(raw), has_base)))


@jax.jit
def element_shares(raw: jax.Array) -> tuple[jax.Array, ...]:
    """Returns every target's share of the squared changes, element by element, [C] each."""
    rows = _widen(raw)
    return tuple(varm_shares(jnp.square(rows[1:] - rows[0])))


@functools.partial(jax.jit, static_argnames="which")
def trimmed_sizes(raw: jax.Array, found: Any, which: tuple[int, ...]) -> tuple[Sequence[jax.Array], ...]:
    """Returns the sizes of all changes, [C] for each target, before and after some targets' are trimmed."""
    rows = _widen(raw)
    changes = [rows[j] - rows[0] for j in range(1, len(rows))]
    return [jnp.abs(change) for change in changes], [jnp.abs(change) for change in _trimmed(changes, found, which)]


@functools.partial(jax.jit, static_argnames="row")
def thinned_sizes(raw: jax.Array, values: Any, *, row: int) -> tuple[jax.Array, ...]:
    """Returns the sizes of all changes, [J, C], before and after elements were dropped at random."""
    rows = _by_rows(_widen(raw), row)
    return tuple(jnp.abs(x).reshape(len(x), -1) for x in thinned(rows[0], rows[1:], **values))


@jax.jit
def changed_counts(raw: jax.Array, epsilon: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns how many elements each target changed alone, and how many with others, [J] each."""
    rows = _widen(raw)
    return ram_counts(rows[0], rows[1:], epsilon=epsilon)


@functools.partial(jax.jit, static_argnames="row")
def importance_bits(raw: jax.Array, *, row: int) -> jax.Array:
    """Returns the bits, [C] uint32, of what `arcee_fusion` compares."""
    base, target = _by_rows(_widen(raw), row)
    return jax.lax.bitcast_convert_type(jnp.abs(importance(base, target[None])), jnp.uint32).reshape(-1)


def _split(rows: jax.Array, has_base: bool) -> tuple[jax.Array | None, jax.Array]:
    return (rows[0], rows[1:]) if has_base else (None, rows)


def _by_rows(rows: jax.Array, row: int) -> jax.Array:
    """[R, C] -> [R, C / row, row]; as it is where rows do not matter."""
    return rows if row == 1 else rows.reshape(len(rows), -1, row)


def _spread(rows: jax.Array) -> jax.Array:
    """As `fusejax.merging.sce` takes it: squared differences of all pairs of targets."""
    pairs = [jnp.square(rows[i] - rows[j]) for i in range(1, len(rows)) for j in range(1, i)]
    return sum(pairs, start=jnp.zeros_like(rows[0]))


def _mask(values: jax.Array, threshold: jax.Array, bound: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    index = jnp.arange(len(values), dtype=jnp.int32)
    return (bits > threshold) | ((bits == threshold) & (index < bound))


def _total(values: Sequence[jax.Array]) -> jax.Array:
    return sum(values[1:], start=values[0])


def pure(
    rows: jax.Array, *arrays: jax.Array, method: str, names: tuple[str, ...], has_base: bool, row: int, **options: Any
) -> jax.Array:
    """A function of `fusejax.merging` that treats every element, or every row, on its own."""
    base, targets = _split(_by_rows(rows, row), has_base)
    return MERGE_METHODS[method].function(base, targets, **dict(zip(names, arrays, strict=True)), **options).reshape(-1)


def combined(rows: jax.Array, factors: jax.Array, *, has_base: bool, row: int) -> jax.Array:
    """Adds `fusejax.merging.gram.spanned` vectors by factors, [J] or one for every column [J, row]."""
    base, targets = _split(_by_rows(rows, row), has_base)
    merged = weighted_sum(factors, spanned(base, targets))
    return (merged if base is None else base + merged).reshape(-1)


def first_target(rows: jax.Array, *, has_base: bool) -> jax.Array:
    """Copies the first target, where all are equal."""
    return rows[int(has_base)]


def towards_mean(rows: jax.Array, ratio: jax.Array) -> jax.Array:
    """Interpolates between row 0 and the mean of the others: model stock, its ratio known."""
    return rows[0] + ratio * (sum_targets(rows[1:] - rows[0]) / (len(rows) - 1))


def outliers(rows: jax.Array, limit: jax.Array, *, row: int) -> jax.Array:
    """Takes the target's elements from a limit of importance on: `arcee_fusion`, its limit known."""
    base, target = _by_rows(rows, row)
    return jnp.where(importance(base, target[None]) >= limit, target, base).reshape(-1)


def crumbs(
    rows: jax.Array, weights: jax.Array, scale: jax.Array, found: Any, *, elects: bool, normalize: bool
) -> jax.Array:
    """Breadcrumbs, their selections known: for every target what is kept or dropped above, then what is dropped."""
    count = len(rows) - 1
    vectors = []
    for j in range(count):
        change = rows[j + 1] - rows[0]
        kept = _mask(jnp.abs(change), *found[j]) & ~_mask(jnp.abs(change), *found[count + j])
        vectors.append(jnp.where(kept, change, 0))
    if elects:
        return rows[0] + scale * consensus(jnp.stack(vectors), weights, normalize)
    weights = weights / jnp.sum(weights) if normalize else weights
    return rows[0] + scale * weighted_sum(weights, jnp.stack(vectors))


def second_row(rows: jax.Array) -> jax.Array:
    """Copies the only target."""
    return rows[1]


def line(rows: jax.Array, t: jax.Array) -> jax.Array:
    """Interpolates linearly between two rows."""
    return rows[0] + t * (rows[1] - rows[0])


def sum_of_two(rows: jax.Array, first: jax.Array, second: jax.Array) -> jax.Array:
    """Returns first * row 0 + second * row 1: an arc, its factors known."""
    return first * rows[0] + second * rows[1]


def shifted(rows: jax.Array, shares: jax.Array) -> jax.Array:
    """Adds the differences from row 0 by given shares [J]: VaRM, its weights known."""
    return rows[0] + _total([shares[j] * (rows[j + 1] - rows[0]) for j in range(len(rows) - 1)])


def erase(rows: jax.Array, weights: jax.Array, *selected: jax.Array, variant: str, masked: bool) -> jax.Array:
    """SCE, its weights [J] and selection known: keeps what agrees with the sign of the sum."""
    base, changes = rows[0], [rows[j] - rows[0] for j in range(1, len(rows))]
    if masked:
        mask = _mask(_spread(rows), *selected)
        changes = [jnp.where(mask, change, 0) for change in changes]
    total = _total(changes)
    up, down = (total > 0, total < 0) if variant == "paper" else (total >= 0, total < 0)
    factors = [
        jnp.where((up & (change > 0)) | (down & (change < 0)), weights[j], 0) for j, change in enumerate(changes)
    ]
    merged = _total([factor * change for factor, change in zip(factors, changes, strict=True)])
    if variant == "paper":
        return base + merged
    norm = _total(factors)
    return base + merged / (jnp.where(norm == 0, 1, norm) if variant == "fuseai" else jnp.maximum(norm, MERGEKIT_FLOOR))


def elect(
    rows: jax.Array, weights: jax.Array, factors: jax.Array, scale: jax.Array, found: Any, *, normalize: bool,
    trimmed: tuple[int, ...],
) -> jax.Array:  # fmt: skip
    """TIES, its selections and what trimmed vectors are enlarged by known: elects signs, merges what agrees."""
    changes = _trimmed([rows[j] - rows[0] for j in range(1, len(rows))], found, trimmed)
    votes = [change * factors[j] * weights[j] for j, change in enumerate(changes)]
    positive = _total(votes) >= 0
    kept = [jnp.where(positive, vote > 0, vote < 0) for vote in votes]
    merged = _total([jnp.where(keep, vote, 0) for keep, vote in zip(kept, votes, strict=True)])
    if normalize:
        norm = _total([jnp.where(keep, weights[j], 0) for j, keep in enumerate(kept)])
        merged = merged / jnp.where(norm == 0, 1, norm)
    return rows[0] + scale * merged


def _trimmed(changes: list[jax.Array], found: Any, which: tuple[int, ...]) -> list[jax.Array]:
    """Sets what was not selected to 0, in the changes of the targets `which` have a selection."""
    return [
        jnp.where(_mask(jnp.abs(change), *found[which.index(j)]), change, 0) if j in which else change
        for j, change in enumerate(changes)
    ]
