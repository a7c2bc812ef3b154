"""The ensemble over common byte spans."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.errors import InputError
from fusejax.evaluation import DocumentScore, by_domain, ensemble_document, ensemble_evaluations, evaluate_documents
from fusejax.evaluation.ensemble import span_logprobs
from tests.evaluation.toys import PieceTokenizer, Trigram

TEXTS = ["hello world, this is a text", "second: ünïcödé", "", "x"]


def score(lengths, seed, texts=TEXTS, **flags):
    return evaluate_documents(
        Trigram(seed), PieceTokenizer(lengths, seed=seed, **flags), texts, context=64, batch_size=2
    )


def document(ends, logprobs, n_bytes):
    return DocumentScore(0, np.asarray(logprobs, np.float32), np.asarray(ends, np.int32), n_bytes)


@pytest.mark.parametrize("flags", [{}, {"bos": False}, {"eos": False}])
def test_equal_tokenizers_give_the_exact_mixture(flags):
    models = [Trigram(5), Trigram(6)]
    tokenizer = PieceTokenizer((2, 1, 3), **flags)
    evaluations = [evaluate_documents(m, tokenizer, TEXTS, context=64, batch_size=2) for m in models]
    mixed = ensemble_evaluations(evaluations, weights=[3, 1])
    for found in mixed.documents:
        encoded = tokenizer.encode(TEXTS[found.index])
        one, two = (np.exp(m.direct(encoded)) for m in models)
        assert found.nll_nats == pytest.approx(-np.log(0.75 * one + 0.25 * two).sum(), rel=1e-5)
        assert len(found.logprob) == len(encoded.labels)


def test_spans_by_hand():
    # "abcdef": ab|cd|ef and abc|d|ef meet at 4 and 6; then the end.
    one = document([0, 2, 4, 6], np.log([0.5, 0.25, 0.5, 0.1]), 6)
    two = document([0, 3, 4, 6], np.log([0.1, 0.2, 0.3, 0.4]), 6)
    sums, ends = span_logprobs([one, two])
    np.testing.assert_array_equal(ends, [4, 6, 6])
    np.testing.assert_allclose(np.exp(sums), [[0.125, 0.5, 0.1], [0.02, 0.3, 0.4]], rtol=1e-6)
    mixed = ensemble_document([one, two])
    np.testing.assert_allclose(np.exp(mixed.logprob), [0.0725, 0.4, 0.25], rtol=1e-6)
    np.testing.assert_allclose(
        np.exp(ensemble_document([one, two], weights=[1, 0]).logprob), [0.125, 0.5, 0.1], rtol=1e-6
    )


def test_labels_without_bytes():
    # A dummy prefix at the start joins the first span; one inside joins the span before it.
    one = document([0, 0, 2, 2], np.log([0.5, 0.5, 0.5, 0.125]), 4)
    two = document([0, 2], np.log([0.25, 0.25]), 4)
    sums, ends = span_logprobs([one, two])
    np.testing.assert_array_equal(ends, [2, 4])
    np.testing.assert_allclose(np.exp(sums), [[0.125, 0.125], [0.25, 0.25]], rtol=1e-6)


def test_a_model_without_start_token_begins_where_both_can():
    one = document([2, 4], np.log([0.5, 0.25]), 6)
    two = document([0, 1, 2, 4], np.log([0.1, 0.2, 0.3, 0.4]), 6)
    sums, ends = span_logprobs([one, two])
    np.testing.assert_array_equal(ends, [4, 6])
    np.testing.assert_allclose(np.exp(sums), [[0.5, 0.25], [0.3, 0.4]], rtol=1e-6)


cuts = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=60)
@given(st.lists(cuts, min_size=1, max_size=4), st.text(min_size=1, max_size=25), st.booleans(), st.booleans())
def test_properties(tokenizers, text, bos, eos):
    evaluations = [score(lengths, seed, [text], bos=bos, eos=eos) for seed, lengths in enumerate(tokenizers)]
    documents = [evaluation.documents[0] for evaluation in evaluations]
    sums, ends = span_logprobs(documents)
    size = len(text.encode())
    assert (np.diff(ends) >= 0).all() and (not len(ends) or ends[-1] == size)
    if bos:  # nothing is left out, nothing counted twice
        np.testing.assert_allclose(sums.sum(1), [-d.nll_nats for d in documents], rtol=1e-6)
    for one, other in itertools.pairwise(ends[:-1] if eos and len(ends) else ends):
        assert one < other
    mixed = ensemble_document(documents)
    # Between the best and the worst model of every span, and the same in any order.
    assert (mixed.logprob <= sums.max(0) + 1e-9).all() and (mixed.logprob >= sums.min(0) - 1e-9).all()
    assert ensemble_document(documents[::-1]).nll_nats == pytest.approx(mixed.nll_nats)
    # Minus the log of the number of models is the most that the ensemble loses per span against any of them.
    assert mixed.nll_nats <= (-sums.sum(1)).min() + len(ends) * np.log(len(documents)) + 1e-9
    common = set.intersection(*(set(d.byte_ends.tolist()) | {size} for d in documents))
    expected = (common - {min(common)}) | ({size} if eos else set())
    assert set(ends.tolist()) == (expected if all(len(d.byte_ends) for d in documents) else set())


def test_evaluations():
    evaluations = [score((1,), 0), score((2, 3), 1), score((5,), 2)]
    mixed = ensemble_evaluations(evaluations)
    assert [d.index for d in mixed.documents] == [0, 1, 3]
    assert mixed.n_bytes == evaluations[0].n_bytes and mixed.bits_per_byte > 0
    assert set(by_domain(mixed, ["a", "b", "b", "a"])) == {"a", "b", "mean"}
    same = ensemble_evaluations(evaluations[:1])
    assert same.nll_nats == pytest.approx(evaluations[0].nll_nats)


def test_refusals():
    one, other = score((1,), 0), score((2,), 1)
    with pytest.raises(InputError, match="different documents"):
        ensemble_evaluations([one, score((1,), 0, TEXTS[:2])])
    with pytest.raises(InputError, match="different texts"):
        ensemble_document([one.documents[0], other.documents[1]])
    with pytest.raises(InputError, match="only some models predict the end"):
        ensemble_evaluations([one, score((2,), 1, eos=False)])
    with pytest.raises(InputError, match="at least one"):
        ensemble_evaluations([])
    for weights in ([1], [0, 0], [1, -1], [float("nan"), 1]):
        with pytest.raises(InputError, match="weights must be 2 numbers"):
            ensemble_document([one.documents[0], other.documents[0]], weights=weights)
