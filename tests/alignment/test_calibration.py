"""Symbols that two tokenizers use differently on a text are joined; a dummy space at the opening is seen through."""

import numpy as np
import pytest

from fusejax.alignment import (
    Opening,
    align_document,
    align_positions,
    coarse_map,
    count_symbols,
    event_groups,
    join_symbols,
)
from fusejax.alignment.report import true_symbols
from fusejax.types import VocabMap
from tests.alignment.test_transport import captured
from tests.alignment.tiny_tokenizers import LOSSLESS, TEXT, tiny_tokenizer

NAMES = [b"a", b"ab", b"abc", b"x", None, b""]
IDENTITY = VocabMap(np.arange(6, dtype=np.int32), np.arange(6, dtype=np.int32))


def join(*rows, **options):
    """The joined identity of six symbols after (source symbol, target symbol, count) rows."""
    symbols, counts = np.array([row[:2] for row in rows]).reshape(-1, 2), np.array([row[2] for row in rows])
    joined = join_symbols(IDENTITY, NAMES, symbols, counts, **options)
    np.testing.assert_array_equal(joined.symbol_of_source, joined.symbol_of_target)
    return joined.symbol_of_target.tolist()


def test_a_symbol_that_is_contradicted_too_often_joins_the_shorter_one():
    assert join((1, 1, 70), (0, 1, 30), max_disagreement=0.3) == [0, 1, 2, 3, 4, 5]
    assert join((1, 1, 69), (0, 1, 31), max_disagreement=0.3) == [0, 0, 2, 3, 4, 5]
    assert join((1, 1, 69), (1, 0, 16), (0, 1, 15), max_disagreement=0.3) == [0, 0, 2, 3, 4, 5]  # whichever side


def test_joins_follow_each_other_to_the_shortest():
    assert join((1, 2, 5), (0, 1, 5)) == [0, 0, 0, 3, 4, 5]
    assert join((0, 2, 2), (1, 2, 5)) == [0, 1, 1, 3, 4, 5]  # the most frequent opposite


def test_only_beginnings_are_joined():
    assert join((3, 1, 50), (4, 1, 50), (5, 1, 50)) == [0, 1, 2, 3, 4, 5]


def test_counting_is_what_a_loop_counts():
    rng = np.random.default_rng(0)
    vocab_map = VocabMap(rng.integers(-1, 4, 9).astype(np.int32), rng.integers(-1, 4, 7).astype(np.int32))
    pairs = [(rng.integers(0, 9, 20), rng.integers(0, 7, 15), rng.integers(-1, 20, 15)) for _ in range(5)]
    expected = {}
    for source, target, index in pairs:
        for t, s in enumerate(index):
            key = (vocab_map.symbol_of_source[source[s]], vocab_map.symbol_of_target[target[t]])
            if s >= 0 and min(key) >= 0:
                expected[tuple(map(int, key))] = expected.get(tuple(map(int, key)), 0) + 1
    symbols, counts = count_symbols(pairs, vocab_map)
    assert {tuple(row): count for row, count in zip(symbols.tolist(), counts.tolist(), strict=True)} == expected
    symbols, counts = count_symbols([], vocab_map)
    assert symbols.shape == (0, 2) and counts.shape == (0,)


@pytest.mark.parametrize("source", LOSSLESS)
@pytest.mark.parametrize("target", LOSSLESS)
def test_a_calibrated_map_is_a_coarser_partition_that_agrees_no_less(source, target):
    source, target = tiny_tokenizer(source), tiny_tokenizer(target)
    theirs, ours = source.encode(TEXT), target.encode(TEXT)
    index = align_positions(theirs.byte_ends, ours.byte_ends)
    before = coarse_map(source, target)
    found = count_symbols([(theirs.labels, ours.labels, index)], before)
    after = join_symbols(before, target.token_bytes, *found, max_disagreement=0.1)
    event_groups(after.symbol_of_target)  # refuses what is no partition
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old < 0, new < 0)
        assert all(len(set(new[old == symbol])) == 1 for symbol in set(old.tolist()))
    agreed = [(true_symbols(theirs.labels, index, m) == m.symbol_of_target[ours.labels]).sum() for m in (before, after)]
    assert agreed[1] >= agreed[0]


@pytest.mark.parametrize(("source", "target"), [("byte_level", "spm_bpe"), ("spm_bpe", "byte_level")])
@pytest.mark.parametrize("text", ["The castle", "history", " The", "日本 x", "x"])
def test_the_opening_agrees_whichever_side_has_a_dummy_space(source, target, text):
    source, target = tiny_tokenizer(source), tiny_tokenizer(target)
    theirs, ours = source.encode(text), target.encode(text)
    vocab_map = coarse_map(source, target)
    index = align_positions(theirs.byte_ends, ours.byte_ends)
    opening = Opening(source, target, vocab_map)
    found = opening(theirs.labels, theirs.byte_ends, ours.labels, ours.byte_ends, index)
    symbols = true_symbols(theirs.labels, index, vocab_map, opening=found)
    agreed = symbols == vocab_map.symbol_of_target[ours.labels]
    row = int(np.flatnonzero(ours.byte_ends == 0)[-1])
    assert agreed[row] or text[0] in "日"
    for place, table in found:
        assert place == row
        # At the opening "The" and " The" are one thing, and the name of a token is its beginning.
        for surface, symbol in zip(source.token_bytes, table, strict=True):
            if surface and symbol >= 0:
                assert target.token_bytes[symbol].strip() == b"" or surface.strip().startswith(
                    target.token_bytes[symbol].strip()
                )


def test_no_opening_where_both_sides_begin_alike():
    for source, target in (("spm_bpe", "spm_bpe"), ("byte_level", "byte_level")):
        source, target = tiny_tokenizer(source), tiny_tokenizer(target)
        theirs, ours = source.encode("The castle"), target.encode("The castle")
        index = align_positions(theirs.byte_ends, ours.byte_ends)
        opening = Opening(source, target, coarse_map(source, target))
        assert opening(theirs.labels, theirs.byte_ends, ours.labels, ours.byte_ends, index) == []
    assert opening(theirs.labels, theirs.byte_ends, ours.labels, ours.byte_ends, np.full(len(index), -1)) == []


def test_the_first_distribution_of_a_document_is_renamed():
    source, target = tiny_tokenizer("spm_bpe"), tiny_tokenizer("byte_level")
    theirs, ours = source.encode("The castle"), target.encode("The castle")
    record, vocab_map = captured(theirs, np.random.default_rng(0), 4, source.vocab_size), coarse_map(source, target)
    opening = Opening(source, target, vocab_map)
    plain, renamed = (align_document(record, ours, vocab_map, opening=o) for o in (None, opening))
    first = vocab_map.symbol_of_target[ours.labels[0]]
    assert renamed.arrays["ids"][0, 0] == first != plain.arrays["ids"][0, 0]
    np.testing.assert_array_equal(renamed.arrays["ids"][1:], plain.arrays["ids"][1:])
    assert renamed.report.agreed == plain.report.agreed + 1
