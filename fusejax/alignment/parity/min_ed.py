"""The vocabulary map of least edit distance (FuseLLM, arXiv 2401.10491, section 3.3: MinED).

Every source token goes to the target token with the same string, its word-start marker replaced, or else to the one
at the smallest Levenshtein distance. Equal distances, which decide most tokens, go to the smallest id. On request
they go to the candidate that occurs in the same company: the highest cosine between counts of neighbouring tokens
(`neighbour_counts`), over the tokens that both vocabularies spell alike.

The reference walks a Python list per pair; here a block of source tokens meets the whole target vocabulary at once.
Its window of neighbours is five to the left and four to the right; here five on both sides.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fusejax.alignment.parity.costs import distances
from fusejax.alignment.parity.spelling import Vocabulary, literal_ids
from fusejax.types import Array

__all__ = ["NeighbourCounts", "min_ed_map", "nearest_tokens", "neighbour_counts"]

BLOCK = 256
WINDOW = 5


class NeighbourCounts(NamedTuple):
    """How often each token stands near each token of the common vocabulary, in compressed rows."""

    offsets: Array  # [V + 1] int64, row of token v is offsets[v]:offsets[v + 1]
    columns: Array  # [E] int64, ids of common tokens, in the target's vocabulary
    counts: Array  # [E] int64


def min_ed_map(
    source: Vocabulary,
    target: Vocabulary,
    *,
    neighbours: tuple[NeighbourCounts, NeighbourCounts] | None = None,
    workers: int = -1,
) -> Array:
    """Maps every source token to the target token of least edit distance.

    Args:
      source, target: the vocabularies.
      neighbours: counts of the source's and the target's tokens, to break ties by; None: the smallest id.
      workers: threads; -1: one per core.

    Returns:
      [V_s] int32 target ids; -1 for ids without a string.
    """
    table = literal_ids(source, target)
    missing = [index for index, piece in enumerate(source.pieces) if piece is not None and table[index] < 0]
    keys = [(source.pieces[index] or "").replace(source.marker, target.marker) for index in missing]
    names = np.array([index for index, piece in enumerate(target.pieces) if piece is not None], np.int32)
    strings = [target.pieces[index] or "" for index in names]
    for start in range(0, len(missing), BLOCK):
        rows = missing[start : start + BLOCK]
        found = distances(keys[start : start + BLOCK], strings, workers=workers)
        table[rows] = names[found.argmin(axis=1)]
        if neighbours is not None:
            for row, index in zip(found, rows, strict=True):
                tied = names[np.flatnonzero(row == row.min())]
                table[index] = _best_company(index, tied, *neighbours)
    return table


def nearest_tokens(key: str, target: Vocabulary) -> tuple[int, Array]:
    """Returns the smallest distance of a string to the target's tokens, and all ids at that distance, ascending."""
    found = distances([key], [piece or "" for piece in target.pieces])[0].astype(np.int64)
    found[[piece is None for piece in target.pieces]] = 1 << 30
    return int(found.min()), np.flatnonzero(found == found.min())


def neighbour_counts(documents: Iterable[Array], common: Array) -> NeighbourCounts:
    """Counts the common tokens within five places of every token.

    Args:
      documents: token ids of each document.
      common: [V] int32, for each token its id in the vocabulary of columns, -1 where it is not common
        (`literal_ids` for the source; for the target, its own ids where the source spells them).

    Returns:
      The counts, rows in id order.
    """
    size = int(common.max(initial=0)) + 1
    keys, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for document in documents:
        ids = np.asarray(document, np.int64)
        found = []
        for shift in range(1, min(WINDOW, ids.size - 1) + 1):
            found += [ids[shift:] * size + common[ids[:-shift]], ids[:-shift] * size + common[ids[shift:]]]
            known = [common[ids[:-shift]] >= 0, common[ids[shift:]] >= 0]
            found[-2:] = [found[-2][known[0]], found[-1][known[1]]]
        new, repeats = np.unique(np.concatenate([np.zeros(0, np.int64), *found]), return_counts=True)
        keys, inverse = np.unique(np.concatenate([keys, new]), return_inverse=True)
        counts = np.bincount(inverse, np.concatenate([counts, repeats]), keys.size).astype(np.int64)
    offsets = np.searchsorted(keys, np.arange(common.size + 1, dtype=np.int64) * size)
    return NeighbourCounts(offsets, keys % size, counts)


def _best_company(index: int, tied: Array, source: NeighbourCounts, target: NeighbourCounts) -> int:
    """Of tied candidates, the one with the highest cosine; the smallest id where none has company in common."""
    own = slice(source.offsets[index], source.offsets[index + 1])
    wanted, weights = source.columns[own], source.counts[own]
    best, score = int(tied[0]), 0.0
    if not wanted.size:
        return best
    for candidate in tied.tolist():
        row = slice(target.offsets[candidate], target.offsets[candidate + 1])
        columns, counts = target.columns[row], target.counts[row]
        _, mine, theirs = np.intersect1d(wanted, columns, assume_unique=True, return_indices=True)
        dot = float(weights[mine] @ counts[theirs])
        found = dot / np.sqrt(float(counts @ counts)) if dot else 0.0
        if found > score:
            best, score = candidate, found
    return best
