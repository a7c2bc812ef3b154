"""Dynamic time warping of two token sequences: the papers' alignment, exactly their path, a hundred times faster.

    D[i, j] = c(i, j) + min(D[i-1, j], D[i, j-1], D[i-1, j-1])

A row follows from the one above without a loop over its cells: with C the running sum of the row's costs and
m[j] = min(D[i-1, j], D[i-1, j-1]),

    D[i, j] = C[j] + min over k <= j of (m[k] - C[k-1])

which is one `minimum.accumulate`. Costs are integers, so this is exact. Rows are made in blocks; of each block two
bits per cell are kept (is the diagonal a minimum? is the second choice one?), which is all that the walk back needs:
a quarter of a byte per cell, and O(n + m) besides. No band and no pruning: the path is the papers' for any input.

The path is kept as what it is, a range of source positions for every target position.
"""

from typing import NamedTuple

import numpy as np

from fusejax.alignment.parity.costs import PairCosts
from fusejax.alignment.parity.spelling import Vocabulary, generation_of
from fusejax.errors import InputError
from fusejax.types import Array

__all__ = ["StringAligner", "Warp", "warp"]

BLOCK = 32
FAR = np.int32(1 << 29)


class Warp(NamedTuple):
    """The source positions beside each target position, `first[t] .. last[t]`, all of them at least one."""

    first: Array  # [T] int32
    last: Array  # [T] int32, not less than `first`
    cost: int  # of the whole path, in the units of the costs

    def path(self) -> list[tuple[int, int]]:
        """The cells (source, target) in order, as the reference stores them."""
        ranges = zip(self.first.tolist(), self.last.tolist(), strict=True)
        return [(i, j) for j, (first, last) in enumerate(ranges) for i in range(first, last + 1)]


def warp(costs: Array, rows: Array, columns: Array, *, source_step_first: bool) -> Warp:
    """Aligns two sequences by dynamic time warping.

    Args:
      costs: [a, b] unsigned integers, of every pair of symbols; the sum along a path stays below 2**29.
      rows: [n] int, the symbol of each source token.
      columns: [m] int, the symbol of each target token.
      source_step_first: after the diagonal, ties prefer the step in the source (else the one in the target).

    Returns:
      The path of least cost; of equals the one that the walk back from the end meets first.

    Raises:
      InputError: an empty sequence.
    """
    n, m = len(rows), len(columns)
    if not n or not m:
        raise InputError(f"cannot align {n} source tokens with {m} target tokens: both sides need at least one.")
    rows, columns = np.asarray(rows), np.asarray(columns)
    diagonal, second = [], []
    table = np.full((BLOCK + 1, m + 1), FAR, np.int32)
    sums = np.zeros((BLOCK, m + 1), np.int32)
    table[0, 0] = 0
    for start in range(0, n, BLOCK):
        count = min(BLOCK, n - start)
        block = costs[rows[start : start + count]].take(columns, axis=1).astype(np.int32)
        np.cumsum(block, axis=1, out=sums[:count, 1:])
        _fill(table, sums, count)
        best = table[1 : count + 1, 1:] - block
        diagonal.append(np.packbits(table[:count, :-1] == best, axis=1))
        other = table[:count, 1:] if source_step_first else table[1 : count + 1, :-1]
        second.append(np.packbits(other == best, axis=1))
        table[0] = table[count]
    return _walk(b"".join(x.tobytes() for x in diagonal), b"".join(x.tobytes() for x in second),
                 (n, m), source_step_first, int(table[0, m]))  # fmt: skip


def _fill(table: Array, sums: Array, count: int) -> None:
    """Rows 1 .. count of the table from row 0 and the running sums of their costs; column 0 is the border."""
    row = np.empty(table.shape[1] - 1, np.int32)
    for r in range(count):
        above = table[r]
        np.minimum(above[1:], above[:-1], out=row)
        np.subtract(row, sums[r, :-1], out=row)
        np.minimum.accumulate(row, out=row)
        np.add(row, sums[r, 1:], out=table[r + 1, 1:])


def _walk(diagonal: bytes, second: bytes, shape: tuple[int, int], source_step_first: bool, cost: int) -> Warp:
    """From the last cell to the first by the stored bits (packed along rows, most significant first)."""
    n, m = shape
    width = (m + 7) // 8
    i, j = n - 1, m - 1
    first, last = [0] * m, [0] * m
    last[j] = i
    while i or j:
        at, bit = i * width + (j >> 3), 128 >> (j & 7)
        if diagonal[at] & bit:
            first[j] = i
            i, j = i - 1, j - 1
            last[j] = i
        elif bool(second[at] & bit) == source_step_first:
            i -= 1
        else:
            first[j] = i
            j -= 1
            last[j] = i
    return Warp(np.array(first, np.int32), np.array(last, np.int32), cost)


class StringAligner:
    """Aligns token sequences of one pair of vocabularies; costs of pairs are kept from one document to the next.

    Args:
      source: the vocabulary of the tokens that carry distributions.
      target: the vocabulary whose positions are kept.
      generation: "fusellm", "fusechat_v1" or "fusechat_v2": cost and order of ties.
    """

    def __init__(self, source: Vocabulary, target: Vocabulary, *, generation: str = "fusellm"):
        self._generation = generation_of(generation)
        self._costs = PairCosts(source, target, generation=self._generation)

    def __call__(self, source_ids: Array, target_ids: Array) -> Warp:
        """Returns the source positions beside each target position ([n] and [m] token ids)."""
        costs, rows, columns = self._costs(np.asarray(source_ids), np.asarray(target_ids))
        return warp(costs, rows, columns, source_step_first=self._generation.source_step_first)
