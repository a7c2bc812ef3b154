"""Positions inside a source token, against a loop over the vocabulary; chains, against sums over text spans."""

import numpy as np
import pytest

from fusejax.alignment import Conditioner, align_document, align_positions, coarse_map
from fusejax.alignment.document import chain_logprobs
from fusejax.errors import InputError
from tests.alignment.test_transport import captured
from tests.alignment.test_vocabulary import naive_symbol
from tests.alignment.tiny_tokenizers import TEXT, tiny_tokenizer

PAIRS = [("byte_level", "spm_bpe"), ("spm_bpe", "byte_level"), ("metaspace_unigram", "byte_level")]
K, THRESHOLD = 9, 0.05


def record_of(document, source, *, seed=0):
    """Random distributions that like tokens which begin as the true one does."""
    rng = np.random.default_rng(seed)
    record = captured(document, rng, K, source.vocab_size)
    for t, label in enumerate(document.labels):
        surface = source.token_bytes[label]
        alike = [i for i, b in enumerate(source.token_bytes) if b and surface and b[:1] == surface[:1] and i != label]
        alike = rng.permutation(alike)[: K - 1]
        record["topk_ids"][t, 1:] = -1
        record["topk_ids"][t, 1 : 1 + len(alike)] = alike
    record["topk_logprobs"][record["topk_ids"] < 0] = -np.inf
    record["topk_ids"][np.isneginf(record["topk_logprobs"])] = -1
    return record


