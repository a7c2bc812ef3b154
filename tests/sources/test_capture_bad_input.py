"""Odd text through the whole capture: what is read back is what the source said, each position at its byte."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.data.corpus import read_corpus
from fusejax.errors import InputError
from fusejax.io.store import Record, RecordReader, RecordWriter
from fusejax.sources.capture import capture_shard, record_of
from fusejax.stages.context import Run
from fusejax.stages.run import run_stages
from fusejax.types import TopK
from tests.alignment.test_bad_input import NAMES, PIECES, texts
from tests.alignment.tiny_tokenizers import tiny_tokenizer
from tests.stages.tiny import make_config

K = 3


def said(tokens, labels):
    """What the stub says at every position: a function of what it reads, as TopK and realised log-probability."""
    first = -0.7 - (tokens % 13) / 10.0
    logprobs = np.stack([first, first - 1.0, first - 2.5], axis=-1).astype(np.float32)
    ids = np.stack([labels, (labels + 1), (labels + 2)], axis=-1).astype(np.int32)
    residual = np.log1p(-np.exp(logprobs.astype(np.float64)).sum(-1)).astype(np.float32)
    return logprobs[..., 0], TopK(ids, logprobs, residual)


def score(tokens, labels, positions, segment_ids):
    return said(tokens, labels)


def stored(documents, directory, *, context=16):
    writer = RecordWriter(directory, kind="captured", settings={}, shard_size=4, codec="compact")
    captured = capture_shard(score, documents, top_k=K, context=context, batch_tokens=8 * context)
    for number, (document, found) in enumerate(zip(documents, captured, strict=True)):
        writer.write(Record(f"{number}/\u05d0\U0001f469", *record_of(document, found)))
    writer.finish()
    return RecordReader(directory)


def check(document, record, n_bytes):
    np.testing.assert_array_equal(record.arrays["tokens"], document.tokens)
    np.testing.assert_array_equal(record.arrays["labels"], document.labels)
    ends = record.arrays["byte_ends"]
    np.testing.assert_array_equal(ends, document.byte_ends)
    assert (np.diff(ends) >= 0).all()
    assert record.header["n_bytes"] == n_bytes
    assert ends.size == 0 or 0 <= ends[0] <= ends[-1] <= n_bytes
    assert record.header["exact"] == document.exact
    realised, topk = said(document.tokens, document.labels)
    np.testing.assert_array_equal(record.arrays["topk_ids"], topk.ids)
    np.testing.assert_allclose(record.arrays["topk_logprobs"], topk.logprobs, atol=0.03)
    np.testing.assert_allclose(record.arrays["realised_logprob"], realised, atol=2e-3)
    assert record.header["nll_nats"] == pytest.approx(-float(realised.sum()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(found=st.lists(texts, min_size=1, max_size=5))
def test_any_text_is_read_back_from_the_store(name, found):
    documents = tiny_tokenizer(name).encode_batch(found)
    with tempfile.TemporaryDirectory() as root:
        reader = stored(documents, Path(root) / "a")
        assert len(reader) == len(found)
        np.testing.assert_array_equal(reader.lengths, [len(document.tokens) for document in documents])
        for text, document, record in zip(found, documents, reader, strict=True):
            check(document, record, len(text.encode()))


@pytest.mark.parametrize("name", ["byte_level", "spm_bpe"])
@pytest.mark.parametrize("letter", ["a", "\x00", "\U0001f469"], ids=["letter", "nul", "emoji"])
def test_a_megabyte_without_a_space(tmp_path, name, letter):
    text = letter * (2**20 // len(letter.encode()))
    (document,) = tiny_tokenizer(name).encode_batch([text])
    (record,) = stored([document], tmp_path / "a", context=2048)
    check(document, record, 2**20)


def test_odd_documents_through_the_stages(tmp_path):
    config = make_config(tmp_path, merge=None, fusions=[{"name": "fused"}], sources=[str(tmp_path / "a")])
    found = [f"{i} {piece} and {piece}{piece}" for i, piece in enumerate(PIECES)] + ["", "x" * 9000]
    lines = (json.dumps({"id": f"odd {i}", "text": text}) for i, text in enumerate(found))
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    run_stages(config, ("prepare", "capture", "align"))
    run = Run(config)
    documents = read_corpus(run.corpus_dir, "train")
    assert any("\x00" in d.text for d in documents)
    assert sum(d.id.startswith("words/odd") and "#" in d.id for d in documents) == 2
    encoded = run.tokenizer(config.sources[0]).encode_batch([d.text for d in documents])
    reader = RecordReader(run.captured_dir("a"))
    assert len(reader) == len(RecordReader(run.aligned_dir("a"))) == len(documents)
    for document, tokens, record in zip(documents, encoded, reader, strict=True):
        assert record.doc_id == document.id
        np.testing.assert_array_equal(record.arrays["labels"], tokens.labels)
        assert np.isfinite(record.arrays["realised_logprob"]).all()
        assert (record.header["n_bytes"], record.header["exact"]) == (document.n_bytes, tokens.exact)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "half \\ud83d of a pair"}', r"train\.jsonl:1: field 'text' holds half of a surrogate pair"),
        (b'{"text": "latin \xe9"}', r"train\.jsonl is not UTF-8: byte 0xe9 at byte offset 16"),
    ],
    ids=["surrogate", "invalid UTF-8"],
)
def test_what_is_no_text_is_refused_before_capture(tmp_path, line, message):
    config = make_config(tmp_path, merge=None, fusions=[{"name": "fused"}])
    (tmp_path / "train.jsonl").write_bytes(line + b"\n")
    with pytest.raises(InputError, match=message):
        run_stages(config, ("prepare", "capture"))
    assert not (tmp_path / "run" / "corpus").exists()
    assert not (tmp_path / "run" / "captured").exists()
