"""What transformers computes with torch for the models of `tests.models.families`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.models.families import CONFIGS, tokens, write_model

_RENAMED = {
    "tok_embeddings": "embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output.weight": "lm_head.weight",
}


def torch_logits(directory: Path) -> tuple[Any, np.ndarray]:
    """Returns the torch model of a directory, which must fit exactly, and its float32 logits."""
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"], report
    with torch.no_grad():
        return model, model.eval()(torch.tensor(tokens().astype(np.int64))).logits.float().numpy()


def reference(name: str, scratch: Path) -> dict[str, Any]:
    """Returns config, tensor shapes and logits `[2, LENGTH, V]` of one case."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = CONFIGS[name]
    if config["model_type"] == "internlm2":  # not in transformers: the same Llama under other names
        shapes = _internlm2_shapes(config)
        directory = _as_llama(write_model(scratch / "drawn", config, shapes), config)
    else:
        options = {key: value for key, value in config.items() if key != "model_type"}
        hf_config = AutoConfig.for_model(config["model_type"], **options)
        AutoModelForCausalLM.from_config(hf_config).save_pretrained(scratch / "initial")
        config = json.loads((scratch / "initial" / "config.json").read_text())
        with safe_open(scratch / "initial" / "model.safetensors", framework="numpy") as stored:
            shapes = {key: stored.get_slice(key).get_shape() for key in stored.keys()}  # noqa: SIM118
        directory = write_model(scratch / "drawn", config, shapes)
    return {"config": config, "shapes": shapes, "logits": torch_logits(directory)[1]}


def _internlm2_shapes(config: dict[str, Any]) -> dict[str, list[int]]:
    width, mlp, keys = config["hidden_size"], config["intermediate_size"], config["num_key_value_heads"]
    fused = width + 2 * keys * (width // config["num_attention_heads"])
    shapes = {name: [config["vocab_size"], width] for name in ("model.tok_embeddings.weight", "output.weight")}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "attention.wqkv": [fused, width],
            "attention.wo": [width, width],
            "feed_forward.w1": [mlp, width],
            "feed_forward.w3": [mlp, width],
            "feed_forward.w2": [width, mlp],
            "attention_norm": [width],
            "ffn_norm": [width],
        }.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            if config["bias"] and name.startswith("attention.w"):
                shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    return shapes | {"model.norm.weight": [width]}


def _as_llama(directory: Path, config: dict[str, Any]) -> Path:
    """Takes wqkv apart as InternLM2's code does: per key head its queries, the key, the value."""
    keys, head = config["num_key_value_heads"], config["hidden_size"] // config["num_attention_heads"]
    tensors = {}
    for name, tensor in load_file(directory / "model.safetensors").items():
        if ".wqkv." in name:
            rows = tensor.reshape(keys, -1, head, *tensor.shape[1:])
            for part, chosen in {"q": rows[:, :-2], "k": rows[:, -2], "v": rows[:, -1]}.items():
                new = name.replace("attention.wqkv", f"self_attn.{part}_proj")
                tensors[new] = np.ascontiguousarray(chosen.reshape(-1, *tensor.shape[1:]))
            continue
        for old, new in _RENAMED.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    llama = directory.with_name("llama")
    llama.mkdir()
    changed = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "attention_bias": config["bias"]}
    (llama / "config.json").write_text(json.dumps(config | changed))
    if config["bias"]:  # Llama's attention_bias is on all four, as here
        assert any(name.endswith("o_proj.bias") for name in tensors)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    return llama
