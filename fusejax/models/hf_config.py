"""Translation of a model's architecture from and to a Hugging Face `config.json`.

A family's own words are first put into those of Llama's config (`_from_mpt` and its like), then read once. A
setting that we cannot honour is an error and never dropped. What a config can say, an export can write, in the
forms of transformers 4 and 5.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fusejax.errors import InputError, nearest
from fusejax.models.config import ARCHITECTURES, BlockConfig, ModelConfig
from fusejax.models.rope import rope_from_hf, rope_to_hf

__all__ = ["model_config_from_hf", "model_config_to_hf"]

Config = Mapping[str, Any]

# what transformers (InternLM2: its own code) assumes where a config is silent
_COMMON: dict[str, Any] = {
    "num_key_value_heads": 0,
    "max_position_embeddings": 2048,
    "sliding_window": None,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_NO_IDS = {"bos_token_id": None, "eos_token_id": None}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096} | _NO_IDS,
    "internlm2": {},
    "mixtral": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "mpt": {"layer_norm_epsilon": 1e-5, "expansion_ratio": 4, "max_seq_len": 2048, "tie_word_embeddings": True}
    | _NO_IDS,
    "gpt_neox": {"layer_norm_eps": 1e-5, "attention_bias": True, "bos_token_id": 0},
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_OFF = (None, False, 0, 0.0)


def model_config_from_hf(config: Config) -> ModelConfig:
    """Returns the `ModelConfig` of a Hugging Face config, as written by transformers 4 or 5.

    Activations take the dtype of the weights where it is bfloat16, and float32 otherwise.

    Raises:
        InputError: another architecture, a missing size, or a setting that is not supported.
    """
    kind = config.get("model_type")
    if kind not in ARCHITECTURES:
        raise InputError(
            f"unsupported model_type {kind!r}; supported are {', '.join(ARCHITECTURES)}."
            + nearest(str(kind), ARCHITECTURES)
        )
    _refuse_unsupported(config)
    values = _COMMON | _DEFAULTS[kind] | dict(config)
    found = _READERS[kind](values) if kind in _READERS else {}
    rope, block = found.pop("rope", None), found.pop("block", BlockConfig())
    values |= found
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if values.get(name) is None]
    if missing:
        raise InputError(f"the model config lacks {', '.join(missing)}")
    eos = values["eos_token_id"]
    return ModelConfig(
        architecture=kind,
        vocab_size=values["vocab_size"],
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_layers=values["num_hidden_layers"],
        num_heads=values["num_attention_heads"],
        num_kv_heads=values["num_key_value_heads"] or 0,
        head_dim=values.get("head_dim") or 0,
        max_positions=values["max_position_embeddings"],
        rope=rope or rope_from_hf(values, max_positions=values["max_position_embeddings"]),
        sliding_window=values["sliding_window"] if kind not in ("llama", "internlm2", "mpt", "gpt_neox") else None,
        # transformers' Mistral and Mixtral have no biases, whatever their configs say
        attention_bias=kind not in ("mistral", "mixtral", "mpt") and bool(values["attention_bias"]),
        mlp_bias=kind in ("llama", "gpt_neox") and bool(values["mlp_bias"]),
        tie_embeddings=bool(values["tie_word_embeddings"]),
        norm_eps=float(values["rms_norm_eps"]),
        initializer_range=float(values["initializer_range"]),
        bos_id=values["bos_token_id"],
        eos_id=tuple(eos) if isinstance(eos, list | tuple) else eos,
        pad_id=values.get("pad_token_id"),
        dtype="bfloat16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "float32",
        block=block,
    )


def model_config_to_hf(cfg: ModelConfig, *, weights_dtype: str | None = None) -> dict[str, Any]:
    """Returns a `config.json` that transformers 4 and 5 read alike.

    Args:
        cfg: the architecture.
        weights_dtype: the dtype of the stored weights; that of the activations if None.
    """
    dtype = weights_dtype or cfg.dtype
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[cfg.architecture]],
        "model_type": cfg.architecture,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.max_positions,
        "initializer_range": cfg.initializer_range,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tie_embeddings,
        "attention_dropout": 0.0,
        "bos_token_id": cfg.bos_id,
        "eos_token_id": list(cfg.eos_id) if isinstance(cfg.eos_id, tuple) else cfg.eos_id,
        "pad_token_id": cfg.pad_id,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
        **rope_to_hf(cfg.rope),
    }
    added, dropped = _WRITERS[cfg.architecture](cfg)
    return {name: value for name, value in config.items() if name not in dropped} | added


def _refuse_unsupported(config: Config) -> None:
    """Raises for settings that would change the function and that we do not compute."""
    kind = config["model_type"]
    expected: dict[str, tuple[Any, ...]] = {"quantization_config": (None,), "is_encoder_decoder": _OFF}
    expected |= dict.fromkeys(("attention_dropout", "hidden_dropout", "resid_pdrop", "emb_pdrop"), _OFF)
    if kind == "gpt_neox":
        expected |= {"hidden_act": tuple(_ACTIVATIONS)}
    elif kind == "mpt":
        expected |= {"no_bias": (True,), "logit_scale": (None,), "learned_pos_emb": (True, False)}
        expected |= {"embedding_fraction": (1.0, 1)}
    else:
        expected |= {"hidden_act": ("silu", "swish"), "partial_rotary_factor": (None, 1, 1.0)}
    if kind != "mixtral":
        expected["num_local_experts"] = (None,)
    wrong = _differing(config, expected)
    if kind == "mpt":
        attention = {"alibi": (True,), "qk_ln": _OFF, "prefix_lm": _OFF, "softmax_scale": (None,), "attn_pdrop": _OFF}
        attention |= {"attn_type": ("multihead_attention",), "attn_uses_sequence_id": _OFF}
        wrong += _differing(config.get("attn_config") or {}, attention)
    if kind == "llama" and config.get("sliding_window") is not None:
        wrong.append(f"sliding_window = {config['sliding_window']} (Llama has none; set model_type to 'mistral')")
    if wrong:
        raise InputError("the model config has settings that are not supported: " + "; ".join(wrong))


def _differing(config: Config, expected: Mapping[str, tuple[Any, ...]]) -> list[str]:
    return [
        f"{name} = {config[name]!r} (expected {allowed[0]!r})"
        for name, allowed in expected.items()
        if name in config and config[name] not in allowed
    ]


def _from_qwen2(values: Config) -> dict[str, Any]:
    layers = values.get("num_hidden_layers") or 0
    full = min(values.get("max_window_layers", 28), layers)
    window = values["sliding_window"] if values.get("use_sliding_window", False) else None
    kinds = values.get("layer_types")
    if kinds is not None:
        full = next((i for i, kind in enumerate(kinds) if kind != "full_attention"), layers)
        if list(kinds) != ["full_attention"] * full + ["sliding_attention"] * (layers - full):
            raise InputError(f"layer_types of qwen2 must be full attention, then sliding attention; got {kinds}")
        if full < layers and window is None:
            raise InputError("layer_types names sliding attention, but use_sliding_window or sliding_window is not set")
    if window is None or full == layers:
        return {"sliding_window": None}
    return {"sliding_window": window, "block": BlockConfig(full_attention_layers=full)}


def _from_internlm2(values: Config) -> dict[str, Any]:
    return {"attention_bias": values.get("bias", True)}


def _from_mixtral(values: Config) -> dict[str, Any]:
    experts = {"num_experts": values["num_local_experts"], "experts_per_token": values["num_experts_per_tok"]}
    found: dict[str, Any] = {"block": BlockConfig(**experts)}
    if values.get("rope_theta") is None and "rope_theta" not in (values.get("rope_parameters") or {}):
        found["rope_theta"] = 1e6
    return found


def _from_mpt(values: Config) -> dict[str, Any]:
    attention = values.get("attn_config") or {}
    width = values.get("d_model")
    defaults = ModelConfig(2, 2, 2, 1, 1, architecture="mpt").block
    return {
        "hidden_size": width,
        "intermediate_size": width and int(values["expansion_ratio"] * width),
        "num_hidden_layers": values.get("n_layers"),
        "num_attention_heads": values.get("n_heads"),
        "num_key_value_heads": 0,
        "head_dim": 0,
        "max_position_embeddings": values["max_seq_len"],
        "rms_norm_eps": values["layer_norm_epsilon"],
        "block": replace(
            defaults,
            alibi_bias_max=float(attention.get("alibi_bias_max", 8)),
            clip_qkv=float(attention.get("clip_qkv") or 0),
        ),
    }


def _from_gpt_neox(values: Config) -> dict[str, Any]:
    block = ModelConfig(2, 2, 2, 1, 1, architecture="gpt_neox").block
    given = dict(values.get("rope_parameters") or {})
    part = given.pop("partial_rotary_factor", None)
    part = values.get("rotary_pct", 0.25) if part is None else part
    theta = given.get("rope_theta", values.get("rotary_emb_base", values.get("rope_theta", 10000.0)))
    words = {"rope_theta": theta, "rope_scaling": values.get("rope_scaling")}
    if given:
        words["rope_parameters"] = given | {"rope_theta": theta}
    rope = rope_from_hf(words, max_positions=values["max_position_embeddings"])
    return {
        "rms_norm_eps": values["layer_norm_eps"],
        "num_key_value_heads": 0,
        "head_dim": 0,
        "mlp_bias": True,
        "rope": replace(rope, partial_rotary_factor=None if part == 1 else float(part)),
        "block": replace(
            block,
            activation=_ACTIVATIONS[values.get("hidden_act", "gelu")],
            parallel_residual=bool(values.get("use_parallel_residual", True)),
        ),
    }


_READERS = {
    "qwen2": _from_qwen2,
    "internlm2": _from_internlm2,
    "mixtral": _from_mixtral,
    "mpt": _from_mpt,
    "gpt_neox": _from_gpt_neox,
}


def _to_qwen2(cfg: ModelConfig) -> dict[str, Any]:
    full = cfg.num_layers if cfg.sliding_window is None else cfg.block.full_attention_layers
    return {
        "use_sliding_window": cfg.sliding_window is not None,
        "sliding_window": cfg.sliding_window,
        "max_window_layers": full,
        "layer_types": ["full_attention"] * full + ["sliding_attention"] * (cfg.num_layers - full),
    }


def _to_mpt(cfg: ModelConfig) -> dict[str, Any]:
    attention = {"alibi": True, "alibi_bias_max": int(cfg.block.alibi_bias_max), "clip_qkv": cfg.block.clip_qkv or None}
    ratio = cfg.intermediate_size / cfg.hidden_size
    return {
        "d_model": cfg.hidden_size,
        "n_heads": cfg.num_heads,
        "n_layers": cfg.num_layers,
        "expansion_ratio": int(ratio) if ratio.is_integer() else ratio,
        "max_seq_len": cfg.max_positions,
        "layer_norm_epsilon": cfg.norm_eps,
        "no_bias": True,
        "attn_config": attention,
    }


def _to_gpt_neox(cfg: ModelConfig) -> dict[str, Any]:
    part = 1.0 if cfg.rope.partial_rotary_factor is None else cfg.rope.partial_rotary_factor
    rope = rope_to_hf(cfg.rope)
    return {
        "layer_norm_eps": cfg.norm_eps,
        "attention_bias": cfg.attention_bias,
        "hidden_dropout": 0.0,
        "hidden_act": "gelu" if cfg.block.activation == "gelu" else "gelu_new",
        "use_parallel_residual": cfg.block.parallel_residual,
        "rotary_pct": part,
        "rotary_emb_base": cfg.rope.rope_theta,
        "rope_parameters": rope["rope_parameters"] | {"partial_rotary_factor": part},
    }


_LLAMA_ONLY = ("num_key_value_heads", "head_dim", "rms_norm_eps")
_MPT_OTHER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
_MPT_OTHER += ("max_position_embeddings", "attention_dropout", "rope_theta", "rope_scaling", "rope_parameters")

# architecture -> the entries that it adds to the common config, and those that it does not have
_WRITERS: dict[str, Any] = {
    "llama": lambda cfg: ({"attention_bias": cfg.attention_bias, "mlp_bias": cfg.mlp_bias}, ()),
    "mistral": lambda cfg: ({"sliding_window": cfg.sliding_window}, ()),
    "qwen2": lambda cfg: (_to_qwen2(cfg), ()),
    "internlm2": lambda cfg: ({"bias": cfg.attention_bias}, ()),
    "mixtral": lambda cfg: (
        {
            "sliding_window": cfg.sliding_window,
            "num_local_experts": cfg.block.num_experts,
            "num_experts_per_tok": cfg.block.experts_per_token,
        },
        (),
    ),
    "mpt": lambda cfg: (_to_mpt(cfg), (*_LLAMA_ONLY, *_MPT_OTHER)),
    "gpt_neox": lambda cfg: (_to_gpt_neox(cfg), _LLAMA_ONLY),
}