def oracle(record, source, target, ends, index, counts):
    """{target position: (kept mass, {symbol bytes: probability}, residual)}, one position and token at a time."""
    frequency = (counts + 1 / len(counts)) / (counts + 1 / len(counts)).sum()
    found = {}
    source_ends = record["byte_ends"].tolist()
    text_start = 0
    for t, end in enumerate(ends):
        if index[t] >= 0 or end in source_ends:
            continue
        s = max(i for i, e in enumerate(source_ends) if e < end)
        label = source.token_bytes[record["labels"][s]]
        text_start = source_ends[s + 1] - len(label)  # -1 where a dummy space stands in front
        prefix = label[: end - text_start]
        mass, kept = {}, 0.0
        for u, logprob in zip(record["topk_ids"][s], record["topk_logprobs"][s], strict=True):
            surface = source.token_bytes[u] if u >= 0 else None
            if surface and surface.startswith(prefix) and len(surface) > len(prefix):
                symbol = naive_symbol(surface[len(prefix) :], source, target)
                mass[symbol] = mass.get(symbol, 0.0) + np.exp(np.float64(logprob))
                kept += np.exp(np.float64(logprob))
        longer = [
            frequency[u]
            for u, b in enumerate(source.token_bytes)
            if b and b.startswith(prefix) and len(b) > len(prefix)
        ]
        residual = np.exp(np.float64(record["residual_logprob"][s])) * sum(longer)
        if kept >= THRESHOLD:
            found[t] = kept, {k: p / (kept + residual) for k, p in mass.items()}, residual / (kept + residual)
    return found


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_against_the_oracle(source, target):
    source, target = tiny_tokenizer(source), tiny_tokenizer(target)
    theirs, ours = source.encode(TEXT), target.encode(TEXT)
    record = record_of(theirs, source)
    index = align_positions(theirs.byte_ends, ours.byte_ends)
    counts = np.bincount(theirs.labels, minlength=source.vocab_size)
    vocab_map = coarse_map(source, target)
    found = Conditioner(source, target, vocab_map, counts=counts, threshold=THRESHOLD)(record, ours.byte_ends, index)
    expected = oracle(record, source, target, ours.byte_ends.tolist(), index, counts)
    assert found.rows.tolist() == sorted(expected)
    assert len(expected) > 10
    assert (index[found.rows] == -1).all()
    for row, t in enumerate(found.rows):
        kept, mass, residual = expected[t]
        nowhere = mass.pop(None, 0.0)
        got = {
            target.token_bytes[i]: np.exp(x)
            for i, x in zip(found.topk.ids[row], found.topk.logprobs[row], strict=True)
            if i >= 0
        }
        assert got.keys() == mass.keys()
        np.testing.assert_allclose([got[k] for k in mass], list(mass.values()), rtol=1e-5)
        np.testing.assert_allclose(np.exp(found.topk.residual_logprob[row]), residual + nowhere, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(found.kept[row], kept, rtol=1e-6)


def test_the_whole_vocabulary_stored_gives_the_exact_conditional():
    """With every token stored nothing is estimated: the residual is what the source gives to no token."""
    source, target = tiny_tokenizer("byte_level"), tiny_tokenizer("spm_bpe")
    theirs, ours = source.encode(TEXT), target.encode(TEXT)
    rng = np.random.default_rng(3)
    logprobs = np.log(rng.dirichlet(np.ones(source.vocab_size), len(theirs.tokens)))
    record = captured(theirs, rng, 2, source.vocab_size) | {
        "topk_ids": np.tile(np.arange(source.vocab_size), (len(theirs.tokens), 1)),
        "topk_logprobs": logprobs,
        "residual_logprob": np.full(len(theirs.tokens), -np.inf),
    }
    index = align_positions(theirs.byte_ends, ours.byte_ends)
    vocab_map = coarse_map(source, target)
    counts = np.zeros(source.vocab_size)
    found = Conditioner(source, target, vocab_map, counts=counts, threshold=0.0)(record, ours.byte_ends, index)
    total = np.exp(found.topk.logprobs.astype(np.float64)).sum(1) + np.exp(found.topk.residual_logprob)
    np.testing.assert_allclose(total, 1, rtol=1e-5)
    assert len(found.rows) == sum(end not in theirs.byte_ends for end in ours.byte_ends)


def test_a_higher_threshold_drops_more_and_changes_nothing_else():
    source, target = tiny_tokenizer("byte_level"), tiny_tokenizer("spm_bpe")
    theirs, ours = source.encode(TEXT), target.encode(TEXT)
    record, vocab_map = record_of(theirs, source), coarse_map(source, target)
    index = align_positions(theirs.byte_ends, ours.byte_ends)
    counts = np.bincount(theirs.labels, minlength=source.vocab_size)
    low, high = (
        Conditioner(source, target, vocab_map, counts=counts, threshold=threshold)(record, ours.byte_ends, index)
        for threshold in (0.0, 0.6)
    )
    both = np.isin(low.rows, high.rows)
    assert 0 < both.sum() == len(high.rows) < len(low.rows)
    for a, b in zip(low.topk, high.topk, strict=True):
        np.testing.assert_array_equal(a[both], b)
    with pytest.raises(InputError, match="3 counts"):
        Conditioner(source, target, vocab_map, counts=np.zeros(3))


def test_a_document_with_conditioned_positions():
    source, target = tiny_tokenizer("byte_level"), tiny_tokenizer("spm_bpe")
    theirs, ours = source.encode(TEXT), target.encode(TEXT)
    record, vocab_map = record_of(theirs, source), coarse_map(source, target)
    conditioner = Conditioner(source, target, vocab_map, counts=np.ones(source.vocab_size))
    plain = align_document(record, ours, vocab_map)
    filled = align_document(record, ours, vocab_map, conditioner=conditioner)
    status = filled.arrays["status"]
    assert filled.header["conditioned"] == (status == 2).sum() > 0 == plain.header["conditioned"]
    np.testing.assert_array_equal(filled.arrays["ids"][status == 1], plain.arrays["ids"][status == 1])
    assert (plain.arrays["ids"][status == 2] == -1).all() and (filled.arrays["ids"][status == 2, 0] >= 0).all()
    assert filled.report.aligned + filled.report.conditioned + filled.report.dropped == len(status)
    mass = np.exp(filled.arrays["logprobs"]).sum(1) + np.exp(filled.arrays["residual_logprob"])
    np.testing.assert_allclose(mass[status == 2], 1, rtol=1e-5)


def test_text_that_a_normaliser_folded_is_not_conditioned():
    """Where a token and its stretch of text differ in length nobody knows which bytes were read."""
    source, target = tiny_tokenizer("byte_level_nfc"), tiny_tokenizer("spm_bpe")
    theirs, ours = source.encode("xe\u0301e\u0301"), target.encode("xe\u0301e\u0301")
    record = record_of(theirs, source)
    index = align_positions(theirs.byte_ends, ours.byte_ends)
    conditioner = Conditioner(source, target, coarse_map(source, target), counts=np.ones(source.vocab_size))
    found = conditioner(record, ours.byte_ends, index)
    assert not theirs.exact and (ours.byte_ends[found.rows] <= 1).all()


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_a_chain_is_the_probability_of_the_bytes_of_the_token(source, target):
    source, target = tiny_tokenizer(source), tiny_tokenizer(target)
    theirs, ours = source.encode(TEXT), target.encode(TEXT)
    record, vocab_map = record_of(theirs, source), coarse_map(source, target)
    record["realised_logprob"] = -np.random.default_rng(1).random(len(theirs.tokens)).astype(np.float32)
    aligned = align_document(record, ours, vocab_map, chain=True).arrays
    ends, source_ends, count = ours.byte_ends.tolist(), theirs.byte_ends.tolist(), 0
    index = align_positions(theirs.byte_ends, ours.byte_ends)
    for t, label in enumerate(ours.labels):
        longer = vocab_map.symbol_of_target[label] != label
        if not longer or index[t] < 0 or t + 1 == len(ends) or index[t + 1] < 0:
            assert aligned["chain_logprob"][t] == -np.inf
            continue
        count += 1
        span = range(index[t], index[t + 1])
        assert source_ends[span[0]] == ends[t] and source_ends[span[-1] + 1] == ends[t + 1]
        expected = record["realised_logprob"][list(span)].astype(np.float64).sum()
        np.testing.assert_allclose(aligned["chain_logprob"][t], expected, rtol=1e-4, atol=1e-6)
    assert count > 0
    assert "chain_logprob" not in align_document(record, ours, vocab_map).arrays


def test_no_chain_without_a_boundary_on_both_sides():
    realised = np.log([0.5, 0.25, 0.5])
    index, ends = np.array([0, -1, 2, 2]), np.array([0, 1, 2, 2])
    assert chain_logprobs(realised, index, ends, needed=np.ones(4, bool)).tolist() == [-np.inf] * 4
    found = chain_logprobs(realised, np.array([0, 2]), np.array([0, 2]), needed=np.array([True, True]))
    np.testing.assert_allclose(np.exp(found), [0.125, 0])
    assert chain_logprobs(realised, np.array([0]), np.array([0]), needed=np.array([True])).tolist() == [-np.inf]
