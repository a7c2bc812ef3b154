"""The vocabulary map from counts of aligned tokens (FuseChat, arXiv 2402.16107 and 2408.07990: MS).

Over the whole corpus, N[v, u] counts the target positions of token v that source token u was aligned with. Source
token u goes to the v with N[v, u] > 0 of least *weighted* distance. The papers weigh a distance down where the pair
is frequent; their program multiplies it by sigmoid(N), which weighs it *up*. Here the factor is sigmoid(-N), unless
`reference_bugs` asks for the program's. A source token never seen has no target token; the program sends it, and its
probability, to `<unk>`.

Counts are kept sparse: dense they would be 39 GB for a vocabulary of 32k and one of 152k.
"""

from typing import NamedTuple

import numpy as np
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cpdist

from fusejax.alignment.parity.dtw import Warp
from fusejax.alignment.parity.spelling import Vocabulary, generation_of
from fusejax.types import Array

__all__ = ["PairCounter", "PairCounts", "statistics_map"]


class PairCounts(NamedTuple):
    """Sparse counts of aligned pairs, by target and then source id."""

    target: Array  # [E] int64
    source: Array  # [E] int64
    count: Array  # [E] int64

    def of(self, target: int, source: Array) -> Array:
        """Counts of one target token with several source tokens, [n] int64."""
        row = slice(*np.searchsorted(self.target, [target, target + 1]))
        at = np.searchsorted(self.source[row], source)
        at = np.minimum(at, max(row.stop - row.start - 1, 0))
        found = self.source[row][at] == source if row.stop > row.start else np.zeros(len(source), bool)
        return np.where(found, self.count[row][at] if found.any() else 0, 0)


class PairCounter:
    """Adds up aligned pairs document by document; `size` is the number of source ids."""

    def __init__(self, size: int):
        self._size, self._pending, self._waiting = size, [], 0
        self._keys, self._counts = np.zeros(0, np.int64), np.zeros(0, np.int64)

    def add(self, warp: Warp, source_ids: Array, target_ids: Array) -> None:
        """Counts one document; a source id repeated beside one target position counts once."""
        widths = warp.last.astype(np.int64) - warp.first + 1
        position = np.repeat(np.arange(widths.size), widths)
        source = np.arange(position.size) - np.repeat(np.cumsum(widths) - widths, widths) + warp.first[position]
        places = np.unique(position * np.int64(self._size) + np.asarray(source_ids, np.int64)[source])
        targets = np.asarray(target_ids, np.int64)[places // self._size]
        self._pending.append(targets * self._size + places % self._size)
        self._waiting += places.size
        if self._waiting > 1 << 20:
            self._merge()

    def counts(self) -> PairCounts:
        """Returns what was counted so far."""
        self._merge()
        return PairCounts(self._keys // self._size, self._keys % self._size, self._counts)

    def _merge(self) -> None:
        keys, repeats = np.unique(np.concatenate([np.zeros(0, np.int64), *self._pending]), return_counts=True)
        merged, inverse = np.unique(np.concatenate([self._keys, keys]), return_inverse=True)
        weights = np.concatenate([self._counts, repeats])
        self._keys, self._counts = merged, np.bincount(inverse, weights, merged.size).astype(np.int64)
        self._pending, self._waiting = [], 0


def statistics_map(
    counts: PairCounts,
    source: Vocabulary,
    target: Vocabulary,
    *,
    generation: str = "fusechat_v2",
    reference_bugs: bool = False,
) -> Array:
    """Maps source tokens to target tokens by counts and edit distance.

    Args:
      counts: aligned pairs of the corpus.
      source, target: the vocabularies; bos and eos are paired by role.
      generation: "fusechat_v1" or "fusechat_v2": what is compared where stripping leaves nothing.
      reference_bugs: as the released program: sigmoid(+N), and unseen tokens go to unk (or eos).

    Returns:
      [V_s] int32 target ids, -1 where there is none; ties go to the smallest id.
    """
    default = target.roles.get("unk", target.roles.get("eos", -1)) if reference_bugs else -1
    table = np.full(len(source.pieces), default, np.int32)
    distance = _pair_distances(counts, source, target, refill=generation_of(generation).refill)
    number = counts.count.astype(np.float64)
    with np.errstate(divide="ignore"):
        # The right sign in logarithms: sigmoid(-N) itself vanishes for frequent pairs.
        score = distance / (1 + np.exp(-number)) if reference_bugs else np.log(distance) - np.logaddexp(0.0, number)
    order = np.lexsort((counts.target, score, counts.source))
    seen, first = np.unique(counts.source[order], return_index=True)
    table[seen] = counts.target[order][first]
    for role in ("bos", "eos"):
        if role in source.roles and role in target.roles:
            table[source.roles[role]] = target.roles[role]
    return table


def _pair_distances(counts: PairCounts, source: Vocabulary, target: Vocabulary, *, refill: bool) -> Array:
    """Levenshtein distance of every counted pair, a tenth where one string contains the other; [E] float64."""
    left, right = [], []
    for u, v in zip(counts.source.tolist(), counts.target.tolist(), strict=True):
        ours, theirs = source.pieces[u] or "", target.pieces[v] or ""
        a, b = ours.replace(source.marker, ""), theirs.replace(target.marker, "")
        if refill and not (a and b):
            a, b = ours.replace(source.marker, target.marker), theirs
        left.append(a)
        right.append(b)
    found = cpdist(left, right, scorer=Levenshtein.distance, dtype=np.int32).astype(np.float64) if left else np.zeros(0)
    inside = np.array([a in b or b in a for a, b in zip(left, right, strict=True)], bool)
    return np.where(inside, found * 0.1, found)
