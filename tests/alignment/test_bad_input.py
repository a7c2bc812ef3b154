"""Odd text through the whole alignment: what two tokenizers call the same place covers the same bytes."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.alignment import Opening, align_document, align_positions, coarse_map
from fusejax.errors import InputError
from tests.alignment.test_transport import captured
from tests.alignment.tiny_tokenizers import LOSSLESS, LOSSY, tiny_tokenizer

NAMES = [*LOSSLESS, *LOSSY]
PIECES = [
    "the castle", " ", "   ", "\n\n", "\t", "\r\n", "\x00", "\x00\x00", "\ufeff", "\u200b", "\u2028",
    "שלום עולם", "\u202eabc\u202c", "مرحبا", "👩‍👩‍👧‍👦", "👍🏽", "🏳️‍🌈", "🇩🇪🇫🇷",
    "e\u0301", "\u0301", "ﬁ", "①", "日本語", "\U0010ffff",
    "1234567890", "a" * 40, "</s>", "<s>", "<|endoftext|>", "<0x0A>", "##ing", "▁", "Ġ", "\ud7ff", "\ue000",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=10).map("".join)


def groups(tokenizer, document, ends):
    """The bytes of the tokens read between consecutive ends of `ends`, of an exact document."""
    read = document.tokens.tolist() + ([] if tokenizer.eos_id is not None else [document.labels[-1]])
    pieces = [b"" if i in set(tokenizer.special_roles.values()) else tokenizer.token_bytes[i] for i in read]
    found, start, at = [], 0, 0
    for end in ends:
        stop = at
        while stop < len(document.byte_ends) and document.byte_ends[stop] <= end:
            stop += 1
        joined = b"".join(pieces[at:stop])
        found.append(joined[len(joined) - int(end - start) :])
        at, start = stop, end
    return found


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", ["byte_level", "spm_bpe", "lowercase"])
@settings(max_examples=25, deadline=None)
@given(text=texts)
def test_both_sides_of_every_aligned_group_cover_the_same_bytes(source, target, text):
    source, target = tiny_tokenizer(source), tiny_tokenizer(target)
    theirs, ours, raw = source.encode(text), target.encode(text), text.encode()
    index = align_positions(theirs.byte_ends, ours.byte_ends)
    paired = np.flatnonzero(index >= 0)
    ends = ours.byte_ends[paired]
    np.testing.assert_array_equal(theirs.byte_ends[index[paired]], ends)
    assert not raw or (ends[-1] == len(raw) and index[-1] == len(theirs.byte_ends) - 1)
    ends = np.unique(ends)
    expected = [raw[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)] if ends.size else []
    for tokenizer, document in ((source, theirs), (target, ours)):
        if document.exact:
            assert groups(tokenizer, document, ends) == expected


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(text=texts)
def test_the_same_tokenizer_changes_nothing(name, text):
    tokenizer = tiny_tokenizer(name)
    document = tokenizer.encode(text)
    vocab_map = coarse_map(tokenizer, tokenizer)
    record = captured(document, np.random.default_rng(0), 3, tokenizer.vocab_size)
    aligned = align_document(record, document, vocab_map, opening=Opening(tokenizer, tokenizer, vocab_map))
    assert aligned.report.agreed == aligned.report.aligned == len(document.labels)
    np.testing.assert_array_equal(aligned.arrays["labels"], record["labels"])


@pytest.mark.parametrize("source", NAMES)
@settings(max_examples=15, deadline=None)
@given(text=texts)
def test_a_whole_record_of_any_text(source, text):
    source, target = tiny_tokenizer(source), tiny_tokenizer("spm_bpe")
    theirs, ours = source.encode(text), target.encode(text)
    vocab_map = coarse_map(source, target)
    record = captured(theirs, np.random.default_rng(0), 3, source.vocab_size)
    record["residual_logprob"] = np.full(len(theirs.tokens), -2.0, np.float32)
    aligned = align_document(record, ours, vocab_map, opening=Opening(source, target, vocab_map), chain=True)
    report, arrays = aligned.report, aligned.arrays
    assert report.aligned + report.conditioned + report.dropped == report.positions == len(ours.tokens)
    assert not np.isnan(arrays["logprobs"]).any() and not np.isnan(arrays["residual_logprob"]).any()
    assert ((arrays["status"] == 0) == (arrays["ids"] < 0).all(1)).all()
    assert report.inexact == 0 or not (theirs.exact and ours.exact)


@pytest.mark.parametrize("name", NAMES)
def test_a_megabyte_without_a_space(name):
    text = "abcdefghij" * 100_000
    start = time.process_time()
    document = tiny_tokenizer(name).encode(text)
    assert document.byte_ends[-1] == document.n_bytes == 1_000_000
    index = align_positions(document.byte_ends, document.byte_ends)
    assert (index == np.arange(len(index))).all()
    assert time.process_time() - start < 30


@pytest.mark.parametrize("name", NAMES)
def test_a_lone_surrogate_is_refused_by_name(name):
    with pytest.raises(InputError, match="text 1 has a lone surrogate at character 3"):
        tiny_tokenizer(name).encode_batch(["fine", "abc\udfff"])


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_tokenizer_says_so_per_document(name):
    tokenizer = tiny_tokenizer(name)
    assert not tokenizer.encode("The Castle\n\n was ﬁne 日").exact
