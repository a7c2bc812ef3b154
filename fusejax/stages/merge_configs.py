"""What the configurations of a merge's inputs say about one another, and the configuration of its output.

Weights of one shape can still mean different things. Models that split their attention into other heads, or are of
another type, cannot be merged; where only the positions, the activation or an epsilon differ, the output takes the
template's, and a note says so.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusejax.errors import InputError
from fusejax.merging.plan import MergePlan

__all__ = ["compare_configs", "output_config", "read_config"]

_STRUCTURE = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")
_FUNCTION = (
    "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "rms_norm_eps", "layer_norm_eps", "sliding_window",
    "attention_bias", "mlp_bias",
)  # fmt: skip
_HEADS = ("lm_head.weight", "embed_out.weight")


def read_config(directory: Path) -> dict[str, Any]:
    """Returns the config.json of a model directory.

    Raises:
        InputError: there is none, or it is no JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory} has no config.json; expected a Hugging Face model directory")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is no valid JSON ({error}); fetch it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object but {type(found).__name__}; fetch it again")
    return found


def compare_configs(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Compares configurations with the first.

    Args:
        configs: of every model by name, the template's first.

    Returns:
        What differs without making the merge impossible.

    Raises:
        InputError: models of several types or with other heads.
    """
    (first, ours), *others = configs.items()
    notes, problems = [], []
    for name, theirs in others:
        for key in (*_STRUCTURE, *_FUNCTION):
            one, other = ours.get(key), theirs.get(key)
            if one == other or (key not in ours or key not in theirs):  # absent: a default, or another version's form
                continue
            told = f"{key} is {one!r} in {first} and {other!r} in {name}"
            if key in _STRUCTURE:
                problems.append(told)
            else:
                notes.append(f"{told}; the output has {one!r}")
    if problems:
        raise InputError("the models cannot be merged:\n  " + "\n  ".join(problems))
    return notes


def output_config(
    plan: MergePlan, configs: Mapping[str, Mapping[str, Any]], template: str, dtypes: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the configuration of the output: the template's, with what the merge changes.

    Args:
        plan: of the merge.
        configs: of every model by name.
        template: whose configuration is copied.
        dtypes: of every output tensor by name.
    """
    config = dict(configs[template])
    if plan.rows:
        config["vocab_size"] = len(plan.tokens)
    if plan.num_layers is not None:
        config["num_hidden_layers"] = plan.num_layers
    inputs = {ref.model for step in plan.tensors for ref in (*([step.base] if step.base else []), *step.targets)}
    untied = any(not configs[name].get("tie_word_embeddings", False) for name in inputs)
    if config.get("tie_word_embeddings") and untied and any(name.endswith(_HEADS) for name in dtypes):
        config["tie_word_embeddings"] = False  # a head of its own was merged in
    floats = {dtype for dtype in dtypes.values() if dtype.startswith(("float", "bfloat"))}
    for key in ("dtype", "torch_dtype"):
        if key in config and len(floats) == 1:
            config[key] = next(iter(floats))
    return config
