"""The training stage: what weights are trained in, and which artefacts it refuses to read."""

import dataclasses
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.io.hf import load_hf_model, save_hf_model
from fusejax.io.models import open_model
from fusejax.stages import train as stage
from fusejax.stages.run import run_stages
from fusejax.types import TrainState
from tests.stages.tiny import make_config, texts, write_jsonl

BEFORE = ("prepare", "capture", "align", "fuse")


@pytest.fixture
def config(tmp_path):
    config = make_config(tmp_path, merge=None, fusions=[{"name": "fused", "sources": ["a"]}])
    return config.model_copy(
        update={"sources": config.sources[:1], "train": config.train.model_copy(update={"baseline": False})}
    )


def test_narrow_weights_are_trained_in_float32_and_kept_narrow(config, tmp_path, monkeypatch):
    model, params = load_hf_model(tmp_path / "target")
    narrow = jax.tree.map(lambda leaf: leaf.astype(ml_dtypes.bfloat16), params)
    save_hf_model(
        tmp_path / "narrow", dataclasses.replace(model, dtype="bfloat16"), narrow, tokenizer_dir=tmp_path / "target"
    )
    config = config.model_copy(update={"target": config.target.model_copy(update={"model": str(tmp_path / "narrow")})})
    run_stages(config, BEFORE)
    seen = []

    def fit(label, start, *rest, **options):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(start))
        return SimpleNamespace(state=TrainState(1, start, ()), compile_seconds=0.0, peak_bytes=0)

    monkeypatch.setattr(stage, "fit", fit)
    run_stages(config, ("train",))
    assert set(seen) == {np.dtype(np.float32)}
    kept = open_model(tmp_path / "run" / "models" / "fused").params
    for a, b in zip(jax.tree.leaves(narrow), jax.tree.leaves(kept), strict=True):
        assert b.dtype == a.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_model_trained_with_narrow_weights_is_written_from_its_float32_copy(config, tmp_path):
    memory = config.memory.model_copy(update={"param_dtype": "bfloat16", "moments_dtype": "bfloat16"})
    run_stages(config.model_copy(update={"memory": memory}), (*BEFORE, "train"))
    kept = open_model(tmp_path / "run" / "models" / "fused").params
    leaf = kept["embed"]["embedding"]
    assert leaf.dtype == np.float32 and np.any(leaf != leaf.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_fused_targets_of_another_configuration_or_text_are_refused(config, tmp_path):
    run_stages(config, BEFORE)
    fusion = config.fusions[0].model_copy(update={"window_bytes": 16})
    with pytest.raises(InputError, match=r"window_bytes = 256.*says 16; run `fusejax fuse`"):
        run_stages(config.model_copy(update={"fusions": (fusion,)}), ("train",))
    write_jsonl(tmp_path / "train.jsonl", texts(50, seed=9))
    with pytest.raises(InputError, match=r"another corpus.*run `fusejax capture`"):
        run_stages(config, ("prepare", "train"))
