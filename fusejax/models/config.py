"""The architecture of a model, and its translation from and to a Hugging Face `config.json`.

`ModelConfig` is frozen and hashable, so that it can be a static argument of a jitted function. It holds
every number that changes the function a checkpoint computes; a setting of the source config that we cannot
honour is an error and never dropped. What a config can say, an export can write.

Not here: the dtype of the weights, which belongs to the weights. `dtype` is that of activations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fusejax.errors import InputError, nearest
from fusejax.models.rope import RopeConfig, rope_from_hf, rope_to_hf

__all__ = ["ARCHITECTURES", "DTYPES", "REMAT_POLICIES", "ModelConfig", "model_config_from_hf", "model_config_to_hf"]

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots")

# what transformers assumes where a config is silent
_HF_DEFAULTS = {
    "llama": {"num_key_value_heads": 0, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 4096 * 32, "sliding_window": 4096},
}


@dataclass(frozen=True)
class ModelConfig:
    """A Llama or Mistral decoder; sizes in tokens or channels.

    `num_kv_heads` 0 means as many as `num_heads`, `head_dim` 0 means `hidden_size // num_heads`;
    both are filled in. `remat` says what the backward pass keeps of a layer: all of it (`none`), its
    matrix products (`dots`) or its input only (`full`). `sliding_window`: a position sees itself and the
    `sliding_window - 1` before it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    architecture: str = "llama"
    max_positions: int = 2048
    rope: RopeConfig = field(default_factory=RopeConfig)
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = 2
    pad_id: int | None = None
    dtype: str = "float32"
    remat: str = "none"

    def __post_init__(self) -> None:
        _check_choice("architecture", self.architecture, tuple(ARCHITECTURES))
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("remat", self.remat, REMAT_POLICIES)
        object.__setattr__(self, "num_kv_heads", self.num_kv_heads or self.num_heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.hidden_size // max(self.num_heads, 1))
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.num_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InputError(f"sliding_window must be at least 1 or None, got {self.sliding_window}")
        if self.architecture == "llama" and self.sliding_window is not None:
            raise InputError(f"Llama has no sliding window (got {self.sliding_window}); use architecture 'mistral'")
        if self.architecture == "mistral" and (self.attention_bias or self.mlp_bias):
            raise InputError("Mistral has no biases; use architecture 'llama' or drop attention_bias and mlp_bias")


def model_config_from_hf(config: Mapping[str, Any]) -> ModelConfig:
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
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    missing = [name for name in required if config.get(name) is None]
    if missing:
        raise InputError(f"the model config lacks {', '.join(missing)}")
    values = _HF_DEFAULTS[kind] | dict(config)
    biases = kind == "llama"  # transformers' Mistral has none, whatever its config says
    eos = config.get("eos_token_id", 2)
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
        rope=rope_from_hf(config, max_positions=values["max_position_embeddings"]),
        sliding_window=values["sliding_window"] if kind == "mistral" else None,
        attention_bias=biases and bool(config.get("attention_bias", False)),
        mlp_bias=biases and bool(config.get("mlp_bias", False)),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        initializer_range=float(config.get("initializer_range", 0.02)),
        bos_id=config.get("bos_token_id", 1),
        eos_id=tuple(eos) if isinstance(eos, list | tuple) else eos,
        pad_id=config.get("pad_token_id"),
        dtype="bfloat16" if config.get("dtype", config.get("torch_dtype")) == "bfloat16" else "float32",
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
    if cfg.architecture == "mistral":
        return config | {"sliding_window": cfg.sliding_window}
    return config | {"attention_bias": cfg.attention_bias, "mlp_bias": cfg.mlp_bias}


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}; known are {', '.join(choices)}.{nearest(str(value), choices)}")


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Raises for settings that would change the function and that we do not compute."""
    expected: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("silu", "swish"),
        "quantization_config": (None,),
        "partial_rotary_factor": (None, 1, 1.0),
        "attention_dropout": (None, 0, 0.0),
        "num_local_experts": (None,),
        "is_encoder_decoder": (None, False),
    }
    wrong = [
        f"{name} = {config[name]!r} (expected {allowed[0]!r})"
        for name, allowed in expected.items()
        if name in config and config[name] not in allowed
    ]
    if config.get("model_type") == "llama" and config.get("sliding_window") is not None:
        wrong.append(f"sliding_window = {config['sliding_window']} (Llama has none; set model_type to 'mistral')")
    if wrong:
        raise InputError("the model config has settings that are not supported: " + "; ".join(wrong))
