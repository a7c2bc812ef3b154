"""Conditioning: a distribution for target positions that lie inside a source token (off by default).

The source predicted a whole token `u` at the last byte that both know; the target has read a part `r` of it since.
What the source says about the continuation is its distribution over the tokens that begin with `r` and go on:

    P(next bytes | r) = p(u) / Z  for every u = r + rest, named by the symbol c(rest)

The stored residual is not conditioned alike: most of it begins with something else. Its share that begins with `r`
is estimated by how often such tokens occur in text (unigram counts; `benchmarks/alignment_information.py` measures
what that is worth). A position whose stored entries keep too little mass is dropped, because the estimate would
then be all there is.

`r` is read off the source's own next token, so a dummy space or a lower-casing normaliser is part of it. Where the
token's bytes and its stretch of text differ in length (a normaliser that folds), nothing is conditioned.

Not done here: probability of the same bytes under other segmentations (`r` itself as a token, then another); the
source was not asked for it.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fusejax.alignment.transport import sum_symbols
from fusejax.alignment.vocabulary import ByteVocabulary, symbols_of_bytes
from fusejax.errors import InputError
from fusejax.types import Array, TopK, VocabMap

__all__ = ["Conditioned", "Conditioner"]


class Conditioned(NamedTuple):
    """The conditioned positions of one document, n of them."""

    rows: Array  # [n] target positions
    topk: TopK  # ids [n, E], logprobs [n, E], residual_logprob [n]
    kept: Array  # [n] float64, stored mass that begins with the bytes read
    true_symbol: Array  # [n] int32, symbol of what is left of the source's true token, or -1


class Conditioner:
    """Conditions the distributions of one source on part of its next token.

    Args:
      source: the tokenizer whose distributions are moved, V_s ids.
      target: the tokenizer that receives them.
      vocab_map: their coarse alphabet.
      counts: [V_s], how often each source token occurs in text like this.
      threshold: positions whose stored entries keep less probability than this are dropped.
    """

    def __init__(
        self,
        source: ByteVocabulary,
        target: ByteVocabulary,
        vocab_map: VocabMap,
        *,
        counts: Array,
        threshold: float = 0.05,
    ) -> None:
        self._source, self._target, self._map, self.threshold = source, target, vocab_map, threshold
        self._bytes = [surface or b"" for surface in source.token_bytes]
        if len(counts) != len(self._bytes):
            raise InputError(f"got {len(counts)} counts for a source tokenizer of {len(self._bytes)} ids.")
        order = sorted((i for i, surface in enumerate(self._bytes) if surface), key=self._bytes.__getitem__)
        self._sorted = [self._bytes[i] for i in order]
        self._rank = np.full(len(self._bytes), -1, np.int64)
        self._rank[order] = np.arange(len(order))
        # A token that was never seen still has a little probability, so that no residual is exactly nothing.
        frequency = np.asarray(counts, np.float64) + 1 / len(self._bytes)
        self._cumulative = np.concatenate([[0.0], np.cumsum(frequency[order] / frequency.sum())])
        self._last = b"\xff" * (1 + max(map(len, self._sorted), default=0))
        self._ranges: dict[bytes, tuple[int, int]] = {}
        self._symbols: dict[bytes, int] = {b"": -1}

    def __call__(
        self, source: Mapping[str, Array], target_ends: Array, source_index: Array, *, entries: int | None = None
    ) -> Conditioned:
        """Conditions the unaligned positions of one document.

        Args:
          source: the captured record (A1): labels, byte_ends [N_s]; topk_ids, topk_logprobs [N_s, K];
            residual_logprob [N_s].
          target_ends: [N] byte ends of the target.
          source_index: [N] int32, the aligned source positions, -1: none.
          entries: events kept per position; None: K.

        Returns:
          The positions that can be conditioned; none of the aligned ones.
        """
        rows, before, prefixes = self._inside(source, np.asarray(target_ends), np.asarray(source_index))
        ids = np.asarray(source["topk_ids"])[before]
        probability = np.exp(np.asarray(source["topk_logprobs"])[before].astype(np.float64))
        probability = np.where(ids >= 0, probability, 0.0)
        span = np.array([self._range(prefix) for prefix in prefixes], np.int64).reshape(-1, 2)
        ids = np.maximum(ids, 0)
        begins = (self._rank[ids] >= span[:, :1]) & (self._rank[ids] < span[:, 1:]) & (probability > 0)
        kept = np.where(begins, probability, 0.0).sum(axis=1)
        use = kept >= self.threshold
        rows, before, ids, probability, begins, span, kept = (
            array[use] for array in (rows, before, ids, probability, begins, span, kept)
        )
        prefixes = [prefix for prefix, used in zip(prefixes, use, strict=True) if used]
        residual = np.exp(np.asarray(source["residual_logprob"])[before].astype(np.float64))
        residual = residual * self._residual_share(span)
        symbols = self._remaining(ids, begins, [len(prefix) for prefix in prefixes])
        norm = kept + residual
        share = np.where(begins, probability / norm[:, None], 0.0)
        outside = residual / norm + np.where(symbols < 0, share, 0.0).sum(axis=1)
        width = ids.shape[1] if entries is None else entries
        topk = sum_symbols(symbols, share.astype(np.float32), outside, entries=width)
        labels = np.asarray(source["labels"])[before]
        true = self._remaining(labels[:, None], np.ones((len(labels), 1), bool), [len(p) for p in prefixes])[:, 0]
        return Conditioned(rows, topk, kept, true)

    def _inside(self, source: Mapping[str, Array], ends: Array, index: Array) -> tuple[Array, Array, list[bytes]]:
        """Target positions inside a source token, the source position that predicts it, and the bytes read of it."""
        source_ends, labels = np.asarray(source["byte_ends"]), np.asarray(source["labels"])
        after = np.searchsorted(source_ends, ends, side="left")
        rows = np.flatnonzero((index < 0) & (after > 0) & (after < source_ends.size))
        rows = rows[source_ends[np.minimum(after[rows], source_ends.size - 1)] > ends[rows]]
        before = after[rows] - 1
        found, prefixes = [], []
        for row, position in zip(rows.tolist(), before.tolist(), strict=True):
            surface, width = self._bytes[labels[position]], int(source_ends[position + 1] - source_ends[position])
            dummy = len(surface) - width
            if dummy == 0 or (dummy == 1 and source_ends[position] == 0 and surface.startswith(b" ")):
                found.append((row, position))
                prefixes.append(surface[: dummy + int(ends[row] - source_ends[position])])
        pairs = np.array(found, np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1], prefixes

    def _range(self, prefix: bytes) -> tuple[int, int]:
        """Ranks of the source tokens that begin with the prefix and are longer."""
        if prefix not in self._ranges:
            first = bisect_right(self._sorted, prefix)
            self._ranges[prefix] = first, max(first, bisect_left(self._sorted, prefix + self._last))
        return self._ranges[prefix]

    def _residual_share(self, span: Array) -> Array:
        """Share [n] of the residual that begins with the bytes read: that of all tokens in text."""
        return self._cumulative[span[:, 1]] - self._cumulative[span[:, 0]]

    def _remaining(self, ids: Array, used: Array, lengths: list[int]) -> Array:
        """Symbols [n, K] of what is left of every token after the bytes read; -1 where `used` is False."""
        where = list(zip(*(part.tolist() for part in np.nonzero(used)), strict=True))
        parts = [self._bytes[ids[row, column]][lengths[row] :] for row, column in where]
        new = sorted(set(parts) - self._symbols.keys())
        if new:
            found = symbols_of_bytes(new, self._source, self._target, self._map)
            self._symbols.update(zip(new, found.tolist(), strict=True))
        symbols = np.full(used.shape, -1, np.int32)
        if parts:
            symbols[used] = [self._symbols[part] for part in parts]
        return symbols
