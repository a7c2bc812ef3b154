"""Symbols: the fixed point of two tokenizers' first tokens, and the partitions that it makes."""

import gzip
import json

import numpy as np
import pytest

from fusejax.alignment import (
    align_positions,
    coarse_map,
    event_groups,
    exact_map,
    padded_map,
    report_document,
    summary,
)
from fusejax.errors import InputError
from fusejax.io.tokenizers import load_tokenizer
from fusejax.types import VocabMap
from tests.alignment.tiny_tokenizers import LOSSLESS, TEXT, tiny_tokenizer
from tests.paths import DATA, needs_data

PAIRS = [(source, target) for source in LOSSLESS for target in LOSSLESS]


def first(surface, tokenizer):
    """The bytes of the first token that a tokenizer gives to a continuation, where they are its beginning."""
    ids = tokenizer.encode_continuation([surface])[0] if surface else []
    piece = tokenizer.token_bytes[ids[0]] if ids else None
    return piece if piece and surface.startswith(piece) else None


def naive_symbol(surface, source, target):
    """c(b), one byte string at a time, as the definition says."""
    while surface:
        if surface.startswith(b"  ") or surface == b" ":
            return b" "
        step = first(first(surface, source), target)
        if step == surface:
            return surface
        surface = step
    return None


@pytest.mark.parametrize(("source", "target"), [pair for pair in PAIRS if pair[0] != pair[1]])
def test_against_the_naive_fixed_point(source, target):
    source, target = tiny_tokenizer(source), tiny_tokenizer(target)
    found = coarse_map(source, target)
    special = set(target.special_roles.values())
    for tokenizer, symbols in ((source, found.symbol_of_source), (target, found.symbol_of_target)):
        for surface, symbol in zip(tokenizer.token_bytes, symbols, strict=True):
            named = target.token_bytes[symbol] if symbol >= 0 and symbol not in special else None
            assert named == (naive_symbol(surface, source, target) if surface else None)


class Toy:
    """A vocabulary that encodes by longest match, except for the byte strings of a table."""

    def __init__(self, *surfaces, **table):
        self.token_bytes = [surface if surface is None else surface.encode() for surface in surfaces]
        self.table, self.special_roles, self.fingerprint = table, {}, str(id(self))

    def encode_continuation(self, fragments):
        return [self._encode(fragment.decode()) for fragment in fragments]

    def _encode(self, text):
        if text in self.table:
            return self.table[text]
        sizes = range(len(text), 0, -1)
        found = next((text[:size] for size in sizes if text[:size].encode() in self.token_bytes), None)
        return [] if found is None else [self.token_bytes.index(found.encode()), *self._encode(text[len(found) :])]


def test_tokens_that_a_tokenizer_never_makes_follow_its_own_encoding():
    # S spells "abc" as ab + c; T alone would begin it with "a", but T begins S's first token "ab" with "ab"
    source, target = Toy("abc", "ab", "c", "a", abc=[1, 2]), Toy("a", "ab", "c", abc=[0])
    assert coarse_map(source, target).symbol_of_source.tolist() == [1, 1, 2, 0]


def test_an_encoding_that_is_not_a_prefix_has_no_symbol():
    source, target = Toy("A", "a", "b"), Toy("a", "b", A=[0])  # T lower-cases
    of_source, of_target = coarse_map(source, target)
    assert of_source.tolist() == [-1, 0, 1] and of_target.tolist() == [0, 1]


def test_symbols_are_named_by_the_id_that_the_target_makes():
    assert exact_map(Toy("e"), Toy("e", "e")).symbol_of_source.tolist() == [0]
    assert exact_map(Toy("e"), Toy("e", "e", e=[1])).symbol_of_target.tolist() == [1, 1]


def test_tokens_without_symbol_never_agree():
    nothing = VocabMap(np.array([-1, 0]), np.array([0, -1]))
    row = report_document(np.array([0, 1]), np.array([1, 0]), np.array([1, 2]), np.array([0, 1]), nothing)
    assert row.aligned == 2 and row.agreed == 1 and row.worst[0].positions == 1


@pytest.mark.parametrize("make", [coarse_map, exact_map])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_maps_are_partitions(source, target, make):
    source, target = tiny_tokenizer(source), tiny_tokenizer(target)
    of_source, of_target = make(source, target)
    assert of_source.dtype == of_target.dtype == np.int32
    assert of_source.shape == (source.vocab_size,) and of_target.shape == (target.vocab_size,)
    names = of_target[of_target >= 0]
    np.testing.assert_array_equal(of_target[names], names)  # idempotent
    assert set(of_source[of_source >= 0].tolist()) <= set(names.tolist())
    for symbols, tokenizer in ((of_source, source), (of_target, target)):
        for surface, symbol in zip(tokenizer.token_bytes, symbols, strict=True):
            if surface and symbol >= 0 and source is not target:
                assert surface.startswith(target.token_bytes[symbol])
    assert of_source[source.eos_id] == of_target[target.eos_id] == target.eos_id if target.eos_id else True


