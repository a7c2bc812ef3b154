"""Which positions of which documents stand in which row: arithmetic on lengths, no tokens.

Documents are permuted once per epoch, their predicting positions laid end to end, and the line is cut every
`seq_len` positions. Every position of every document stands in exactly one row of an epoch; only the last row
has padding. The permutation sorts documents by a hash of (seed, epoch, document) rather than calling a random
generator, so that it is the same under every numpy version and on every host.

A document that is cut continues in the next row as a *new* segment whose positions start at 0 again: a row
never depends on another row, at the price of less context behind the cut. `packed=False` gives each document
rows of its own (one segment a row, the rest padding), for comparison and for chat turns that must stay whole.

Rows are found by binary search in cumulated lengths, so access is random and an epoch costs O(documents)
memory. Not done: best-fit packing that avoids cuts; it needs a global sort by length, which biases the order.
"""

from typing import NamedTuple

import numpy as np

from fusejax.errors import InputError

__all__ = ["PackIndex", "Piece", "ScoreWindows", "document_order", "score_windows", "segment_arrays"]


class Piece(NamedTuple):
    """Positions [start, stop) of one document, standing together in one row."""

    document: int
    start: int
    stop: int


class ScoreWindows(NamedTuple):
    """Windows that score every position of every document once; window w reads [start, stop), scores [first, stop)."""

    document: np.ndarray  # [W] int64
    start: np.ndarray  # [W] int64, first position read
    stop: np.ndarray  # [W] int64, end of the positions read and scored
    first: np.ndarray  # [W] int64, first position scored; start <= first < stop


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: a bijection of uint64 that scatters close inputs."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def document_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """Returns a permutation of range(count), [count] int64, that depends on seed and epoch alone."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    words = np.array([seed % 2**64, epoch % 2**64], dtype=np.uint64)
    key = _mix(_mix(words[:1] + golden) ^ (words[1:] * golden))
    # A bijection of distinct inputs: no two keys are equal, so the order does not hang on the sort's stability.
    return np.argsort(_mix(np.arange(count, dtype=np.uint64) * golden + key), kind="stable")


class PackIndex:
    """Rows of one epoch: `index[r]` lists the pieces of documents that stand in row r.

    Args:
        lengths: [documents] predicting positions of each document; documents of length 0 appear nowhere.
        seq_len: positions in a row.
        seed, epoch: which permutation of the documents.
        packed: False gives every document rows of its own.

    Raises:
        InputError: `seq_len` < 1, a negative length, or nothing to lay out.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, *, seed: int = 0, epoch: int = 0, packed: bool = True):
        lengths = np.asarray(lengths, dtype=np.int64)
        if seq_len < 1:
            raise InputError(f"seq_len is {seq_len}; it must be at least 1 position.")
        if lengths.ndim != 1 or (lengths < 0).any():
            raise InputError(f"lengths must be a vector of numbers >= 0, got shape {lengths.shape}.")
        if lengths.sum() == 0:
            raise InputError(
                f"none of the {len(lengths)} documents has a position to train on; a document needs two tokens."
            )
        order = document_order(len(lengths), seed=seed, epoch=epoch)
        self._order = order[lengths[order] > 0]
        self._lengths = lengths[self._order]
        self.seq_len = seq_len
        self.packed = packed
        # Unpacked rows are the same line with every document padded to whole rows.
        room = self._lengths if packed else -(-self._lengths // seq_len) * seq_len
        self._offsets = np.concatenate([[0], np.cumsum(room)])
        self.rows = int(-(-self._offsets[-1] // seq_len))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> list[Piece]:
        if not 0 <= row < self.rows:
            raise IndexError(f"row {row} of {self.rows}")
        begin, end = row * self.seq_len, min((row + 1) * self.seq_len, int(self._offsets[-1]))
        first = int(np.searchsorted(self._offsets, begin, side="right")) - 1
        last = int(np.searchsorted(self._offsets, end, side="left"))
        pieces = []
        for slot in range(first, last):
            offset, length = int(self._offsets[slot]), int(self._lengths[slot])
            start, stop = max(begin - offset, 0), min(end - offset, length)
            pieces.append(Piece(int(self._order[slot]), start, stop))
        return pieces


def segment_arrays(pieces: list[Piece], seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (segment_ids, positions), each [seq_len] int32: segments count from 1, 0 is padding."""
    segment_ids = np.zeros(seq_len, np.int32)
    positions = np.zeros(seq_len, np.int32)
    at = 0
    for number, piece in enumerate(pieces, start=1):
        length = piece.stop - piece.start
        segment_ids[at : at + length] = number
        positions[at : at + length] = np.arange(length)
        at += length
    return segment_ids, positions


def score_windows(lengths: np.ndarray, context: int, overlap: int = 0) -> ScoreWindows:
    """Lays windows of at most `context` positions over documents so that each position is scored exactly once.

    Args:
        lengths: [documents] predicting positions of each document.
        context: positions that the model reads at once.
        overlap: positions of context that a later window of the same document reads before it scores.

    Returns:
        `ScoreWindows` in the order of the documents.

    Raises:
        InputError: `overlap` leaves no position to score.
    """
    if not 0 <= overlap < context:
        raise InputError(f"overlap must be in [0, context); got overlap {overlap}, context {context}.")
    lengths = np.asarray(lengths, dtype=np.int64)
    stride = context - overlap
    later = -(-np.maximum(lengths - context, 0) // stride)
    counts = np.where(lengths > 0, 1 + later, 0)
    document = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = number * stride
    stop = np.minimum(start + context, lengths[document])
    return ScoreWindows(document, start, stop, np.where(number > 0, start + overlap, 0))
