"""Windowed evaluation equals direct evaluation, position by position."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.errors import InputError
from fusejax.evaluation import aggregate, bits_per_byte, by_domain, evaluate_documents
from tests.evaluation.toys import PieceTokenizer, Trigram

TEXTS = ["hello world", "", "a", "ünïcödé " * 7, "xy", "the quick brown fox jumps over the lazy dog"]


def window_starts(length, context, overlap):
    """Where the window begins that counts each position."""
    starts, start, counted = np.zeros(length, int), 0, 0
    while counted < length:
        stop = min(start + context, length)
        starts[counted:stop] = start
        start, counted = stop - overlap, stop
    return starts


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.text(max_size=30), min_size=1, max_size=8),
    st.integers(1, 12),
    st.integers(1, 4),
    st.data(),
)
def test_every_label_is_counted_once_with_its_context(texts, context, batch_size, data):
    overlap = data.draw(st.integers(0, context - 1))
    tokenizer = PieceTokenizer((1, 2, 3), bos=data.draw(st.booleans()), eos=data.draw(st.booleans()))
    model = Trigram()
    result = evaluate_documents(model, tokenizer, texts, context=context, batch_size=batch_size, overlap=overlap)
    assert model.shapes <= {(batch_size, context)}
    full = [i for i, text in enumerate(texts) if text]
    assert [document.index for document in result.documents] == full and result.empty == len(texts) - len(full)
    for document in result.documents:
        encoded = tokenizer.encode(texts[document.index])
        memory = window_starts(len(encoded.tokens), context, overlap)
        np.testing.assert_allclose(document.realised_logprob, model.direct(encoded, memory=memory), rtol=1e-6)
        np.testing.assert_array_equal(document.byte_ends, encoded.byte_ends)
        assert document.n_bytes == len(texts[document.index].encode())
        if overlap >= 1:  # a trigram needs one position before the window's first counted one
            np.testing.assert_allclose(document.realised_logprob, model.direct(encoded), rtol=1e-6)


def test_totals():
    model, tokenizer = Trigram(), PieceTokenizer()
    result = evaluate_documents(model, tokenizer, TEXTS, context=16, batch_size=2, overlap=4)
    nll = -sum(model.direct(tokenizer.encode(text)).sum() for text in TEXTS if text)
    size = sum(len(text.encode()) for text in TEXTS)
    assert result.nll_nats == pytest.approx(nll, rel=1e-6)
    assert (result.n_bytes, result.empty) == (size, 1)
    assert result.tokens == size + 5  # every byte, and the end of five documents
    assert result.bits_per_byte == pytest.approx(nll / math.log(2) / size, rel=1e-6)


def test_batches_are_deterministic_and_short_documents_share_rows():
    runs = []
    for _ in range(2):
        model = Trigram()
        evaluate_documents(model, PieceTokenizer(), ["ab"] * 8, context=12, batch_size=2)
        runs.append(model.batches)
    for one, other in zip(*runs, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)
    (_, _, positions, segments), = runs[0]  # fmt: skip
    np.testing.assert_array_equal(segments[0], np.repeat([1, 2, 3, 4], 3))
    np.testing.assert_array_equal(positions[0], np.tile([0, 1, 2], 4))


def test_progress_counts_labels_once():
    counted = []
    result = evaluate_documents(
        Trigram(), PieceTokenizer(), TEXTS, context=8, batch_size=2, overlap=3, on_batch=counted.append
    )
    assert sum(counted) == result.tokens and len(counted) > 1


def test_documents_of_one_token_and_unpredicted_bytes():
    tokenizer = PieceTokenizer((4,), bos=False, eos=False)
    result = evaluate_documents(Trigram(), tokenizer, ["abcd", "abcdef"], context=4, batch_size=1)
    one, two = result.documents
    assert (len(one.realised_logprob), one.nll_nats, one.unpredicted_bytes) == (0, 0.0, 4)
    assert (len(two.realised_logprob), two.unpredicted_bytes) == (1, 4)
    assert evaluate_documents(Trigram(), PieceTokenizer((4,)), ["abcd"], context=4, batch_size=1).tokens == 2


def test_refusals():
    tokenizer, texts = PieceTokenizer(), ["abc", "defg"]
    for sizes in ({"context": 0}, {"batch_size": 0}, {"overlap": 4}, {"overlap": -1}):
        with pytest.raises(InputError, match="0 <= overlap < context"):
            evaluate_documents(Trigram(), tokenizer, texts, **{"context": 4, "batch_size": 1, "overlap": 0} | sizes)
    with pytest.raises(InputError, match=r"one log-probability per label, \(1, 8\); got \(1, 8, 32\)"):
        evaluate_documents(lambda *_: np.zeros((1, 8, 32)), tokenizer, texts, context=8, batch_size=1)

    def broken(tokens, labels, positions, segment_ids):
        return np.where((segment_ids == 2) & (positions == 3), np.nan, -1.0)

    with pytest.raises(InputError, match="NaN at position 3 of document 1"):
        evaluate_documents(broken, tokenizer, texts, context=16, batch_size=1)


def test_bits_per_byte():
    assert bits_per_byte(math.log(2) * 8, 1) == pytest.approx(8)
    assert aggregate([(math.log(2), 1), (math.log(2), 3)]) == pytest.approx(0.5)
    for nats, size in ((1.0, 0), (float("nan"), 3)):
        with pytest.raises(InputError):
            bits_per_byte(nats, size)
    with pytest.raises(InputError):
        aggregate([])


def test_table_by_domain():
    tokenizer, model = PieceTokenizer(), Trigram()
    domains = ["prose", "prose", "code", "code", "code", "prose"]
    result = evaluate_documents(model, tokenizer, TEXTS, context=64, batch_size=2)
    table = by_domain(result, domains)
    for domain in ("prose", "code"):
        texts = [text for text, name in zip(TEXTS, domains, strict=True) if name == domain and text]
        alone = evaluate_documents(model, tokenizer, texts, context=64, batch_size=2)
        assert table[domain] == pytest.approx(alone.bits_per_byte)
    assert list(table) == ["prose", "code", "mean"]
    assert table["mean"] == pytest.approx((table["prose"] + table["code"]) / 2)
    with pytest.raises(InputError, match='called "mean"'):
        by_domain(result, ["mean"] * 6)
    with pytest.raises(InputError, match="has no domain"):
        by_domain(result, ["a"])
