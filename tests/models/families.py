"""Tiny models of every family: their Hugging Face configs, and weights drawn by tensor name alone.

The bit stream of PCG64 is guaranteed by numpy, so that a fixture needs the names and shapes of the tensors only.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

FIXTURES = Path(__file__).parent / "fixtures"
LENGTH = 24
_LLAMA = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_QWEN2 = {"model_type": "qwen2", **_LLAMA}
_INTERNLM2 = {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], **_LLAMA, "hidden_act": "silu"}
_MIXTRAL = {"model_type": "mixtral", **_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}
_MPT = {"model_type": "mpt", "vocab_size": 48, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}
_NEOX = {
    "model_type": "gpt_neox",
    **{name: value for name, value in _LLAMA.items() if name != "num_key_value_heads"},
    "num_attention_heads": 2,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "solar": {"model_type": "llama", **_LLAMA},
    "qwen2": {**_QWEN2, "tie_word_embeddings": True},
    "qwen2-window": {**_QWEN2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "internlm2": {**_INTERNLM2, "bias": False, "rope_theta": 1e6},
    "internlm2-bias": {**_INTERNLM2, "bias": True, "num_key_value_heads": 1},
    "mixtral": _MIXTRAL,
    "mixtral-window": {**_MIXTRAL, "sliding_window": 6, "num_local_experts": 3, "num_experts_per_tok": 1},
    "mpt": _MPT,
    "mpt-clip": {**_MPT, "d_model": 48, "n_heads": 6, "attn_config": {"clip_qkv": 0.5}},
    "gpt_neox": _NEOX,
    "gpt_neox-sequential": {**_NEOX, "use_parallel_residual": False, "rotary_pct": 1.0, "hidden_act": "gelu_new"},
}


def tokens() -> np.ndarray:
    """Token ids `[2, LENGTH]`."""
    return np.random.PCG64(7).random_raw(2 * LENGTH).reshape(2, LENGTH).astype(np.uint64) % 48


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns float32 weights that depend on the tensor's name and shape: norms about one, all others about zero."""
    raw = np.random.PCG64(zlib.crc32(name.encode())).random_raw(int(np.prod(shape)))
    uniform = ((raw >> np.uint64(40)).astype(np.float64) / 2**24 - 0.5).reshape(shape)
    scale = uniform if len(shape) > 1 else 0.6 * uniform
    return (scale + ("norm" in name and name.endswith("weight"))).astype(np.float32)


def write_model(directory: Path, config: dict[str, Any], shapes: dict[str, list[int]]) -> Path:
    """Writes `config.json` and drawn weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    weights = {name: draw(name, tuple(shape)) for name, shape in shapes.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
