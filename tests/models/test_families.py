"""Every family computes the logits of transformers, is exported bit for bit, and refuses what it does not compute."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fusejax.errors import InputError
from fusejax.io.hf import load_hf_model, save_hf_model
from fusejax.models import (
    BlockConfig,
    ModelConfig,
    RopeConfig,
    decay_mask,
    logits,
    model_config_from_hf,
    model_config_to_hf,
    param_table,
)
from fusejax.models.layers import alibi_bias, expert_weights, layer_norm
from fusejax.parallel import batch_sharding, flatten_paths, make_mesh, param_shardings
from tests.models.families import CONFIGS, FIXTURES, tokens, write_model
from tests.models.tiny import tiny_batch, tiny_logits, tiny_params

TOLERANCE = 2e-5  # on float32 logits of size about 1 to 7
SMALL = {"num_layers": 2, "num_heads": 4, "tie_embeddings": True}
FAMILIES = {
    "qwen2": ModelConfig(64, 32, 48, num_kv_heads=2, architecture="qwen2", sliding_window=5, **SMALL),
    "internlm2": ModelConfig(64, 32, 48, num_kv_heads=2, architecture="internlm2", **SMALL),
    "mixtral": ModelConfig(64, 32, 48, num_kv_heads=2, architecture="mixtral", **SMALL),
    "mpt": ModelConfig(64, 32, 48, architecture="mpt", **SMALL),
    "gpt_neox": ModelConfig(
        64, 32, 48, architecture="gpt_neox", rope=RopeConfig(partial_rotary_factor=0.25), attention_bias=True, **SMALL
    ),
}


def fixture(name: str) -> tuple[dict, dict, np.ndarray]:
    with np.load(FIXTURES / f"{name}.npz", allow_pickle=False) as stored:
        described = json.loads(str(stored["described"]))
        return described["config"], described["shapes"], stored["logits"]


def our_logits(cfg: ModelConfig, params) -> np.ndarray:
    ids = jnp.asarray(tokens(), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return np.asarray(tiny_logits(params, cfg, ids, positions, jnp.ones_like(ids)))


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers_and_export_keeps_every_bit(name: str, tmp_path: Path) -> None:
    config, shapes, expected = fixture(name)
    source = write_model(tmp_path / "theirs", config, shapes)
    cfg, params = load_hf_model(source)
    difference = np.abs(our_logits(cfg, params) - expected).max()
    print(f"{name}: largest difference {difference:.1e}")
    assert difference < TOLERANCE

    save_hf_model(tmp_path / "ours", cfg, params)
    before, after = (load_file(d / "model.safetensors") for d in (source, tmp_path / "ours"))
    assert set(before) == set(after)
    assert all(before[n].tobytes() == after[n].tobytes() and before[n].shape == after[n].shape for n in before)
    assert load_hf_model(tmp_path / "ours")[0] == cfg


@pytest.mark.parametrize("name", CONFIGS)
def test_torch_agrees_with_the_fixture_and_reads_the_export(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.models.references import reference, torch_logits

    config, shapes, expected = fixture(name)
    again = reference(name, tmp_path / "made")
    assert (again["config"]["model_type"], again["shapes"]) == (config["model_type"], shapes)
    np.testing.assert_allclose(again["logits"], expected, atol=TOLERANCE)
    if config["model_type"] != "internlm2":  # not part of transformers
        cfg, params = load_hf_model(write_model(tmp_path / "theirs", config, shapes))
        save_hf_model(tmp_path / "ours", cfg, params)
        np.testing.assert_allclose(torch_logits(tmp_path / "ours")[1], expected, atol=TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_config_and_table_survive_the_way_through_hugging_face(name: str) -> None:
    cfg = FAMILIES[name]
    assert model_config_from_hf(json.loads(json.dumps(model_config_to_hf(cfg)))) == cfg
    rng = np.random.default_rng(0)
    for path, spec in param_table(cfg).items():
        assert len(spec.axes) == len(spec.shape), path
        tensor = rng.normal(size=spec.hf_shape)
        leaf = spec.from_hf(tensor)
        assert leaf.shape == spec.layer_shape, path
        part = tensor if spec.fused is None else spec.fused.take(tensor)
        np.testing.assert_array_equal(spec.to_hf(leaf), part)
    decaying = {path for path, decays in flatten_paths(decay_mask(cfg)).items() if decays}
    assert decaying == {path for path in param_table(cfg) if path.endswith(("kernel", "embedding"))}


@pytest.mark.parametrize("name", ["mixtral", "mpt"])
def test_packed_documents_read_as_if_alone(name: str) -> None:
    cfg, (ids, positions, segments) = FAMILIES[name], tiny_batch(rows=1)
    params = tiny_params(cfg)
    packed = tiny_logits(params, cfg, ids, positions, segments)
    where = np.flatnonzero(segments[0] == 2)
    alone = tiny_logits(params, cfg, *(x[:, where] for x in (ids, positions, jnp.ones_like(segments))))
    np.testing.assert_allclose(packed[:, where], alone, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "explicit"), [("mixtral", False), ("mixtral", True), ("mpt", True), ("gpt_neox", False)]
)
def test_a_mesh_changes_nothing(name: str, explicit: bool) -> None:
    cfg, batch = FAMILIES[name], tiny_batch()
    params = tiny_params(cfg)
    expected = tiny_logits(params, cfg, *batch)
    mesh = make_mesh(data=2, fsdp=2, tensor=2, explicit=explicit)
    placed = jax.device_put(params, param_shardings(param_table(cfg), mesh))
    batch = [jax.device_put(x, batch_sharding(mesh)) for x in batch]
    np.testing.assert_allclose(tiny_logits(placed, cfg, *batch, mesh=mesh), expected, atol=1e-4)


def test_experts_are_differentiated() -> None:
    cfg = FAMILIES["mixtral"]
    batch = tiny_batch(rows=2)
    gradient = jax.jit(jax.grad(lambda params: jnp.square(logits(params, cfg, *batch)).mean()))(tiny_params(cfg))
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_expert_weights_are_a_softmax_over_the_likeliest() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    weights = np.asarray(expert_weights(jnp.asarray(scores), count=2))
    for at in np.ndindex(2, 3):
        likeliest = np.argsort(scores[at])[-2:]
        expected = np.zeros(5)
        expected[likeliest] = np.exp(scores[at][likeliest]) / np.exp(scores[at][likeliest]).sum()
        np.testing.assert_allclose(weights[at], expected, atol=1e-6)


def test_alibi_slopes_and_layer_norm_follow_their_definitions() -> None:
    bias = np.asarray(alibi_bias(4, 6, bias_max=8.0))
    np.testing.assert_allclose(-bias[0, :, 5, 3] / 2, [2**-2, 2**-4, 2**-6, 2**-8])
    np.testing.assert_allclose(-np.asarray(alibi_bias(3, 2, bias_max=8.0))[0, :, 1, 0], [2**-4, 2**-8, 2**-2])
    x = np.random.default_rng(0).normal(size=(3, 64)) * 30 + 5
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    ours = layer_norm(jnp.float32(x), jnp.full(64, 2.0), jnp.ones(64), eps=1e-5)
    np.testing.assert_allclose(ours, 2 * expected + 1, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mpt", {"attn_config": {"alibi": False}}, "alibi = False"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "qk_ln"),
        ("mpt", {"no_bias": False}, "no_bias"),
        ("mpt", {"logit_scale": 0.5}, "logit_scale"),
        ("mpt", {"d_model": None}, "lacks hidden_size"),
        ("gpt_neox", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("gpt_neox", {"rotary_pct": 0.03}, "0 rotated"),
        ("mixtral", {"num_experts_per_tok": 9}, "experts_per_token"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act"),
        ("qwen2", {"layer_types": ["sliding_attention", "full_attention"]}, "full attention, then sliding"),
        ("qwen2", {"num_local_experts": 4}, "num_local_experts"),
        ("internlm2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_a_family_does_not_compute_is_refused(name: str, change: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        model_config_from_hf(CONFIGS[name] | change)


@pytest.mark.parametrize(
    "options",
    [
        {"architecture": "llama", "block": BlockConfig(num_experts=4)},
        {"architecture": "llama", "rope": RopeConfig(partial_rotary_factor=0.5)},
        {"architecture": "mpt", "num_kv_heads": 2},
        {"architecture": "mpt", "attention_bias": True},
        {"architecture": "internlm2", "sliding_window": 4},
        {"architecture": "gpt_neox", "head_dim": 4},
        {"architecture": "qwen2", "block": BlockConfig(full_attention_layers=9)},
    ],
)
def test_switches_of_another_family_are_refused(options: dict) -> None:
    with pytest.raises(InputError):
        ModelConfig(64, 32, 48, **{"num_layers": 2, "num_heads": 4, **options})


def test_buffers_of_old_gpt_neox_files_are_passed_over(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    config, shapes, _ = fixture("gpt_neox")
    source = write_model(tmp_path / "old", config, shapes)
    tensors = load_file(source / "model.safetensors")
    old = {"attention.bias": np.ones((1, 1, 4, 4), bool), "attention.masked_bias": np.float32([-1e9])}
    tensors |= {f"gpt_neox.layers.0.{name}": value for name, value in old.items()}
    save_file(tensors, source / "model.safetensors")
    assert load_hf_model(source)[1]["layers"]["attention"]["q"]["kernel"].shape == (2, 32, 2, 16)
