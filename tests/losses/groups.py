"""Random partitions and batches for the tests of the losses."""

import numpy as np

from fusejax.types import EventGroups, FusionBatch, TopK


def random_symbols(rng, vocab: int, symbols: int) -> np.ndarray:
    """An idempotent map [vocab] to the symbol of each token, -1 for a few tokens that belong to none."""
    label = rng.integers(0, symbols, vocab)
    out = np.array([np.flatnonzero(label == x)[0] for x in label], np.int32)
    out[label == symbols - 1] = -1
    return out


def compressed(symbol_of: np.ndarray) -> EventGroups:
    """The same partition as compressed rows."""
    vocab = len(symbol_of)
    members = [np.flatnonzero(symbol_of == s) for s in range(vocab)]
    flat = np.concatenate(members).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(m) for m in members])]).astype(np.int32)
    return EventGroups(offsets, np.pad(flat, (0, vocab - len(flat)), constant_values=-1))


def random_batch(seed=0, *, rows=8, tokens=6, vocab=32, k=4, mixed=2, sources=3):
    """Returns (FusionBatch, stacked EventGroups, symbol maps [S, vocab])."""
    rng = np.random.default_rng(seed)
    symbol_of = np.stack([random_symbols(rng, vocab, 14) for _ in range(sources)])
    groups = EventGroups(*(np.stack(x) for x in zip(*map(compressed, symbol_of), strict=True)))
    partition = rng.integers(-1, sources, (rows, tokens, mixed)).astype(np.int32)
    partition[0] = -1  # a row without any distribution
    ids = np.zeros((rows, tokens, mixed, k), np.int32)
    for at in np.ndindex(rows, tokens, mixed):
        known = np.unique(symbol_of[partition[at]])
        ids[at] = rng.permutation(known[known >= 0])[:k]
    p = rng.dirichlet(np.ones(k + 1), (rows, tokens, mixed)).astype(np.float32)
    whole = np.zeros((rows, tokens), np.int32)
    batch = FusionBatch(
        tokens=whole,
        labels=rng.integers(0, vocab, (rows, tokens)).astype(np.int32),
        segment_ids=whole + 1,
        positions=whole,
        mask=(rng.random((rows, tokens)) > 0.2).astype(np.float32),
        targets=TopK(ids, np.log(p[..., :k]), np.log(p[..., k])),
        partition=partition,
        weights=rng.dirichlet(np.ones(mixed), (rows, tokens)).astype(np.float32),
    )
    return batch, groups, symbol_of
