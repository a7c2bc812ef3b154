"""Decoder-only models of seven families: configs, the parameter table, the forward pass and scoring."""

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
