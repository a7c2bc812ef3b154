"""Calibration: joins symbols that two tokenizers use differently, by what they do on the text at hand.

The coarse alphabet looks at tokens alone. In running text a tokenizer may cut elsewhere than its own tokens
suggest: " Bennet" is " Benn|et" to one and " Ben|net" to the other, though both know " Ben" and " Benn"; a
pre-tokenizer keeps ":**" whole before a line break only. There the true next tokens have different symbols, one
the beginning of the other, and supervision contradicts the text. Both tokenizations of the text are known, so the
disagreements can be counted without any model: a symbol that is wrong too often joins the shorter one that stands
in its place. That costs resolution exactly where the resolution was not true.

Not done here: splitting symbols, or joining symbols that are no prefixes of each other.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from fusejax.types import Array, VocabMap

__all__ = ["count_symbols", "join_symbols"]


def count_symbols(pairs: Iterable[tuple[Array, Array, Array]], vocab_map: VocabMap) -> tuple[Array, Array]:
    """Counts which symbols the true next tokens of both sides have at aligned positions.

    Args:
      pairs: per document: source labels [T_s], target labels [T], source index [T] (-1: not aligned).
      vocab_map: the symbols.

    Returns:
      (symbols [n, 2] int64: of the source's and of the target's token, counts [n]); pairs without a symbol left out.
    """
    of_source, of_target = (np.asarray(ids, np.int64) for ids in vocab_map)
    keys = [np.zeros(0, np.int64)]
    for source_labels, target_labels, index in pairs:
        paired = np.asarray(index) >= 0
        first = of_source[np.asarray(source_labels)[np.asarray(index)[paired]]]
        second = of_target[np.asarray(target_labels)[paired]]
        used = (first >= 0) & (second >= 0)
        keys.append(first[used] << 32 | second[used])
    found, counts = np.unique(np.concatenate(keys), return_counts=True)
    return np.stack([found >> 32, found & 0xFFFFFFFF], axis=1), counts


def join_symbols(
    vocab_map: VocabMap,
    target_bytes: Sequence[bytes | None],
    symbols: Array,
    counts: Array,
    *,
    max_disagreement: float = 0.3,
) -> VocabMap:
    """Joins every symbol that is contradicted too often with the shorter symbol that stands in its place most often.

    Args:
      vocab_map: the coarse alphabet.
      target_bytes: the bytes of the target's tokens, which name the symbols.
      symbols, counts: from `count_symbols`.
      max_disagreement: share of a symbol's uses, on one side or both, that may have another symbol opposite.

    Returns:
      VocabMap with fewer symbols; idempotent like the one given.
    """
    agreed: dict[int, int] = {}
    instead: dict[int, dict[int, int]] = {}
    for (first, second), count in zip(symbols.tolist(), counts.tolist(), strict=True):
        if first == second:
            agreed[first] = count
            continue
        short, long = sorted((first, second), key=lambda symbol: len(target_bytes[symbol] or b""))
        beginning = target_bytes[short]
        if beginning and (target_bytes[long] or b"").startswith(beginning) and target_bytes[long] != beginning:
            others = instead.setdefault(long, {})
            others[short] = others.get(short, 0) + count
    join = np.arange(len(vocab_map.symbol_of_target), dtype=np.int32)
    for long, others in instead.items():
        wrong = sum(others.values())
        if wrong > max_disagreement * (wrong + agreed.get(long, 0)):
            join[long] = max(others, key=lambda symbol: (others[symbol], -symbol))
    while not np.array_equal(join, join[join]):  # a symbol joins a shorter one each time, so this ends
        join = join[join]
    return VocabMap(*(np.where(ids >= 0, join[np.maximum(ids, 0)], np.int32(-1)) for ids in vocab_map))
