"""FuseChat as one configuration, the committed one; test_pretrain.py carries a small one out."""

import pytest

from fusejax.config import load_config
from fusejax.stages.run import command
from tests.paths import ROOT

SHARED = ROOT.parent / "shared" / "data"
METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "slerp", "varm", "sce")


@pytest.mark.skipif(not SHARED.exists(), reason="needs the text and tokenizers of ../shared")
@pytest.mark.slow
def test_the_committed_configuration_knows_its_text_and_tokenizers(monkeypatch):
    monkeypatch.chdir(ROOT)
    told = command("run", ["configs/fusechat_tiny.yaml", "--dry-run"])
    steps = [step["what"] for step in told.data["dry_run"] if step["stage"] == "pretrain"]
    assert [step.split(",")[0] for step in steps] == ["pivot: llama", "mistral: mistral", "qwen: qwen2", "llama: llama"]
    assert told.data["predicted_capture_bytes"].keys() == {"mistral", "qwen", "llama", "target"}


def test_the_committed_configuration_keeps_its_texts_apart():
    config = load_config(ROOT / "configs" / "fusechat_tiny.yaml")
    assert {merge.method for merge in config.merge} == set(METHODS)
    for ref in (config.target, *config.sources):
        ends = [text.skip + text.limit for text in ref.pretrain.text if text.limit]
        assert max(ends) <= min(text.skip for text in config.corpus.train)
        files = {text.path for text in ref.pretrain.text}
        assert not files & {text.path for text in (*config.corpus.valid, *config.corpus.test)}
