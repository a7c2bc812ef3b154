"""Whole distributions and the rivals' losses through a run in miniature: captured, aligned, fused, trained."""

import json

import numpy as np
import pytest

from fusejax.config import RunConfig
from fusejax.io.manifest import read_manifest
from fusejax.io.store import RecordReader
from fusejax.stages.context import Run
from fusejax.stages.run import run_stages
from tests.stages.tiny import make_config

BEFORE = ("prepare", "capture")
AFTER = ("align", "fuse", "train")
TRAIN = {"batch_size": 4, "seq_len": 32, "learning_rate": 1e-2, "max_steps": 2, "log_every": 1, "baseline": False}
ULD = {"align": {"positions": "index", "vocabulary": "exact"}, "loss": {"divergence": "uld", "unsupervised": "none"}}
ALM = {"align": {"positions": "chunks", "vocabulary": "exact"}, "loss": {"divergence": "alm", "temperature": 10.0}}


def tiny_config(root, **changes) -> RunConfig:
    """Two sources whose whole distributions are captured, one fusion, two steps, no baseline."""
    fusions = [{"name": "fused", "window_bytes": 32}]
    capture = {"top_k": "all", "context": 32, "batch_tokens": 256, "shard_size": 8}
    return make_config(root, **({"fusions": fusions, "merge": None, "train": TRAIN, "capture": capture} | changes))


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """A root where two sources are captured."""
    root = tmp_path_factory.mktemp("captured")
    run_stages(tiny_config(root), BEFORE)
    return root


def _continued(captured, changes, stages=AFTER):
    """The same run with other settings behind the capture."""
    config = tiny_config(captured, **changes)
    run_stages(config, stages)
    return Run(config)


def _trained(run) -> dict:
    """The last line of the training's metrics."""
    lines = (run.train_dir("fused") / "metrics.jsonl").read_text().splitlines()
    return json.loads(lines[-1])


def test_whole_distributions_are_captured(captured):
    reader = RecordReader(captured / "run" / "captured" / "a", kind="captured")
    vocab = reader[0].arrays["topk_ids"].shape[1]
    assert vocab > 300
    for record in reader:
        ids, logprobs = record.arrays["topk_ids"], record.arrays["topk_logprobs"]
        np.testing.assert_array_equal(np.sort(ids, axis=1), np.tile(np.arange(vocab), (len(ids), 1)))
        assert (record.arrays["residual_logprob"] == -np.inf).all()
        np.testing.assert_allclose(np.exp(logprobs.astype(float)).sum(1), 1, atol=1e-5)
        of_label = logprobs[np.arange(len(ids)), np.argmax(ids == record.arrays["labels"][:, None], axis=1)]
        np.testing.assert_allclose(of_label, record.arrays["realised_logprob"], atol=0.02)


@pytest.mark.slow
def test_whole_distributions_are_trained_on(captured):
    run = _continued(captured, {"loss": {"unsupervised": "none"}})
    last = _trained(run)
    assert last["step"] == 2 and 0 < last["fusion_nats"] < 20 and last["folded_events"] == 0
    assert read_manifest(run.model_dir("fused")).settings["loss"]["unsupervised"] == "none"


def _rows(run, name):
    """(captured, aligned) arrays of every document of a source."""
    readers = (RecordReader(run.captured_dir(name)), RecordReader(run.aligned_dir(name)))
    return [tuple(reader[i].arrays for reader in readers) for i in range(len(readers[0]))]


@pytest.mark.slow
def test_uld_pairs_positions_by_number(captured):
    run = _continued(captured, ULD)
    for source, aligned in _rows(run, "a"):
        shorter = min(len(source["tokens"]), len(aligned["tokens"]))
        assert (aligned["status"] == (np.arange(len(aligned["tokens"])) < shorter)).all()
        np.testing.assert_array_equal(
            aligned["ids"][:shorter], np.tile(np.arange(aligned["ids"].shape[1]), (shorter, 1))
        )
        assert (aligned["ids"][shorter:] == -1).all() and (aligned["logprobs"][shorter:] == -np.inf).all()
        np.testing.assert_allclose(
            np.exp(aligned["logprobs"][:shorter]), np.exp(source["topk_logprobs"][:shorter]), atol=1e-4
        )
    last = _trained(run)
    assert 0 < last["fusion_nats"] <= 2 and 0 < last["supervised_tokens"] <= last["tokens"]


@pytest.mark.slow
def test_alm_compares_chunks(captured):
    run = _continued(captured, ALM)
    chunks = 0
    for source, aligned in _rows(run, "a"):
        ends = np.flatnonzero(aligned["status"])
        lengths, bounds = aligned["ids"][ends, 0], aligned["byte_ends"]
        own = np.concatenate([[0.0], np.cumsum(source["realised_logprob"].astype(np.float64))])
        for end, length, said in zip(ends, lengths, aligned["logprobs"][ends, 0], strict=True):
            first, after = (
                np.searchsorted(source["byte_ends"], bounds[at], side="right") - 1 for at in (end + 1 - length, end + 1)
            )
            assert (
                source["byte_ends"][first] == bounds[end + 1 - length] and source["byte_ends"][after] == bounds[end + 1]
            )
            inside = set(source["byte_ends"][first + 1 : after]) & set(bounds[end + 2 - length : end + 1])
            assert not inside  # it is a smallest chunk
            np.testing.assert_allclose(said, own[after] - own[first], rtol=2e-3, atol=2e-2)
        chunks += len(ends)
    assert chunks > 100
    fused = RecordReader(run.fused_dir("fused"), kind="fused")
    assert set(np.concatenate([record.arrays["partition"].ravel() for record in fused])) == {-1, 0, 1}
    last = _trained(run)
    assert last["fusion_nats"] > 0 and 0 < last["supervised_tokens"] <= last["tokens"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": {"divergence": "uld"}}, "need each other"),
        (ULD | {"loss": {}}, "got kl, index"),
        (ULD | {"align": {"positions": "index"}}, "set vocabulary exact"),
        (ALM | {"loss": {"divergence": "alm", "tail": "zero"}}, "leave tail at bucket"),
        (ALM | {"mesh": {"tensor": 2}}, "set mesh.tensor 1"),
        ({"mesh": {"tensor": 2}}, "capture.top_k all is trained"),
    ],
    ids=str,
)
def test_what_does_not_belong_together_is_refused(tmp_path, changes, told):
    with pytest.raises(ValueError, match=told):
        tiny_config(tmp_path, **changes)
