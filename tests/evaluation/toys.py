"""A tokenizer of pieces of given lengths, and a trigram model whose exact scores are known."""

from typing import NamedTuple

import numpy as np

V = 32


class Encoded(NamedTuple):
    tokens: np.ndarray
    labels: np.ndarray
    byte_ends: np.ndarray
    n_bytes: int


class PieceTokenizer:
    """Cuts text into pieces of repeating byte lengths; 0 makes a token without bytes."""

    def __init__(self, lengths=(1,), *, bos=True, eos=True, seed=0):
        self.lengths, self.bos, self.eos = lengths, bos, eos
        self.salt = seed

    def encode(self, text):
        data = text.encode()
        ids, ends = [], []
        if self.bos:
            ids.append(0)
            ends.append(0)
        start, i = 0, 0
        while start < len(data):
            stop = min(start + self.lengths[i % len(self.lengths)], len(data))
            ids.append(2 + (sum(data[start:stop]) * 7 + self.salt) % (V - 2))
            ends.append(stop)
            start, i = stop, i + 1
        if self.eos:
            ids.append(1)
            ends.append(len(data))
        ids, ends = np.array(ids, np.int32), np.array(ends, np.int32)
        return Encoded(ids[:-1], ids[1:], ends[:-1], len(data))


class Trigram:
    """log p(label | token, the token before it in the same segment), a table; remembers the batches it saw."""

    def __init__(self, seed=0):
        scores = np.random.default_rng(seed).standard_normal((V + 1, V, V))
        self.table = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        self.shapes, self.batches = set(), []

    def __call__(self, tokens, labels, positions, segment_ids):
        before = np.full_like(tokens, V)
        before[:, 1:] = np.where(segment_ids[:, 1:] == segment_ids[:, :-1], tokens[:, :-1], V)
        before[positions == 0] = V
        self.shapes.add(tokens.shape)
        self.batches.append((tokens.copy(), labels.copy(), positions.copy(), segment_ids.copy()))
        found = self.table[before, tokens, labels]
        found[segment_ids == 0] = np.nan  # padding must never be read
        return found

    def direct(self, encoded, *, memory=None):
        """Scores of one document; with `memory`, position t forgets what precedes memory[t]."""
        found = []
        for t, (token, label) in enumerate(zip(encoded.tokens, encoded.labels, strict=True)):
            first = 0 if memory is None else memory[t]
            found.append(self.table[encoded.tokens[t - 1] if t > first else V, token, label])
        return np.array(found)
