"""Transport against a slow dictionary oracle in float64, and whole documents."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.alignment import align_document, align_positions, coarse_map, summary, transport
from fusejax.errors import InputError
from fusejax.types import TopK, VocabMap
from tests.alignment.tiny_tokenizers import TEXT, tiny_tokenizer


def oracle(source, alignment, symbols, entries):
    """One position at a time, one dictionary each."""
    rows = []
    for index in alignment:
        if index < 0:
            rows.append(([], 1.0))
            continue
        mass, rest = {}, np.exp(np.float64(source.residual_logprob[index]))
        for token, logprob in zip(source.ids[index], source.logprobs[index], strict=True):
            if token >= 0:
                symbol, p = int(symbols[token]), float(np.exp(np.float64(logprob)))
                if symbol < 0:
                    rest += p
                elif p > 0:
                    mass[symbol] = mass.get(symbol, 0.0) + p
        ranked = sorted(mass.items(), key=lambda item: (-np.float32(item[1]), item[0]))
        rows.append((ranked[:entries], rest + sum(p for _, p in ranked[entries:])))
    return rows


def random_topk(rng, positions, width, vocab, dtype=np.float32):
    """Distinct ids per row, falling probabilities, some unused entries."""
    ids = np.stack([rng.choice(vocab, width, replace=False) for _ in range(positions)]) if positions else None
    ids = np.zeros((0, width), np.int32) if ids is None else ids.astype(np.int32)
    p = rng.dirichlet(np.full(width + 1, 0.5), positions)
    p[:, :width] = -np.sort(-p[:, :width], axis=1)
    logprobs = np.log(np.maximum(p, 1e-30)).astype(dtype)
    unused = rng.random((positions, width)) < 0.1
    ids[unused], logprobs[:, :width][unused] = -1, -np.inf
    return TopK(ids, logprobs[:, :width], logprobs[:, width])


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    width=st.integers(1, 12),
    positions=st.integers(0, 6),
    kept=st.one_of(st.none(), st.integers(1, 14)),
)
def test_against_the_oracle(dtype, seed, width, positions, kept):
    rng = np.random.default_rng(seed)
    source = random_topk(rng, positions, width, 20, dtype)
    symbols = rng.integers(-1, 6, 20).astype(np.int32)
    alignment = rng.integers(-1, positions, 9) if positions else np.full(9, -1)
    moved = transport(source, alignment, VocabMap(symbols, np.arange(6, dtype=np.int32)), max_entries=kept)
    entries = width if kept is None else kept
    assert moved.ids.shape == moved.logprobs.shape == (9, entries) and moved.residual_logprob.shape == (9,)
    assert moved.ids.dtype == np.int32 and moved.logprobs.dtype == np.float32
    for t, (ranked, rest) in enumerate(oracle(source, alignment, symbols, entries)):
        used = moved.ids[t] >= 0
        assert moved.ids[t][used].tolist() == [symbol for symbol, _ in ranked]
        np.testing.assert_allclose(np.exp(moved.logprobs[t][used]), [p for _, p in ranked], rtol=3e-6)
        np.testing.assert_allclose(np.exp(np.float64(moved.residual_logprob[t])), rest, rtol=3e-6)
        assert np.isneginf(moved.logprobs[t][~used]).all() and not used[used.sum() :].any()


def test_mass_is_kept_and_unaligned_positions_are_empty():
    rng = np.random.default_rng(0)
    source = random_topk(rng, 40, 8, 30)
    moved = transport(source, np.array([3, -1, 39]), VocabMap(rng.integers(-1, 5, 30), np.arange(5)), max_entries=2)
    total = np.exp(moved.logprobs.astype(np.float64)).sum(1) + np.exp(moved.residual_logprob.astype(np.float64))
    before = np.exp(source.logprobs.astype(np.float64)).sum(1) + np.exp(source.residual_logprob.astype(np.float64))
    np.testing.assert_allclose(total, [before[3], 1, before[39]], rtol=1e-6)
    assert (moved.ids[1] == -1).all() and np.isneginf(moved.logprobs[1]).all() and moved.residual_logprob[1] == 0


def test_equal_vocabularies_change_nothing():
    source = random_topk(np.random.default_rng(1), 30, 6, 50)
    order = np.argsort(-source.logprobs, axis=1, kind="stable")
    moved = transport(source, np.arange(30), VocabMap(np.arange(50), np.arange(50)))
    np.testing.assert_allclose(moved.logprobs, np.take_along_axis(source.logprobs, order, 1), rtol=1e-6)
    np.testing.assert_allclose(moved.residual_logprob, source.residual_logprob, rtol=1e-6, atol=1e-7)


def test_disagreeing_inputs_are_refused():
    source = random_topk(np.random.default_rng(2), 3, 4, 10)
    identity = VocabMap(np.arange(10), np.arange(10))
    with pytest.raises(InputError, match="position 5"):
        transport(source, np.array([5]), identity)
    with pytest.raises(InputError, match="vocabulary map knows 2"):
        transport(source, np.array([0]), VocabMap(np.arange(2), np.arange(2)))
    with pytest.raises(InputError, match="expected"):
        transport(source._replace(residual_logprob=np.zeros(7)), np.array([0]), identity)


def test_speed_floor():
    """200k positions a second at K = 10 is the target; the floor here only catches a lost vectorisation."""
    rng = np.random.default_rng(3)
    count = 20_000
    ids = rng.integers(0, 32_000, (count, 10)).astype(np.int32)
    logprobs = np.sort(np.log(rng.dirichlet(np.ones(11), count)).astype(np.float32), axis=1)[:, ::-1]
    source = TopK(ids, logprobs[:, :10], logprobs[:, 10])
    table = VocabMap(rng.integers(-1, 20_000, 32_000).astype(np.int32), np.arange(20_000))
    start = time.perf_counter()
    transport(source, np.arange(count), table)
    assert count / (time.perf_counter() - start) > 50_000


def captured(document, rng, width, vocab):
    """A captured record with random distributions whose first entry is the true next token."""
    topk = random_topk(rng, len(document.tokens), width, vocab)
    topk.ids[:, 0], topk.logprobs[:, 0] = document.labels, np.log(0.5)
    return {
        "tokens": document.tokens,
        "labels": document.labels,
        "byte_ends": document.byte_ends,
        "topk_ids": topk.ids,
        "topk_logprobs": topk.logprobs,
        "residual_logprob": topk.residual_logprob,
        "realised_logprob": np.full(len(document.tokens), np.log(0.5), np.float32),
    }


def test_a_whole_document():
    source, target = tiny_tokenizer("byte_level"), tiny_tokenizer("spm_bpe")
    theirs, ours = source.encode(TEXT), target.encode(TEXT)
    record = captured(theirs, np.random.default_rng(4), 5, source.vocab_size)
    vocab_map = coarse_map(source, target)
    aligned = align_document(record, ours, vocab_map, n_bytes=theirs.n_bytes, dtype="float16", doc_id="castle")
    arrays, count = aligned.arrays, len(ours.tokens)
    assert {key: value.dtype.name for key, value in arrays.items()} == {
        "tokens": "int32",
        "labels": "int32",
        "byte_ends": "int32",
        "ids": "int32",
        "logprobs": "float16",
        "residual_logprob": "float16",
        "status": "int8",
        "source_byte_ends": "int32",
        "source_realised": "float32",
    }
    assert all(len(arrays[key]) == count for key in ("tokens", "ids", "logprobs", "residual_logprob", "status"))
    index = align_positions(theirs.byte_ends, ours.byte_ends)
    np.testing.assert_array_equal(arrays["status"], (index >= 0).astype(np.int8))
    # The true next token of the source has half the mass: its symbol leads wherever it exists.
    expected = vocab_map.symbol_of_source[theirs.labels[index[index >= 0]]]
    np.testing.assert_array_equal(arrays["ids"][index >= 0, 0], expected)
    assert aligned.header["aligned"] + aligned.header["dropped"] == count
    np.testing.assert_allclose(aligned.header["source_nll_nats"], len(theirs.tokens) * np.log(2), rtol=1e-6)
    row = summary([aligned.report, aligned.report])
    assert row["documents"] == 2 and row["positions"] == 2 * count and 0 < row["mass_kept"] <= 1 + 1e-6
    assert row["worst_spans"][0]["doc_id"] == "castle"


def test_empty_document_and_changed_text():
    source, target = tiny_tokenizer("byte_level"), tiny_tokenizer("spm_bpe")
    record = captured(source.encode(""), np.random.default_rng(5), 5, source.vocab_size)
    vocab_map = coarse_map(source, target)
    aligned = align_document(record, target.encode(""), vocab_map)
    assert aligned.arrays["status"].tolist() == [1] and aligned.arrays["ids"][0, 0] == target.eos_id
    with pytest.raises(InputError, match="captured with 7 bytes"):
        align_document(record, target.encode("abc"), vocab_map, n_bytes=7)
    with pytest.raises(InputError, match="no document"):
        summary([])
