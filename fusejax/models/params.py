"""The parameter table: one row per leaf, from which everything else about parameters is derived.

A row holds shape, logical axes, initialiser and the Hugging Face tensor it corresponds to. Initialisation,
abstract trees, shardings, the weight-decay mask, import, export and shape checks read this table and
nothing else. Layers are stacked: a leaf under `layers.` has a leading axis `layers`, and one Hugging Face
tensor per layer.

A kernel is kept as [inputs..., outputs...]; Hugging Face keeps [outputs, inputs] flat. Because rotary
embeddings stay half-split as there, conversion is a reshape and a transpose and nothing else.
"""

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import InputError
from fusejax.models.config import ModelConfig
from fusejax.parallel.paths import flatten_paths, unflatten_paths

__all__ = [
    "ParamSpec",
    "abstract_params",
    "check_params",
    "count_params",
    "decay_mask",
    "init_params",
    "param_table",
]


@dataclass(frozen=True)
class ParamSpec:
    """One leaf of the parameter tree."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical axes, as many as dimensions
    initializer: str  # "normal" (standard deviation initializer_range), "ones" or "zeros"
    hf_name: str  # with {layer} where the leaf is stacked
    inputs: int = 0  # for kernels: how many axes (after layers) are inputs; 0: kept as it is

    @property
    def stacked(self) -> bool:
        """Whether the leading axis counts layers."""
        return self.axes[0] == "layers"

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape without the leading axis of layers."""
        return self.shape[1:] if self.stacked else self.shape

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one Hugging Face tensor."""
        shape = self.layer_shape
        if self.inputs:
            return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])
        return shape if self.hf_name.endswith("embed_tokens.weight") else (math.prod(shape),)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: matrices with an embed axis, never norms or biases."""
        return "embed" in self.axes and len(self.layer_shape) > 1

    def hf_names(self) -> list[str]:
        """Returns the names of the Hugging Face tensors, one per layer where stacked."""
        return [self.hf_name.format(layer=i) for i in range(self.shape[0])] if self.stacked else [self.hf_name]

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns one Hugging Face tensor in our layout (one layer of a stacked leaf); a view."""
        return (tensor.T if self.inputs else tensor).reshape(self.layer_shape)

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        """Returns one layer (or an unstacked leaf) in the Hugging Face layout; a view."""
        shape = self.hf_shape
        return leaf.reshape(shape[::-1]).T if self.inputs else leaf.reshape(shape)


def param_table(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Returns the rows of a model's parameters by dotted path, in the order of computation."""
    width, mlp, count = cfg.hidden_size, cfg.intermediate_size, cfg.num_layers
    heads, kv_heads, head_dim = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    embedding = ParamSpec((cfg.vocab_size, width), ("vocab", "embed"), "normal", "model.embed_tokens.weight")
    table = {"embed.embedding": embedding}

    def norm(path: str, hf_name: str) -> None:
        table[f"layers.{path}.scale"] = ParamSpec(
            (count, width), ("layers", "embed"), "ones", f"model.layers.{{layer}}.{hf_name}.weight"
        )

    def linear(path: str, hf_name: str, inputs: dict[str, int], outputs: dict[str, int], *, bias: bool) -> None:
        shape, axes = (*inputs.values(), *outputs.values()), (*inputs, *outputs)
        name = f"model.layers.{{layer}}.{hf_name}"
        table[f"layers.{path}.kernel"] = ParamSpec(
            (count, *shape), ("layers", *axes), "normal", f"{name}.weight", len(inputs)
        )
        if bias:
            table[f"layers.{path}.bias"] = ParamSpec(
                (count, *outputs.values()), ("layers", *outputs), "zeros", f"{name}.bias"
            )

    embed = {"embed": width}
    query, key = {"heads": heads, "head_dim": head_dim}, {"kv_heads": kv_heads, "head_dim": head_dim}
    norm("attention_norm", "input_layernorm")
    for name, outputs in {"q": query, "k": key, "v": key}.items():
        linear(f"attention.{name}", f"self_attn.{name}_proj", embed, outputs, bias=cfg.attention_bias)
    linear("attention.o", "self_attn.o_proj", query, embed, bias=cfg.attention_bias)
    norm("mlp_norm", "post_attention_layernorm")
    for name in ("gate", "up"):
        linear(f"mlp.{name}", f"mlp.{name}_proj", embed, {"mlp": mlp}, bias=cfg.mlp_bias)
    linear("mlp.down", "mlp.down_proj", {"mlp": mlp}, embed, bias=cfg.mlp_bias)
    table["final_norm.scale"] = ParamSpec((width,), ("embed",), "ones", "model.norm.weight")
    if not cfg.tie_embeddings:
        shape, axes = (width, cfg.vocab_size), ("embed", "vocab")
        table["head.kernel"] = ParamSpec(shape, axes, "normal", "lm_head.weight", 1)
    return table


@functools.partial(jax.jit, static_argnames=("cfg", "dtype"))
def init_params(cfg: ModelConfig, key: jax.Array, *, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Returns freshly drawn parameters; each leaf depends on the key and its own path only."""
    leaves = {}
    for path, spec in param_table(cfg).items():
        if spec.initializer == "normal":
            leaf_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
            leaves[path] = (cfg.initializer_range * jax.random.normal(leaf_key, spec.shape)).astype(dtype)
        else:
            leaves[path] = jnp.full(spec.shape, 1.0 if spec.initializer == "ones" else 0.0, dtype)
    return unflatten_paths(leaves)


def abstract_params(cfg: ModelConfig, *, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Returns the tree of `jax.ShapeDtypeStruct` of a model's parameters."""
    table = param_table(cfg)
    return unflatten_paths({path: jax.ShapeDtypeStruct(spec.shape, dtype) for path, spec in table.items()})


def decay_mask(cfg: ModelConfig) -> dict[str, Any]:
    """Returns the tree of booleans that says which leaves weight decay applies to."""
    return unflatten_paths({path: spec.decays for path, spec in param_table(cfg).items()})


def count_params(cfg: ModelConfig) -> int:
    """Returns the number of parameters; a tied head counts once."""
    return sum(math.prod(spec.shape) for spec in param_table(cfg).values())


def check_params(params: Mapping[str, Any], cfg: ModelConfig) -> None:
    """Raises one `InputError` that lists every missing, unexpected or wrongly shaped leaf."""
    table, flat = param_table(cfg), flatten_paths(params)
    problems = [f"missing: {path} {spec.shape}" for path, spec in table.items() if path not in flat]
    problems += [f"unexpected: {path} {tuple(leaf.shape)}" for path, leaf in flat.items() if path not in table]
    problems += [
        f"shape: {path} is {tuple(flat[path].shape)}, expected {spec.shape}"
        for path, spec in table.items()
        if path in flat and tuple(flat[path].shape) != spec.shape
    ]
    if problems:
        raise InputError("the parameters do not fit the model config:\n  " + "\n  ".join(problems))
