"""Capture through the stages from sources of other families than Llama."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.config import RunConfig
from fusejax.io.models import open_model
from fusejax.io.store import RecordReader
from fusejax.models import RopeConfig
from fusejax.stages.run import run_stages
from tests.models.tiny import tiny_logits
from tests.stages.tiny import make_model, texts, write_jsonl

PADDED = 3  # rows of the head beyond the tokenizer
CHANGES = {
    "qwen2": {"architecture": "qwen2"},
    "gpt_neox": {
        "architecture": "gpt_neox",
        "num_kv_heads": 2,
        "attention_bias": True,
        "rope": RopeConfig(partial_rotary_factor=0.5),
    },
}


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Both families captured in one run."""
    root = tmp_path_factory.mktemp("families")
    for seed, (name, changes) in enumerate(CHANGES.items()):
        make_model(root / name, kind="byte_bpe", seed=seed, padded=PADDED, **changes)
    path = root / "qwen2" / "tokenizer.json"  # AutoTokenizer composes characters for every Qwen2
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "NFC"}}))
    values = {
        "output": str(root / "run"),
        "target": str(root / "qwen2"),
        "sources": [str(root / name) for name in CHANGES],
        "corpus": {
            "train": [{"path": str(write_jsonl(root / "train.jsonl", texts(30, seed=1)))}],
            "valid_fraction": 0.2,
            "test_fraction": 0.2,
        },
        "capture": {"top_k": 4, "context": 32, "batch_tokens": 64},
    }
    run_stages(RunConfig.model_validate(values), ("prepare", "capture"))
    return root


@pytest.mark.parametrize("name", CHANGES)
def test_capture_stores_what_the_model_computes(captured, name) -> None:
    model = open_model(captured / name)
    assert model.config.architecture == name
    arrays = next(iter(RecordReader(captured / "run" / "captured" / name, kind="captured"))).arrays
    n = min(32, len(arrays["tokens"]))  # the first window
    tokens, labels = (jnp.asarray(arrays[key][:n], jnp.int32)[None] for key in ("tokens", "labels"))
    params = jax.tree.map(jnp.asarray, model.params)
    dense = tiny_logits(params, model.config, tokens, jnp.arange(n)[None], jnp.ones_like(tokens))[..., :-PADDED]
    expected = np.asarray(dense - jnp.log(jnp.exp(dense).sum(-1, keepdims=True)))[0]
    own = expected[np.arange(n), labels[0]]
    np.testing.assert_allclose(arrays["realised_logprob"][:n].astype(np.float32), own, atol=0.02)  # stored narrow
    best = np.sort(expected, axis=-1)[:, ::-1][:, :4]
    np.testing.assert_allclose(arrays["topk_logprobs"][:n].astype(np.float32), best, atol=0.02)
