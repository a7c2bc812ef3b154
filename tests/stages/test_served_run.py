"""A whole run whose source is served: only its tokenizer lies here."""

import json

from fusejax.config import RunConfig
from fusejax.io.store import RecordReader
from fusejax.io.tokenizers import load_tokenizer
from fusejax.stages.run import run_stages
from tests.sources.fake_server import FakeModel, serving
from tests.stages.tiny import make_model, texts, write_jsonl


def test_a_served_source_goes_through_all_stages(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    for seed, name in enumerate(("served", "target")):
        make_model(tmp_path / name, kind="byte_bpe", seed=seed)
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "served" / name).unlink()
    data = write_jsonl(tmp_path / "train.jsonl", texts(40, seed=1))
    with serving(FakeModel(load_tokenizer(tmp_path / "served").vocab_size)) as url:
        values = {
            "output": str(tmp_path / "run"),
            "target": str(tmp_path / "target"),
            "sources": [{"model": str(tmp_path / "served"), "url": url}],
            "corpus": {"train": [{"path": str(data)}], "valid_fraction": 0.2, "test_fraction": 0.2},
            "capture": {"top_k": 4, "context": 32, "batch_tokens": 64, "shard_size": 4},
            "train": {"batch_size": 4, "seq_len": 32, "max_steps": 1, "baseline": False},
            "evaluate": {"context": 32, "batch_tokens": 128},
        }
        config = RunConfig.model_validate(values)
        run_stages(config, ("prepare", "capture", "align", "fuse", "train", "evaluate"))
    table = json.loads((tmp_path / "run" / "result.json").read_text())["bits_per_byte"]
    assert list(table) == ["source:served", "target", "fused", "ensemble"]
    run_stages(config, ("capture", "evaluate"))  # finished: no server is asked
    assert len(list(RecordReader(tmp_path / "run" / "captured" / "served", kind="captured"))) > 10
