"""Exact selection of the largest values of a matrix that is read in chunks.

A histogram of the upper 16 bits of the values (non-negative floats are ordered as their bits) finds the bin of the
k-th largest, a second pass gathers that bin, and of equal elements at the threshold the lowest flat indices are kept.
The flat index is that of the tensor as it is stored. What a bin holds is kept at two bytes per element; where most
values are equal that is up to half of a float32 copy of the matrix.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusejax.stages.merge_chunks import Chunks

__all__ = ["NOTHING", "Selection", "row_ranks", "select"]

_BINS = 2**16


class Selection(NamedTuple):
    """The k largest elements: those above a threshold, and of those equal to it the ones before a flat index."""

    bits: int
    bound: int

    def numbers(self, start: int, count: int) -> tuple[np.uint32, np.int32]:
        """Returns threshold and bound for the chunk at `start` with `count` elements."""
        return np.uint32(self.bits), np.int32(min(max(self.bound - start, 0), count))

    @property
    def value(self) -> float:
        """The threshold, which is the k-th largest value."""
        return float(np.uint32(self.bits).view(np.float32))


NOTHING = Selection(2**32 - 1, 0)  # the bits of a NaN


def row_ranks(sizes: np.ndarray) -> np.ndarray:
    """Returns the rank, from 0, of every value within its row; equal ones by their index.

    Args:
        sizes: [..., C] float32, not negative.

    Returns:
        [..., C] int32. (numpy sorts whole numbers with vector instructions: 18 times as fast as XLA's stable sort of
        2048 elements on two cores.)
    """
    index = np.arange(sizes.shape[-1], dtype=np.uint64)
    keys = sizes.view(np.uint32).astype(np.uint64) << np.uint64(32) | index
    keys.sort(axis=-1)
    ranks = np.empty(sizes.shape, np.int32)
    order = (keys & np.uint64(2**32 - 1)).astype(np.int64)
    np.put_along_axis(ranks, order, np.broadcast_to(index.astype(np.int32), sizes.shape), axis=-1)
    return ranks


def select(
    chunks: Chunks, bits_of: Callable[[np.ndarray], Sequence[Any]], wanted: Sequence[tuple[int, Any]]
) -> list[Selection]:
    """Selects among several kinds of values at once, in two passes.

    Args:
        chunks: the matrix.
        bits_of: raw [R, C] -> for every kind [C] uint32, the bits of non-negative floats.
        wanted: for every selection its kind, and a function (elements, elements that are not 0) -> how many.
    """
    kinds = sorted({kind for kind, _ in wanted})
    histograms = {kind: np.zeros(_BINS, np.int64) for kind in kinds}
    nonzero = dict.fromkeys(kinds, 0)
    for _, count, raw in chunks:
        found = bits_of(raw)
        for kind in kinds:
            bits = np.asarray(found[kind])[:count]
            nonzero[kind] += int(np.count_nonzero(bits))
            histograms[kind] += np.bincount(bits.view(np.uint16)[1::2], minlength=_BINS)  # little-endian
    above = {kind: _at_or_above(histogram) for kind, histogram in histograms.items()}
    counts = [min(int(count(chunks.size, nonzero[kind])), chunks.size) for kind, count in wanted]
    bins = [_bin(above[kind], count) for (kind, _), count in zip(wanted, counts, strict=True)]
    held: dict[tuple[int, int], list[np.ndarray]] = {
        (kind, place): [] for (kind, _), place, count in zip(wanted, bins, counts, strict=True) if count > 0
    }
    for _, count, raw in chunks if held else ():
        found = bits_of(raw)
        for (kind, place), lower in held.items():
            halves = np.asarray(found[kind])[:count].view(np.uint16)
            lower.append(halves[0::2][halves[1::2] == place])
    return [
        _settle(
            chunks, place, count - int(above[kind][place + 1]), held[kind, place],
            lambda kind=kind: bits_of(chunks.buffer)[kind],
        )
        if count > 0
        else NOTHING
        for (kind, _), place, count in zip(wanted, bins, counts, strict=True)
    ]  # fmt: skip


def _at_or_above(histogram: np.ndarray) -> np.ndarray:
    return np.concatenate([np.cumsum(histogram[::-1])[::-1], [0]])


def _bin(above: np.ndarray, count: int) -> int:
    """The last bin with at least `count` elements in it and above."""
    return int(np.searchsorted(-above, -count, side="right")) - 1


def _settle(
    chunks: Chunks, upper: int, rank: int, held: list[np.ndarray], bits_of_buffer: Callable[[], Any]
) -> Selection:
    """Finds the `rank`-th largest element of a bin, and the flat index up to which its equals count."""
    above = _at_or_above(sum((np.bincount(lower, minlength=_BINS) for lower in held), start=np.zeros(_BINS, np.int64)))
    lower = _bin(above, rank)
    threshold, needed = upper << 16 | lower, rank - int(above[lower + 1])
    for chunk, values in enumerate(held):
        tied = int(np.count_nonzero(values == lower))
        if tied >= needed:
            start = chunk * chunks.length
            count = chunks.fill(start)
            bits = np.asarray(bits_of_buffer())[:count]
            return Selection(threshold, start + int(np.flatnonzero(bits == threshold)[needed - 1]) + 1)
        needed -= tied
    raise RuntimeError("the tensor changed while it was read")
