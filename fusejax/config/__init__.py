"""The configuration of a run: pydantic models read from YAML, one per stage.

Every field has a description, which `--help` and the JSON schema show. Unknown keys are refused with the
nearest known one. Only `cli` and `stages` see these classes; functions below them take plain values.
Relative paths are relative to the directory in which the command runs.
"""

__all__ = [
    "AlignConfig",
    "CaptureConfig",
    "CorpusConfig",
    "EvaluateConfig",
    "FaultsConfig",
    "FusionConfig",
    "ImportConfig",
    "LogConfig",
    "LossConfig",
    "MemoryConfig",
    "MergeConfig",
    "MeshConfig",
    "ModelRef",
    "PretrainConfig",
    "RunConfig",
    "ShapeConfig",
    "TextSource",
    "TokenizerConfig",
    "TrainConfig",
    "load_config",
    "place_of",
    "save_config",
]

from fusejax.config.inputs import CorpusConfig, ImportConfig, ModelRef, place_of
from fusejax.config.merges import MergeConfig
from fusejax.config.pretrain import PretrainConfig, ShapeConfig, TokenizerConfig
from fusejax.config.run import RunConfig, load_config, save_config
from fusejax.config.stages import (
    AlignConfig,
    CaptureConfig,
    EvaluateConfig,
    FaultsConfig,
    FusionConfig,
    LogConfig,
    LossConfig,
    MemoryConfig,
    MeshConfig,
    TrainConfig,
)
from fusejax.config.text import TextSource
