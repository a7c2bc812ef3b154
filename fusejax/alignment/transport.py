"""Transport: top-k distributions in source tokens and positions become target symbols and positions.

At an aligned position the source's entries are renamed to the symbols of the common alphabet, and entries that
share a symbol become one event whose probability is their sum. What has no symbol joins the residual, so the
mass of a position is the same before and after. Everything is one vectorised pass over all positions of a
document; two row sorts of packed 64-bit keys (symbol and column, then probability and symbol) do the work.

Not done here: positions that are not aligned. They come out empty (ids -1, logprobs -inf, all mass in the
residual), which the loss reads as "no distribution: plain CLM". `conditioning` may fill them.
"""

import numpy as np

from fusejax.errors import InputError
from fusejax.types import Array, TopK, VocabMap

__all__ = ["sum_symbols", "transport"]


def transport(source: TopK, alignment: Array, vocab_map: VocabMap, *, max_entries: int | None = None) -> TopK:
    """Moves a document's source distributions to the target's positions and vocabulary.

    Args:
      source: `ids [T_s, K]` source tokens, `logprobs [T_s, K]` nats, `residual_logprob [T_s]` nats.
      alignment: [T] int32, the source position of each target position, or -1.
      vocab_map: the symbol of every source token.
      max_entries: entries kept per position (the most likely; the others join the residual); None: K.

    Returns:
      TopK over symbols (target ids), `ids [T, E]` int32, `logprobs [T, E]` float32 in descending order,
      `residual_logprob [T]` float32; equal probabilities by ascending id; unused entries -1 and -inf.

    Raises:
      InputError: shapes that disagree, or source ids outside the map.
    """
    ids, logprobs = np.asarray(source.ids), np.asarray(source.logprobs)
    residual, alignment = np.asarray(source.residual_logprob), np.asarray(alignment)
    symbol_of_source = np.asarray(vocab_map.symbol_of_source, np.int32)
    _check(ids, logprobs, residual, alignment, symbol_of_source.size)
    entries = ids.shape[1] if max_entries is None else max_entries
    result = TopK(
        np.full((alignment.size, entries), -1, np.int32),
        np.full((alignment.size, entries), -np.inf, np.float32),
        np.zeros(alignment.size, np.float32),
    )
    used = np.flatnonzero(alignment >= 0)
    rows = alignment[used]
    if not rows.size:
        return result
    ids, probability = ids[rows], np.exp(logprobs[rows].astype(np.float32))
    symbols = np.where((ids >= 0) & (probability > 0), symbol_of_source[np.maximum(ids, 0)], np.int32(-1))
    unmapped = np.where((symbols < 0) & (ids >= 0), probability, np.float32(0)).sum(axis=1, dtype=np.float64)
    moved = sum_symbols(symbols, probability, np.exp(residual[rows].astype(np.float64)) + unmapped, entries=entries)
    for whole, part in zip(result, moved, strict=True):
        whole[used] = part
    return result


def sum_symbols(symbols: Array, probability: Array, outside: Array, *, entries: int) -> TopK:
    """Makes one event of all entries with the same symbol and keeps the most likely events.

    Args:
      symbols: [n, K] int32, the symbol of every entry; -1: not an event.
      probability: [n, K] float32.
      outside: [n] float64, the probability outside the entries that have a symbol.
      entries: E, events kept; the others join the residual.

    Returns:
      TopK: `ids [n, E]`, `logprobs [n, E]` descending, `residual_logprob [n]`.
    """
    found, sums, dropped = _most_likely(*_symbol_sums(symbols, probability), entries)
    spare = ((0, 0), (0, entries - found.shape[1]))
    with np.errstate(divide="ignore"):
        logprobs, rest = np.log(sums), np.log(outside + dropped).astype(np.float32)
    return TopK(np.pad(found, spare, constant_values=-1), np.pad(logprobs, spare, constant_values=-np.inf), rest)


def _symbol_sums(symbols: Array, probability: Array) -> tuple[Array, Array]:
    """Sums probabilities per symbol: symbols [n, K] (-1 unused), sums [n, K] float32."""
    count, width = symbols.shape
    keys = ((symbols.astype(np.int64) + 1) << 32) | np.arange(width)
    keys.sort(axis=1)
    columns = keys & 0xFFFFFFFF
    symbols = ((keys >> 32) - 1).astype(np.int32).ravel()
    ordered = probability.ravel()[(columns + np.arange(count)[:, None] * width).ravel()]
    opens = np.ones(count * width, bool)
    opens[1:] = symbols[1:] != symbols[:-1]
    opens[::width] = True
    starts = np.flatnonzero(opens)
    sums = np.zeros(count * width, np.float32)
    sums[starts] = np.add.reduceat(ordered.astype(np.float64), starts)
    opens &= symbols >= 0
    symbols = np.where(opens, symbols, np.int32(-1)).reshape(count, width)
    return symbols, np.where(opens, sums, np.float32(0)).reshape(count, width)


def _most_likely(symbols: Array, sums: Array, entries: int) -> tuple[Array, Array, Array]:
    """Sorts every row by falling probability and keeps `entries`; returns also the mass left out [n]."""
    # Positive floats sort like their bits, so one integer sort orders by probability and then by id.
    bits = sums.view(np.uint32).astype(np.uint64)
    flipped = np.uint64(0x7FFFFFFF) - symbols.astype(np.int64).astype(np.uint64) % np.uint64(0x80000000)
    keys = (bits << np.uint64(32)) | flipped
    keys.sort(axis=1)
    keys = keys[:, ::-1]
    ordered = (keys >> np.uint64(32)).astype(np.uint32).view(np.float32)
    names = (np.uint64(0x7FFFFFFF) - (keys & np.uint64(0xFFFFFFFF))).astype(np.int64).astype(np.int32)
    names = np.where(ordered > 0, names, np.int32(-1))
    dropped = ordered[:, entries:].sum(axis=1, dtype=np.float64)
    return names[:, :entries], ordered[:, :entries], dropped


def _check(ids: Array, logprobs: Array, residual: Array, alignment: Array, vocab_size: int) -> None:
    if ids.ndim != 2 or ids.shape != logprobs.shape or residual.shape != ids.shape[:1] or alignment.ndim != 1:
        raise InputError(
            f"source ids {ids.shape}, logprobs {logprobs.shape}, residual {residual.shape}, alignment "
            f"{alignment.shape}: expected [T_s, K], [T_s, K], [T_s] and [T] of one document."
        )
    if alignment.max(initial=-1) >= ids.shape[0]:
        raise InputError(
            f"the alignment names source position {alignment.max()}, but the source has {ids.shape[0]} positions; "
            "align the same documents that were captured."
        )
    if ids.max(initial=-1) >= vocab_size:
        raise InputError(
            f"the source distributions hold id {ids.max()}, but the vocabulary map knows {vocab_size} source ids; "
            "use the tokenizer that the source was captured with (padded rows: pass the model's vocabulary size)."
        )
