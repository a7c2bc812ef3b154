"""fusejax: knowledge fusion of large language models in JAX (FuseLLM, FuseChat).

The names below are the public core: arrays in, arrays out, no files, no network, no model object. They are
loaded on first use (PEP 562), so that `import fusejax` costs nothing and `fusejax.TopK` loads no jax.
Everything else is reached through its own module (`fusejax.merging`, `fusejax.models`, ...).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusejax.alignment import align_positions, coarse_map, exact_map
    from fusejax.alignment.transport import transport
    from fusejax.distributions import avg_ce, min_ce, topk_from_logits
    from fusejax.errors import InputError
    from fusejax.evaluation import bits_per_byte
    from fusejax.io.hf import load_hf_model, save_hf_model
    from fusejax.losses import fusion_loss
    from fusejax.merging import merge_trees
    from fusejax.merging import merge_trees as merge
    from fusejax.models import ModelConfig
    from fusejax.types import EventGroups, FusionBatch, TokenAlignment, TopK, TrainState, VocabMap

__all__ = [
    "EventGroups",
    "FusionBatch",
    "InputError",
    "ModelConfig",
    "TokenAlignment",
    "TopK",
    "TrainState",
    "VocabMap",
    "__version__",
    "align_positions",
    "avg_ce",
    "bits_per_byte",
    "coarse_map",
    "exact_map",
    "fusion_loss",
    "load_hf_model",
    "merge",
    "merge_trees",
    "min_ce",
    "save_hf_model",
    "topk_from_logits",
    "transport",
]

__version__ = "0.1.0"

# Public name -> where it is defined: a module, or `module:attribute` where the names differ.
_ORIGIN = {
    "EventGroups": "fusejax.types",
    "FusionBatch": "fusejax.types",
    "InputError": "fusejax.errors",
    "ModelConfig": "fusejax.models",
    "TokenAlignment": "fusejax.types",
    "TopK": "fusejax.types",
    "TrainState": "fusejax.types",
    "VocabMap": "fusejax.types",
    "align_positions": "fusejax.alignment",
    "avg_ce": "fusejax.distributions",
    "bits_per_byte": "fusejax.evaluation",
    "coarse_map": "fusejax.alignment",
    "exact_map": "fusejax.alignment",
    "fusion_loss": "fusejax.losses",
    "load_hf_model": "fusejax.io.hf",
    "merge": "fusejax.merging:merge_trees",
    "merge_trees": "fusejax.merging",
    "min_ce": "fusejax.distributions",
    "save_hf_model": "fusejax.io.hf",
    "topk_from_logits": "fusejax.distributions",
    "transport": "fusejax.alignment.transport",
}


def __getattr__(name: str) -> Any:
    if name not in _ORIGIN:
        raise AttributeError(f"module 'fusejax' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module, _, attribute = _ORIGIN[name].partition(":")
    value = getattr(importlib.import_module(module), attribute or name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
