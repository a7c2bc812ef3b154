"""Tiny Llamas in Hugging Face form, written without a model or a tokenizer trainer."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from fusejax.io.stream_read import open_tensors

__all__ = ["CONFIG", "merge_words", "read_model", "shapes", "tokenizer_json", "write_family", "write_model"]

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 40, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def shapes(config: dict = CONFIG) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of a Llama."""
    width, mlp, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{i}."
        found |= {prefix + f"self_attn.{name}_proj.weight": (width, width) for name in "qo"}
        found |= {prefix + f"self_attn.{name}_proj.weight": (narrow, width) for name in "kv"}
        found |= {prefix + f"mlp.{name}_proj.weight": (mlp, width) for name in ("gate", "up")}
        found[prefix + "mlp.down_proj.weight"] = (width, mlp)
        found |= {prefix + f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
    found["model.norm.weight"] = (width,)
    return found if config["tie_word_embeddings"] else found | {"lm_head.weight": (vocab, width)}


def write_model(directory: Path, tensors: dict[str, np.ndarray], config: dict = CONFIG, *, shards: int = 1) -> Path:
    """Writes tensors as a model directory of one or several files."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    names = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": list(tensors)[i::shards] for i in range(shards)}
    for file, own in names.items():
        save_file({name: tensors[name] for name in own}, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, own in names.items() for name in own}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_family(
    root: Path, count: int = 3, *, dtype=ml_dtypes.bfloat16, config: dict = CONFIG, shards: int = 1
) -> list[Path]:
    """Writes `base` and targets `t1`, ... that differ from it by growing amounts."""
    rng = np.random.default_rng(0)
    base = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes(config).items()}
    found = [write_model(root / "base", {n: x.astype(dtype) for n, x in base.items()}, config, shards=shards)]
    for j in range(1, count + 1):
        moved = {n: (x + rng.normal(0, 0.002 * j, x.shape)).astype(dtype) for n, x in base.items()}
        found.append(write_model(root / f"t{j}", moved, config, shards=1 + j % 2))
    return found


def read_model(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a model directory, through safetensors."""
    found = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    if not found:  # a checkpoint
        with open_tensors(directory) as opened:
            for name, tensor in opened.tensors.items():
                array = np.empty(tensor.shape, getattr(ml_dtypes, tensor.dtype, tensor.dtype))
                tensor.load().read_into(0, array.reshape(-1).view(np.uint8))
                found[name] = array
    return found


def merge_words(models: list[Path], out: Path, method: str, *more: object) -> list[str]:
    """The words of a merge of the first model and the others."""
    words = ["--method", method, "--base", models[0], "--targets", *models[1:], "--out", out, *more]
    return [str(word) for word in words]


def tokenizer_json(tokens: list[str]) -> str:
    """A tokenizer.json that lists tokens, enough for who only wants their ids."""
    model = {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(tokens)}, "unk_token": tokens[0]}
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})
