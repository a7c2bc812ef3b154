"""The quickstart in miniature: what it promises to scripts, and that a second call only looks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusejax.cli import main
from fusejax.stages import quickstart as stage
from fusejax.stages.quickstart import FAST, quickstart

TINY = FAST._replace(
    corpus_bytes=150_000, source_bytes=12_000, target_bytes=8_000, fusion_bytes=6_000, eval_bytes=4_000, layers=1
)


@pytest.mark.slow
def test_a_tiny_quickstart_keeps_its_promises(tmp_path, capsys, monkeypatch):
    made = os.environ.get("FUSEJAX_TEST_QUICKSTART")  # scripts/test.sh has made one, which is `--fast`
    place, scale = (Path(made), FAST) if made else (tmp_path, TINY)
    out, cache = place / "run", place / "cache"
    result = quickstart(out, scale=scale, seed=0, cache=cache)
    domains = set(next(iter(result["bits_per_byte"].values())))
    assert len(domains) == 4
    assert "mean" in domains
    names = {f"source:{name}" for name in domains - {"mean"}}
    assert set(result["bits_per_byte"]) == names | {"target", "clm", "fused", "pairwise", "merged", "ensemble"}
    assert result["seconds"] > 0
    assert result["peak_rss_bytes"] > 1e6
    for name in ("report.html", "metrics.jsonl", "result.json", "config.yaml"):
        assert (out / name).stat().st_size > 0
    assert len(list((out / "plots").glob("*.svg"))) >= 3
    assert json.loads((out / "result.json").read_text())["export"] == result["export"]
    capsys.readouterr()
    assert main(["verify", str(out), "--json"]) == 0

    # Sources differ in tokenizer and architecture, as promised.
    configs = [json.loads(path.read_text()) for path in cache.glob("*/config.json")]
    assert {config["model_type"] for config in configs} == {"llama", "mistral"}
    assert len({config["num_key_value_heads"] for config in configs}) > 1
    assert any(config.get("sliding_window") for config in configs)

    def never(*_, **__):
        raise AssertionError("a finished model was trained again")

    monkeypatch.setattr(stage, "pretrain", never)
    again = quickstart(out, scale=scale, seed=0, cache=cache)
    assert again["bits_per_byte"] == result["bits_per_byte"]


@pytest.mark.slow
def test_the_export_is_a_hugging_face_model(tmp_path):
    """Read back by another library, in a process of its own where torch may be missing."""
    pytest.importorskip("torch")
    quickstart(tmp_path / "run", scale=TINY, seed=0, cache=tmp_path / "cache")
    code = (
        "import sys, torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)\n"
        "assert not info['missing_keys'] and not info['unexpected_keys'], info\n"
        "ids = AutoTokenizer.from_pretrained(sys.argv[1])('int main(void)', return_tensors='pt').input_ids\n"
        "assert torch.isfinite(model(ids).logits).all()\n"
    )
    export = str(tmp_path / "run" / "export")
    subprocess.run([sys.executable, "-c", code, export], check=True, timeout=300)
