"""The papers' alignment through a whole run: strings by dynamic time warping, maps, fallbacks, training."""

import json

import numpy as np
import pytest

from fusejax.config import FusionConfig
from fusejax.data.corpus import read_corpus
from fusejax.errors import InputError
from fusejax.io.manifest import read_manifest
from fusejax.io.store import Record, RecordReader, RecordWriter
from fusejax.stages import align_papers
from fusejax.stages.align import VOCABULARY
from fusejax.stages.context import Run
from fusejax.stages.fuse import fuse_document
from fusejax.stages.run import run_stages
from tests.stages.tiny import make_config

FUSIONS = [{"name": "fused", "score": "token_ce", "window_bytes": None}]
TRAIN = {"batch_size": 4, "seq_len": 32, "learning_rate": 1e-2, "max_steps": 2, "log_every": 1, "baseline": False}


def capture_by_hand(run, name, top_k=4):
    """A captured source whose distributions are random and hold the true next token; no model is run."""
    tokenizer = run.tokenizer(run.participants[name])
    settings = {"tokenizer": tokenizer.fingerprint}
    parents = {"corpus": read_manifest(run.corpus_dir).fingerprint}
    writer = RecordWriter(run.captured_dir(name), kind="captured", settings=settings, parents=parents, shard_size=8)
    rng = np.random.default_rng(0)
    for document in read_corpus(run.corpus_dir, "train"):
        encoded = tokenizer.encode(document.text)
        count = len(encoded.tokens)
        ids = np.stack([rng.permutation(tokenizer.vocab_size)[:top_k] for _ in range(count)]).astype(np.int32)
        ids[:, 0] = np.where((ids == encoded.labels[:, None]).any(axis=1), ids[:, 0], encoded.labels)
        shares = -np.sort(-rng.dirichlet(np.ones(top_k + 1), count), axis=1)
        arrays = {
            "tokens": encoded.tokens,
            "labels": encoded.labels,
            "byte_ends": encoded.byte_ends,
            "topk_ids": ids,
            "topk_logprobs": np.log(shares[:, :-1]).astype(np.float32),
            "residual_logprob": np.log(shares[:, -1]).astype(np.float32),
            "realised_logprob": np.log(shares[:, 0]).astype(np.float32),
        }
        writer.write(Record(document.id, {"n_bytes": document.n_bytes, "nll_nats": 0.0}, arrays))
    writer.finish(facts={})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{vocabulary: directory} of runs up to fuse, and one that also trains."""
    made = {}
    for vocabulary in ("exact", "min_ed", "statistics"):
        root = tmp_path_factory.mktemp(vocabulary)
        align = {"positions": "dtw", "vocabulary": vocabulary}
        loss = {"max_members": 4, "tail": "renormalize"}
        config = make_config(root, align=align, merge=None, fusions=FUSIONS, train=TRAIN, loss=loss)
        run = Run(config)
        run_stages(config, ("prepare",))
        for name in ("a", "b"):
            capture_by_hand(run, name)
        stages = ("align", "fuse", "train") if vocabulary == "min_ed" else ("align", "fuse")
        run_stages(config, stages)
        made[vocabulary] = root / "run"
    return made


@pytest.mark.parametrize("vocabulary", ["exact", "min_ed", "statistics"])
@pytest.mark.parametrize("name", ["a", "b"])
def test_records(runs, vocabulary, name):
    directory = runs[vocabulary] / "aligned" / name
    with np.load(directory / VOCABULARY, allow_pickle=False) as maps:
        table, symbols = maps["symbol_of_source"], maps["symbol_of_target"]
    np.testing.assert_array_equal(symbols, np.arange(len(symbols)))
    assert table.max() < len(symbols)
    statuses = np.zeros(4, int)
    for record in RecordReader(directory, kind="aligned"):
        arrays = record.arrays
        status, ids, logprobs = arrays["status"], arrays["ids"], arrays["logprobs"].astype(np.float64)
        statuses += np.bincount(status, minlength=4)
        one_hot = status == 3
        assert record.header["one_hot"] == one_hot.sum()
        np.testing.assert_array_equal(ids[one_hot, 0], arrays["labels"][one_hot])
        assert (logprobs[one_hot, 0] == 0).all() and (ids[one_hot, 1:] == -1).all()
        total = np.exp(logprobs).sum(axis=1) + np.exp(arrays["residual_logprob"].astype(np.float64))
        np.testing.assert_allclose(total, 1, atol=0.01)
    assert statuses[1] > 0 and statuses[3] > 0 and statuses[2] == 0
    facts = read_manifest(directory).facts
    assert facts["aligned"] == statuses[1]
    assert facts["one_hot"] == statuses[3]


def test_maps_reach_further_than_equal_spellings(runs):
    mapped = {}
    for vocabulary, directory in runs.items():
        with np.load(directory / "aligned" / "b" / VOCABULARY, allow_pickle=False) as maps:
            mapped[vocabulary] = int((maps["symbol_of_source"] >= 0).sum())
    assert mapped["exact"] < mapped["min_ed"] and mapped["exact"] <= mapped["statistics"]


def test_it_trains(runs):
    lines = [
        json.loads(line) for line in (runs["min_ed"] / "train" / "fused" / "metrics.jsonl").read_text().splitlines()
    ]
    assert lines
    assert all(np.isfinite(value) for line in lines for value in line.values() if isinstance(value, float))


def test_avg_ce_by_the_papers_reward(runs):
    directory = runs["min_ed"] / "aligned"
    records = [RecordReader(directory / name, kind="aligned")[0] for name in ("a", "b")]
    base = {"method": "avg_ce", "score": "token_ce", "window_bytes": None}
    flat = fuse_document(records, FusionConfig.model_validate(base | {"reward": "exp"}))
    sharp = fuse_document(records, FusionConfig.model_validate(base))
    ce = np.array([-record.arrays["source_realised"].astype(np.float64).mean() for record in records])
    both = (flat["partition"] >= 0).all(axis=1)
    for fused, ranked in ((flat, np.exp(-ce)), (sharp, -ce)):
        wanted = np.exp(ranked) / np.exp(ranked).sum()
        np.testing.assert_allclose(fused["weights"][both], np.broadcast_to(wanted, (both.sum(), 2)), rtol=1e-3)


def test_impossible_settings(tmp_path):
    for align in ({"positions": "dtw"}, {"vocabulary": "statistics"}, {"positions": "dtw", "chain": True}):
        with pytest.raises(ValueError, match="positions"):
            make_config(tmp_path, align={"vocabulary": "exact"} | align if "chain" in align else align)


def test_documents_too_long_for_the_program(runs, monkeypatch):
    monkeypatch.setattr(align_papers, "MAX_CELLS", 10)
    with pytest.raises(InputError, match="max_document_bytes"):
        align_papers._warp(lambda a, b: None, np.zeros(4), np.zeros(4), "doc")  # type: ignore[arg-type]
