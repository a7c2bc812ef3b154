"""What it costs to put two token strings beside each other: Levenshtein distances, kept for pairs once seen.

All distances of a document come from the few hundred different tokens in it, and nearly all of those were in the
documents before: `PairCosts` keeps the matrix over tokens seen so far and computes rows and columns for new ones
only. Costs are small integers, in tenths for FuseChat 1 (whose reference multiplies by 0.1 in floating point).
"""

from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

from fusejax.alignment.parity.spelling import Generation, Vocabulary
from fusejax.types import Array

__all__ = ["PairCosts", "distances", "token_costs"]

KEPT = 4096  # tokens of either side whose costs are kept: 16 or 32 MiB


def distances(left: Sequence[str], right: Sequence[str], *, workers: int = 1) -> Array:
    """Levenshtein distances over code points, [n, m] uint8, or uint16 where a string is longer than 255."""
    longest = max((len(text) for texts in (left, right) for text in texts), default=0)
    dtype = np.uint8 if longest < 256 else np.uint16
    if not (len(left) and len(right)):
        return np.zeros((len(left), len(right)), dtype)
    return cdist(left, right, scorer=Levenshtein.distance, dtype=dtype, workers=workers)


def token_costs(
    source: Sequence[str],
    target: Sequence[str],
    *,
    source_marker: str,
    target_marker: str,
    generation: Generation,
) -> Array:
    """The cost of every pair of token strings in one generation's dynamic program.

    Args:
      source: n strings; target: m strings, each with its markers.
      source_marker, target_marker: removed wherever they occur.
      generation: whose cost.

    Returns:
      [n, m] unsigned integers: Levenshtein distances; in tenths where the generation knows containment.
    """
    left = [text.replace(source_marker, "") for text in source]
    right = [text.replace(target_marker, "") for text in target]
    found = distances(left, right)
    if generation.refill and not (all(left) and all(right)):
        found = _refilled(found, source, target, left, right, source_marker, target_marker)
    if not generation.containment:
        return found
    found = found.astype(np.uint16)
    inside = contained(found, left, right)
    return np.where(inside, found, found * np.uint16(10))


def contained(found: Array, left: Sequence[str], right: Sequence[str]) -> Array:
    """Where one string contains the other, [n, m] bool; `found` are their distances."""
    sizes = [np.array([len(text) for text in texts], np.int64) for texts in (left, right)]
    # A contained string is a subsequence, so its distance is the difference of lengths: few pairs are left.
    inside = found == np.abs(sizes[0][:, None] - sizes[1][None, :])
    for row, column in zip(*np.nonzero(inside), strict=True):
        a, b = left[row], right[column]
        inside[row, column] = a in b or b in a
    return inside


def _refilled(
    found: Array, source: Sequence[str], target: Sequence[str],
    left: Sequence[str], right: Sequence[str], source_marker: str, target_marker: str,
) -> Array:  # fmt: skip
    """Where stripping leaves nothing, the strings with the target's markers are compared."""
    renamed = [text.replace(source_marker, target_marker) for text in source]
    rows = [index for index, text in enumerate(left) if not text]
    columns = [index for index, text in enumerate(right) if not text]
    whole = [distances([renamed[i] for i in rows], target), distances(renamed, [target[j] for j in columns])]
    found = found.astype(np.result_type(found, *whole))
    found[rows, :], found[:, columns] = whole
    return found


class PairCosts:
    """The costs of the tokens met so far, for one pair of vocabularies."""

    def __init__(self, source: Vocabulary, target: Vocabulary, *, generation: Generation):
        self._sides = [(source.strings(generation), source.marker), (target.strings(generation), target.marker)]
        self._generation = generation
        self._clear()

    def __call__(self, source_ids: Array, target_ids: Array) -> tuple[Array, Array, Array]:
        """Returns (costs [a, b], row of each source token [n], column of each target token [m])."""
        unique = [np.unique(np.asarray(ids)) for ids in (source_ids, target_ids)]
        new = self._unseen(unique)
        if any(len(seen) + len(ids) > KEPT for seen, ids in zip(self._seen, new, strict=True)):
            self._clear()
            new = self._unseen(unique)
        if any(len(ids) for ids in new):
            self._grow(new)
        return self._costs, self._slots[0][source_ids], self._slots[1][target_ids]

    def _clear(self) -> None:
        self._seen: list[list[int]] = [[], []]
        self._slots = [np.full(len(strings), -1, np.int32) for strings, _ in self._sides]
        self._costs = np.zeros((0, 0), np.uint8)

    def _unseen(self, unique: list[Array]) -> list[Array]:
        return [ids[slots[ids] < 0] for ids, slots in zip(unique, self._slots, strict=True)]

    def _grow(self, new: list[Array]) -> None:
        before = [len(seen) for seen in self._seen]
        for seen, slots, ids in zip(self._seen, self._slots, new, strict=True):
            slots[ids] = np.arange(len(seen), len(seen) + len(ids))
            seen += ids.tolist()
        right = self._pairs(self._seen[0][: before[0]], self._seen[1][before[1] :])
        below = self._pairs(self._seen[0][before[0] :], self._seen[1])
        self._costs = np.vstack([np.hstack([self._costs, right]), below])

    def _pairs(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> Array:
        (source, source_marker), (target, target_marker) = self._sides
        return token_costs(
            [source[index] or "" for index in source_ids],
            [target[index] or "" for index in target_ids],
            source_marker=source_marker,
            target_marker=target_marker,
            generation=self._generation,
        )
