"""Decoder-only models of seven families: configs, the parameter table, the forward pass and scoring.

The names are loaded on first use (PEP 562): who reads a configuration or a file needs no flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusejax.models.config import BlockConfig, ModelConfig
    from fusejax.models.hf_config import model_config_from_hf, model_config_to_hf
    from fusejax.models.llama import head_kernel, hidden_states, logits
    from fusejax.models.params import (
        ParamSpec,
        abstract_params,
        check_params,
        count_params,
        decay_mask,
        init_params,
        param_table,
    )
    from fusejax.models.rope import RopeConfig
    from fusejax.models.scoring import score_tokens

__all__ = [
    "BlockConfig",
    "ModelConfig",
    "ParamSpec",
    "RopeConfig",
    "abstract_params",
    "check_params",
    "count_params",
    "decay_mask",
    "head_kernel",
    "hidden_states",
    "init_params",
    "logits",
    "model_config_from_hf",
    "model_config_to_hf",
    "param_table",
    "score_tokens",
]

_ORIGIN = {
    "BlockConfig": "config",
    "ModelConfig": "config",
    "ParamSpec": "params",
    "RopeConfig": "rope",
    "abstract_params": "params",
    "check_params": "params",
    "count_params": "params",
    "decay_mask": "params",
    "head_kernel": "llama",
    "hidden_states": "llama",
    "init_params": "params",
    "logits": "llama",
    "model_config_from_hf": "hf_config",
    "model_config_to_hf": "hf_config",
    "param_table": "params",
    "score_tokens": "scoring",
}


def __getattr__(name: str) -> Any:
    if name not in _ORIGIN:
        raise AttributeError(f"module 'fusejax.models' has no attribute {name!r}; public names: {', '.join(__all__)}")
    value = getattr(importlib.import_module(f"fusejax.models.{_ORIGIN[name]}"), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
