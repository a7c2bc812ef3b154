"""Model configs: both Hugging Face forms, both ways, and everything that must be refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusejax.errors import InputError
from fusejax.models import ModelConfig, RopeConfig, model_config_from_hf, model_config_to_hf

HF = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

ROPES = st.one_of(
    st.builds(RopeConfig, rope_theta=st.floats(1.0, 1e7)),
    st.builds(RopeConfig, kind=st.sampled_from(["linear", "dynamic"]), factor=st.floats(1, 64)),
    st.builds(
        RopeConfig,
        kind=st.just("llama3"),
        factor=st.floats(1, 64),
        low_freq_factor=st.just(1.0),
        high_freq_factor=st.floats(2, 8),
        original_max_position_embeddings=st.integers(16, 8192),
    ),
    st.builds(
        RopeConfig,
        kind=st.just("yarn"),
        factor=st.floats(1, 64),
        original_max_position_embeddings=st.integers(16, 8192),
        beta_fast=st.none() | st.just(16.0),
        attention_factor=st.none() | st.floats(0.5, 2),
        truncate=st.none() | st.booleans(),
    ),
)


@given(
    rope=ROPES,
    mistral=st.booleans(),
    tied=st.booleans(),
    bias=st.booleans(),
    window=st.none() | st.integers(1, 99),
    eos=st.none() | st.integers(0, 9) | st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_export_and_import_give_the_same_config(rope, mistral, tied, bias, window, eos, dtype) -> None:
    cfg = ModelConfig(
        96,
        32,
        56,
        3,
        4,
        2,
        architecture="mistral" if mistral else "llama",
        rope=rope,
        sliding_window=window if mistral else None,
        attention_bias=bias and not mistral,
        mlp_bias=bias and not mistral,
        tie_embeddings=tied,
        eos_id=eos,
        dtype=dtype,
    )
    assert model_config_from_hf(json.loads(json.dumps(model_config_to_hf(cfg)))) == cfg
    hash(cfg)


def test_both_rope_forms_are_read_and_written() -> None:
    old = model_config_from_hf(HF | {"rope_theta": 5e5, "rope_scaling": LLAMA3})
    new = model_config_from_hf(HF | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}})
    legacy = model_config_from_hf(HF | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert old == new and old.rope.kind == "llama3" and old.rope.rope_theta == 5e5
    assert legacy.rope == RopeConfig(kind="linear", factor=2.0)
    written = model_config_to_hf(old)
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 5e5
    assert written["rope_scaling"] == LLAMA3 and written["dtype"] == written["torch_dtype"] == "float32"


def test_silent_configs_take_the_defaults_of_transformers() -> None:
    llama = model_config_from_hf(HF)
    mistral = model_config_from_hf(HF | {"model_type": "mistral", "num_attention_heads": 8})
    assert (llama.num_kv_heads, llama.head_dim, llama.sliding_window, llama.norm_eps) == (4, 8, None, 1e-6)
    assert (mistral.num_kv_heads, mistral.sliding_window) == (8, 4096)
    assert (
        model_config_from_hf(
            HF | {"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": None}
        ).sliding_window
        is None
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "gpt2"}, "unsupported model_type 'gpt2'"),
        ({"model_type": "lama"}, "Did you mean 'llama'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"num_key_value_heads": 3}, "no multiple of num_kv_heads"),
        ({"num_hidden_layers": 0}, "num_layers must be a positive integer"),
        ({"head_dim": 7}, "even"),
        ({"sliding_window": 8}, "Llama has none"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "unknown RoPE kind 'longrope'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "fator": 1}}, "does not know fator"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "contradicts"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
            "contradicts",
        ),
    ],
)
def test_what_cannot_be_computed_is_refused(change, words) -> None:
    with pytest.raises(InputError, match=words):
        model_config_from_hf(HF | change)


@pytest.mark.parametrize(
    "options",
    [
        {"remat": "som"},
        {"dtype": "float16"},
        {"architecture": "qwen"},
        {"sliding_window": 4},
        {"architecture": "mistral", "mlp_bias": True},
        {"architecture": "mistral", "sliding_window": 0},
    ],
)
def test_a_config_that_means_nothing_cannot_be_made(options) -> None:
    with pytest.raises(InputError):
        ModelConfig(96, 32, 56, 3, 4, 2, **options)
