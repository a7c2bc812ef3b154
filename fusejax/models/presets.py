"""Architectures by name, so that one can plan without a download: what their `config.json` says."""

from fusejax.models.config import ModelConfig
from fusejax.models.rope import RopeConfig

__all__ = ["PRESETS", "find_preset"]

_LLAMA_2 = {"max_positions": 4096, "norm_eps": 1e-5}
_LLAMA_3 = {"max_positions": 8192, "norm_eps": 1e-5, "rope": RopeConfig(rope_theta=500_000.0)}

PRESETS = {
    "llama-2-7b": ModelConfig(32000, 4096, 11008, 32, 32, **_LLAMA_2),
    "llama-2-13b": ModelConfig(32000, 5120, 13824, 40, 40, **_LLAMA_2),
    "llama-2-70b": ModelConfig(32000, 8192, 28672, 80, 64, 8, **_LLAMA_2),
    "llama-3-8b": ModelConfig(128256, 4096, 14336, 32, 32, 8, **_LLAMA_3),
    "mistral-7b": ModelConfig(
        32000, 4096, 14336, 32, 32, 8, architecture="mistral", max_positions=32768, sliding_window=4096, norm_eps=1e-5
    ),
    "openchat-3.5-7b": ModelConfig(
        32002, 4096, 14336, 32, 32, 8, architecture="mistral", max_positions=8192, sliding_window=4096, norm_eps=1e-5
    ),
    "open-llama-7b": ModelConfig(32000, 4096, 11008, 32, 32),
    "tinyllama-1.1b": ModelConfig(32000, 2048, 5632, 22, 32, 4, norm_eps=1e-5),
}
_HUB_NAMES = {
    "meta-llama/llama-2-7b-hf": "llama-2-7b",
    "meta-llama/llama-2-7b-chat-hf": "llama-2-7b",
    "meta-llama/llama-2-13b-hf": "llama-2-13b",
    "meta-llama/llama-2-70b-hf": "llama-2-70b",
    "meta-llama/meta-llama-3-8b": "llama-3-8b",
    "mistralai/mistral-7b-v0.1": "mistral-7b",
    "openchat/openchat_3.5": "openchat-3.5-7b",
    "openlm-research/open_llama_7b_v2": "open-llama-7b",
    "tinyllama/tinyllama_v1.1": "tinyllama-1.1b",
}


def find_preset(name: str) -> ModelConfig | None:
    """Returns the architecture of a preset or of a hub name that is one, None for any other name."""
    key = name.strip().lower()
    return PRESETS.get(_HUB_NAMES.get(key, key))