@pytest.mark.parametrize("make", [coarse_map, exact_map])
@pytest.mark.parametrize("name", LOSSLESS)
def test_a_tokenizer_with_itself_is_the_identity(name, make):
    tokenizer = tiny_tokenizer(name)
    for ids in make(tokenizer, tokenizer):
        np.testing.assert_array_equal(ids, np.arange(tokenizer.vocab_size))


def test_exact_map_keeps_shared_spellings_only():
    source, target = tiny_tokenizer("byte_level"), tiny_tokenizer("spm_bpe")
    of_source, of_target = exact_map(source, target)
    shared = set(filter(None, source.token_bytes)) & set(filter(None, target.token_bytes))
    for surface, symbol in zip(source.token_bytes, of_source, strict=True):
        if surface:
            assert (symbol >= 0) == (surface in shared)
    assert 0 < len(shared) < len(source.token_bytes)
    # <0x65> and "e" are one symbol, named by the id that the tokenizer makes
    letter = target.encode_continuation([b"e"])[0][0]
    twins = [index for index, surface in enumerate(target.token_bytes) if surface == b"e"]
    assert len(twins) == 2 and of_target[twins].tolist() == [letter, letter]


def test_runs_of_blanks_are_one_symbol():
    source, target = tiny_tokenizer("byte_level"), tiny_tokenizer("spm_bpe")
    of_source, _ = coarse_map(source, target)
    runs = [index for index, b in enumerate(source.token_bytes) if b and (b.startswith(b"  ") or b == b" ")]
    assert len(runs) > 1
    assert {target.token_bytes[symbol] for symbol in of_source[runs]} == {b" "}


def test_padded_rows_have_no_symbol():
    found = coarse_map(tiny_tokenizer("byte_level"), tiny_tokenizer("spm_bpe"))
    sizes = [len(ids) for ids in found]
    padded = padded_map(found, source_size=sizes[0] + 3, target_size=sizes[1] + 5)
    assert [len(ids) for ids in padded] == [sizes[0] + 3, sizes[1] + 5]
    for before, after in zip(found, padded, strict=True):
        np.testing.assert_array_equal(after[: len(before)], before)
        assert (after[len(before) :] == -1).all() and after.dtype == np.int32
    assert len(event_groups(padded.symbol_of_target).members) == sizes[1] + 5
    with pytest.raises(InputError, match="1 rows less"):
        padded_map(found, source_size=sizes[0] - 1, target_size=sizes[1])


def test_event_groups_list_every_member_once():
    symbols = np.array([3, -1, 2, 3, 2, 3], np.int32)
    groups = event_groups(symbols)
    members = [groups.members[groups.offsets[s] : groups.offsets[s + 1]].tolist() for s in range(6)]
    assert members == [[], [], [2, 4], [0, 3, 5], [], []]
    assert groups.members[-1] == -1 and groups.members.dtype == groups.offsets.dtype == np.int32
    whole = event_groups(np.arange(5, dtype=np.int32))
    assert whole.members.tolist() == list(range(5)) and whole.offsets.tolist() == list(range(6))


def test_event_groups_refuse_what_is_no_partition():
    with pytest.raises(InputError, match="idempotent"):
        event_groups(np.array([1, 2, 2]))
    with pytest.raises(InputError, match="own vocabulary"):
        event_groups(np.array([0, 7]))


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_agreement_on_text(source, target):
    row = _measure(tiny_tokenizer(source), tiny_tokenizer(target), [TEXT, "the castle is long"])
    assert row["symbol_agreement"] > 0.9
    assert row["aligned"] + row["dropped"] == row["positions"] and row["conditioned"] == 0
    if source == target:
        assert row["symbol_agreement"] == 1 and row["dropped"] == 0


def _measure(source, target, texts, make=coarse_map):
    vocab_map = make(source, target)
    rows = []
    for theirs, ours in zip(source.encode_batch(texts), target.encode_batch(texts), strict=True):
        index = align_positions(theirs.byte_ends, ours.byte_ends)
        rows.append(report_document(theirs.labels, ours.labels, ours.byte_ends, index, vocab_map, n_bytes=ours.n_bytes))
    return summary(rows)


@needs_data
@pytest.mark.once
@pytest.mark.parametrize(
    ("target", "source", "published"),
    [("llama2", "gpt-neox-20b", 0.994), ("llama2", "mpt", 0.994), ("llama3", "mistral-v1", 0.996)],
)
def test_agreement_of_real_pairs(target, source, published):
    """The disagreement of the published table (section 3) is met within the spread of texts, 0.3 points."""
    texts = []
    for name, count in (("wikitext2", 6), ("gutenberg", 12)):
        with gzip.open(DATA / "corpora" / name / "test.jsonl.gz", "rt") as lines:
            texts += [json.loads(line)["text"] for line, _ in zip(lines, range(count), strict=False)]
    source, target = (load_tokenizer(DATA / "tokenizers" / name) for name in (source, target))
    coarse = _measure(source, target, texts)
    exact = _measure(source, target, texts, make=exact_map)
    assert coarse["symbol_agreement"] > published - 0.003
    assert exact["symbol_agreement"] < coarse["symbol_agreement"] - 0.05
    assert coarse["aligned_share"] > 0.8
