"""The capture stage: any mesh gives the same records, a wrong tokenizer stops it, its size is known before."""

import json

import numpy as np
import pytest

from fusejax.config import CaptureConfig, MeshConfig
from fusejax.data.interchange import read_parquet
from fusejax.errors import InputError
from fusejax.io.models import open_model
from fusejax.io.store import RecordReader
from fusejax.io.tokenizer_probe import PROBES, probe_tokenizer
from fusejax.io.tokenizers import load_tokenizer
from fusejax.sources.capture import capture_shard
from fusejax.sources.open import jax_score
from fusejax.stages.capture_size import predicted_bytes, store_bytes
from fusejax.stages.context import Run
from fusejax.stages.corpus_size import planned_text
from fusejax.stages.inspect import command as inspect
from fusejax.stages.run import command, run_stages
from tests.stages.tiny import make_config, make_model, texts


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A captured source of a run that has no other stage done."""
    root = tmp_path_factory.mktemp("capture")
    config = make_config(root, sources=[str(root / "b")], fusions=[{"name": "fused"}], merge=None)
    run = Run(config)
    planned = planned_text(run)
    assert (planned.scale, planned.exact, planned.note) == (1.0, True, "")
    before = planned.documents
    size = predicted_bytes(run, config.sources[0], before, tokenizer=run.tokenizer(config.sources[0]))
    run_stages(config, ("prepare", "capture"))
    return config, before, size


def test_eight_devices_capture_what_one_does(tmp_path):
    directory = make_model(tmp_path / "m", kind="byte_bpe", seed=3, num_kv_heads=2, vocab_size=340)
    model, tokenizer = open_model(directory), load_tokenizer(directory)
    documents = tokenizer.encode_batch(texts(9, seed=3))
    shapes = {"top_k": 4, "context": 32, "batch_tokens": 256}
    results = []
    for mesh in (MeshConfig(), MeshConfig(data=2, fsdp=2, tensor=2)):
        score = jax_score(model, top_k=4, valid_vocab=tokenizer.vocab_size, mesh=mesh.model_dump())
        results.append(list(capture_shard(score, documents, row_multiple=mesh.data * mesh.fsdp, **shapes)))
    for one, many in zip(*results, strict=True):
        np.testing.assert_allclose(one.realised_logprob, many.realised_logprob, atol=1e-4)
        np.testing.assert_allclose(one.topk.logprobs, many.topk.logprobs, atol=1e-4)
        np.testing.assert_allclose(one.topk.residual_logprob, many.topk.residual_logprob, atol=1e-4)
        apart = np.diff(one.topk.logprobs, axis=1).max(axis=1, initial=-1) < -1e-3  # no ties, which may swap
        np.testing.assert_array_equal(one.topk.ids[apart], many.topk.ids[apart])
        assert apart.any()


def test_the_size_is_predicted_within_a_tenth(material):
    config, before, size = material
    run = Run(config)
    directory = run.captured_dir("b")
    made = sum(path.stat().st_size for path in directory.glob("*.array_record"))
    assert abs(size / made - 1) < 0.1
    assert [d.id for d in before] == [record.doc_id for record in RecordReader(directory)]
    assert [d.id for d in planned_text(run).documents] == [d.id for d in before]


def test_the_dry_run_says_the_size(material, tmp_path):
    config, _, size = material
    from fusejax.config import save_config

    save_config(config, tmp_path / "run.yaml")
    found = command("run", [str(tmp_path / "run.yaml"), "--dry-run"])
    assert found.data["predicted_capture_bytes"] == {"b": size}
    assert f"about {size / 1e6:.1f} MB" in found.text


def test_sizes_of_the_codecs():
    sizes = {
        codec: store_bytes([400] * 256, top_k=10, vocab_size=32000, codec=codec, shard_size=256)
        for codec in ("compact", "float16", "float32")
    }
    assert sizes["compact"] < 0.5 * sizes["float16"] < 0.5 * sizes["float32"]
    wide = store_bytes([400] * 256, top_k=10, vocab_size=300_000, codec="compact", shard_size=256)
    assert wide - sizes["compact"] == pytest.approx(10 * 400 * 256, abs=2**16)


def test_the_manifest_names_the_codec(material):
    config, _, _ = material
    reader = RecordReader(Run(config).captured_dir("b"))
    assert reader.manifest.settings["codec"] == "compact"
    assert reader.manifest.facts["positions"] == reader.lengths.sum() > 0
    assert CaptureConfig(codec="float16").dtype == "float16"
    assert CaptureConfig.model_validate({"dtype": "float16"}).codec == "float16"


def test_inspect_shows_a_record_and_joins_the_shards(material):
    reader = RecordReader(Run(material[0]).captured_dir("b"))
    found = inspect("inspect", [str(reader.directory), "--record", "3"])
    shards = sum(name.endswith(".array_record") for name in found.data["files"])
    lines = found.text.splitlines()
    assert shards > 1
    assert any(line.startswith(f'  {shards} shards: {{"records": {len(reader)}, "bytes": ') for line in lines)
    assert not any("records-0000" in line for line in lines)
    assert {"kind: captured", "  top_k: 4", f"  doc_id: {reader[3].doc_id}"} <= set(lines)
    assert any(line.startswith('    topk_ids: {"dtype": "int32"') for line in lines)


def test_inspect_says_how_much_lies_outside_the_entries(material):
    reader = RecordReader(Run(material[0]).captured_dir("b"))
    found = inspect("inspect", [str(reader.directory), "--mass"]).data["mass_outside"]
    stored = [1 - np.exp(r.arrays["topk_logprobs"].astype(np.float64)).sum(axis=1) for r in reader]
    assert found["positions"] == sum(map(len, stored)) == reader.lengths.sum()
    assert found["mean"] == pytest.approx(np.concatenate(stored).mean(), abs=1e-3)
    assert 0 <= found["10%"] <= found["50%"] <= found["90%"] <= 1
    with pytest.raises(InputError, match="'corpus' artefact"):
        inspect("inspect", [str(Run(material[0]).corpus_dir), "--mass"])


def test_inspect_writes_parquet(material, tmp_path):
    reader = RecordReader(Run(material[0]).captured_dir("b"))
    found = inspect("inspect", [str(reader.directory), "--to-parquet", str(tmp_path / "b.parquet")])
    assert found.data["parquet"]["rows"] == len(reader)
    for record, again in zip(reader, read_parquet(tmp_path / "b.parquet"), strict=True):
        assert again.doc_id == record.doc_id
        np.testing.assert_array_equal(again.arrays["topk_ids"], record.arrays["topk_ids"])
    with pytest.raises(InputError, match="'corpus' artefact"):
        inspect("inspect", [str(Run(material[0]).corpus_dir), "--to-parquet", str(tmp_path / "c.parquet")])


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "spm_bpe"])
def test_our_tokenizers_agree_with_transformers(tmp_path, kind):
    directory = make_model(tmp_path / "m", kind=kind, seed=2)
    assert probe_tokenizer(load_tokenizer(directory)) == ""


def test_a_tokenizer_that_transformers_reads_otherwise_stops_the_capture(tmp_path):
    directory = make_model(tmp_path / "m", kind="byte_bpe", seed=2)
    tokenizer = load_tokenizer(directory)
    path = directory / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"other ids than AutoTokenizer(?s:.*)tokenizer.json: \[(?s:.*)AutoTokenizer:"):
        probe_tokenizer(tokenizer)
    assert any(probe != probe.lower() for probe in PROBES)


def test_a_tokenizer_that_transformers_cannot_load_is_said(tmp_path):
    directory = make_model(tmp_path / "m", kind="byte_bpe", seed=2)
    tokenizer = load_tokenizer(directory)
    (directory / "tokenizer.json").write_text("{}")
    (directory / "tokenizer_config.json").write_text("{}")
    assert "ids were not compared" in probe_tokenizer(tokenizer)
