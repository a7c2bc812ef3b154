"""The same logits as transformers with torch, for imports and exports, where both are installed."""

import copy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.io.hf import load_hf_model, save_hf_model
from fusejax.models import ModelConfig, logits
from tests.paths import DATA, needs_data

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TOLERANCE = 5e-5  # on float32 logits of size about 1 to 20
LENGTH = 48
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CASES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "many-heads": {"num_key_value_heads": 4},
    "one-key-head": {"num_key_value_heads": 1, "head_dim": 16},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
    "llama3": {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16, "rope_theta": 1000.0}},
    "yarn": {"rope_parameters": YARN | {"rope_theta": 10000.0}},
    "yarn-all": {
        "rope_parameters": YARN
        | {"rope_theta": 1e6, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.2}
    },
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "mistral-whole": {"model_type": "mistral", "sliding_window": None},
}


def torch_model(options: dict[str, object]):
    options = copy.deepcopy(options)
    mistral = options.pop("model_type", "llama") == "mistral"
    config_class = transformers.MistralConfig if mistral else transformers.LlamaConfig
    model_class = transformers.MistralForCausalLM if mistral else transformers.LlamaForCausalLM
    torch.manual_seed(0)
    model = model_class(config_class(**(TINY | options))).eval()
    with torch.no_grad():  # norms and biases away from ones and zeros
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def torch_logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def our_logits(cfg: ModelConfig, params, tokens: np.ndarray) -> np.ndarray:
    ids = jnp.asarray(tokens, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return np.asarray(jax.jit(logits, static_argnums=1)(params, cfg, ids, positions, jnp.ones_like(ids)))


def tokens_below(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, (2, LENGTH))


@pytest.mark.parametrize("name", CASES)
def test_import_and_export_compute_the_same_logits(name: str, tmp_path: Path) -> None:
    model, tokens = torch_model(CASES[name]), tokens_below(TINY["vocab_size"])
    expected = torch_logits(model, tokens)
    model.save_pretrained(tmp_path / "theirs")
    cfg, params = load_hf_model(tmp_path / "theirs")
    difference = np.abs(our_logits(cfg, params, tokens) - expected).max()
    print(f"{name}: largest difference {difference:.2e} at logits of {np.abs(expected).max():.1f}")
    assert difference < TOLERANCE

    save_hf_model(tmp_path / "ours", cfg, params)
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_array_equal(torch_logits(again.eval(), tokens), expected)


def test_bfloat16_weights_survive_bit_for_bit(tmp_path: Path) -> None:
    model = torch_model({}).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    cfg, params = load_hf_model(tmp_path / "theirs")
    assert cfg.dtype == "bfloat16"
    save_hf_model(tmp_path / "ours", cfg, params)
    again = type(model).from_pretrained(tmp_path / "ours")
    for (name, ours), (_, theirs) in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert ours.dtype == torch.bfloat16
        assert torch.equal(ours, theirs), name


@needs_data
@pytest.mark.parametrize("name", ["stories260K", "stories3M"])
def test_trained_models_compute_the_same_logits(name: str) -> None:
    directory = DATA / "models" / name
    cfg, params = load_hf_model(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    tokens = np.random.default_rng(0).integers(3, cfg.vocab_size, (2, 256))
    expected = torch_logits(model, tokens)
    difference = np.abs(our_logits(cfg, params, tokens) - expected).max()
    print(f"{name}: largest difference {difference:.2e} at logits of {np.abs(expected).max():.1f}")
    assert difference < 2e-4
