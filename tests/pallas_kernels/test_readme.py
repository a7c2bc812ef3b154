"""The README's Python runs, in order, beside a checkpoint."""

import numpy as np
from safetensors.numpy import save_file

from tests.paths import ROOT
from tests.repo.markdown import links, snippets

README = ROOT / "pallas_kernels" / "README.md"


def test_snippets_run_in_order(tmp_path, monkeypatch):
    (tmp_path / "checkpoint").mkdir()
    head = np.random.default_rng(0).normal(size=(1024, 32)).astype(np.float32)
    tensors = {"lm_head.weight": head, "model.embed_tokens.weight": head[::-1].copy()}
    save_file(tensors, tmp_path / "checkpoint" / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for number, code in enumerate(snippets(README, "python"), start=1):
        assert len([line for line in code.splitlines() if line.strip()]) <= 21
        exec(compile(code, f"pallas_kernels/README.md, Python snippet {number}", "exec"), names)
    assert names["hf_per_token"].clm.shape == (64,)
    for loss in ("loss", "flax_loss", "hf_loss"):
        assert 0 < float(names[loss]) < 40
    assert names["gradients"][1].shape == (32, 1000)
    assert names["per_token"].clm.shape == (64,)
    assert not [link for link in links(README) if not (README.parent / link).exists()]
