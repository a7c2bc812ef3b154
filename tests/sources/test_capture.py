"""Capture: windows cover every position once, and a document's values do not depend on its neighbours."""

from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusejax.errors import InputError
from fusejax.sources.capture import capture_shard, record_of, window_batches
from fusejax.types import TopK


class _Document(NamedTuple):
    tokens: np.ndarray
    labels: np.ndarray
    byte_ends: np.ndarray
    n_bytes: int
    exact: bool = True


def _document(ids):
    ids = np.asarray(ids, np.int32)
    return _Document(ids[:-1], ids[1:], np.arange(len(ids) - 1, dtype=np.int32), max(len(ids) - 1, 0))


def _score(tokens, labels, positions, segment_ids):
    """A stub whose output tells which inputs reached it."""
    realised = -(0.01 * tokens + 0.0001 * positions + 0.5 * (labels % 7))
    ids = np.stack([tokens, labels], axis=-1)
    return realised.astype(np.float32), TopK(ids, -np.ones(ids.shape, np.float32), np.full(tokens.shape, -2.0))


@given(st.lists(st.integers(0, 70), max_size=30), st.integers(1, 33), st.integers(0, 3))
def test_every_position_is_in_one_window(lengths, context, extra):
    batches = window_batches(lengths, context=context, batch_tokens=context * (extra + 1))
    seen = [np.zeros(n, int) for n in lengths]
    for batch in batches:
        assert len(batch.rows) <= batch.count
        for document, start, stop in batch.rows:
            assert stop - start <= batch.length <= context
            seen[document][start:stop] += 1
    assert all((s == 1).all() for s in seen)
    assert len({(b.length, b.count) for b in batches}) <= 3


def test_values_follow_their_document():
    rng = np.random.default_rng(0)
    documents = [_document(rng.integers(0, 50, n)) for n in (1, 2, 40, 9, 17)]
    together = list(capture_shard(_score, documents, top_k=2, context=16, batch_tokens=64, dtype="float32"))
    for document, captured in zip(documents, together, strict=True):
        (alone,) = capture_shard(_score, [document], top_k=2, context=16, batch_tokens=64, dtype="float32")
        np.testing.assert_array_equal(captured.realised_logprob, alone.realised_logprob)
        position = np.arange(len(document.tokens)) % 16
        expected = -(0.01 * document.tokens + 0.0001 * position + 0.5 * (document.labels % 7))
        np.testing.assert_allclose(captured.realised_logprob, expected, rtol=1e-6)
        np.testing.assert_array_equal(captured.topk.ids[:, 0], document.tokens)
        header, arrays = record_of(document, captured)
        assert header["nll_nats"] == pytest.approx(-expected.sum(), rel=1e-5)
        assert arrays["topk_ids"].shape == (len(document.tokens), 2)


def test_a_source_that_gives_nan_or_nothing_is_stopped_and_the_documents_are_named():
    def bad(tokens, labels, positions, segment_ids):
        realised, topk = _score(tokens, labels, positions, segment_ids)
        realised = np.where(labels == 9, -np.inf, np.where(tokens == 3, np.nan, realised))
        return realised, topk

    documents = [_document([1, 2]), _document([1, 1, 3, 4]), _document([7, 8, 9, 9, 9])]
    options = {"top_k": 2, "context": 8, "batch_tokens": 32}
    with pytest.raises(InputError, match=r"in 2 documents") as caught:
        list(capture_shard(bad, documents, names=["a", "b", "c"], **options))
    assert "'b': NaN at position 2 (1 of 3 positions)" in str(caught.value)
    assert "'c': no probability for token 9 at position 1 (3 of 4 positions)" in str(caught.value)
    with pytest.raises(InputError, match="'1': NaN"):
        list(capture_shard(bad, documents[:2], **options))


def test_a_record_says_whether_its_byte_ends_are_exact():
    document = _document([1, 2, 3])
    for exact in (True, False):
        given = document._replace(exact=exact)
        (captured,) = capture_shard(_score, [given], top_k=2, context=8, batch_tokens=8)
        assert record_of(given, captured)[0]["exact"] is exact


def test_a_window_larger_than_a_batch_is_refused():
    with pytest.raises(ValueError, match="batch_tokens"):
        window_batches([3], context=8, batch_tokens=4)
