"""The parameter table: one row per leaf, from which everything else about parameters is derived.

A row holds shape, logical axes, initialiser and the Hugging Face tensor it corresponds to. Initialisation,
abstract trees, shardings, the weight-decay mask, import, export and shape checks read this table and
nothing else. Layers are stacked: a leaf under `layers.` has a leading axis `layers`, and one Hugging Face
tensor per layer; the experts of a layer are a second such axis.

Every family has the same paths (q, k and v apart, a feed-forward part of gate, up and down), however its
checkpoints are laid out: `FusedSlice` takes a leaf out of a tensor that holds several, and puts it back.

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
from fusejax.models.hf_names import FusedSlice, fused_slices, hf_names
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
    hf_name: str  # with {layer} and {expert} where the leaf is stacked
    inputs: int = 0  # for kernels: how many axes (after layers and experts) are inputs; 0: kept as it is
    fused: FusedSlice | None = None  # where the leaf lies in a tensor that holds several

    @property
    def stack(self) -> tuple[int, ...]:
        """The leading sizes that count tensors: layers, and experts where there are any."""
        # the last axis never does: a router's outputs are experts, too
        return self.shape[: sum(axis in ("layers", "experts") for axis in self.axes[:-1])]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape without the leading axes of layers and experts."""
        return self.shape[len(self.stack) :]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """The shape of one Hugging Face tensor."""
        shape = self.layer_shape
        if self.inputs:
            rows = self.fused.rows(shape[-1]) if self.fused else math.prod(shape[self.inputs :])
            return rows, math.prod(shape[: self.inputs])
        if self.fused:
            return (self.fused.rows(shape[-1]),)
        return shape if self.axes[0] == "vocab" else (math.prod(shape),)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: matrices with an embed axis, never norms or biases."""
        return "embed" in self.axes and len(self.layer_shape) > 1

    def hf_names(self) -> list[str]:
        """Returns the names of the Hugging Face tensors, in the order of the stacked axes."""
        return [
            self.hf_name.format(**dict(zip(("layer", "expert"), index, strict=False)))
            for index in np.ndindex(*self.stack)
        ]

    def from_hf(self, tensor: np.ndarray) -> np.ndarray:
        """Returns one Hugging Face tensor in our layout (one entry of a stacked leaf); a view where not fused."""
        part = self.fused.take(tensor) if self.fused else tensor
        return (part.T if self.inputs else part).reshape(self.layer_shape)

    def to_hf(self, leaf: np.ndarray) -> np.ndarray:
        """Returns one entry (or an unstacked leaf) in the Hugging Face layout; a view.

        Of a fused tensor these are the leaf's own rows, for `FusedSlice.put`.
        """
        if self.inputs:
            columns = math.prod(self.layer_shape[: self.inputs])
            return leaf.reshape(columns, -1).T
        return leaf if self.axes[0] == "vocab" else leaf.reshape(-1)


def param_table(cfg: ModelConfig) -> dict[str, ParamSpec]:
    """Returns the rows of a model's parameters by dotted path, in the order of computation."""
    names, fused, block = hf_names(cfg.architecture), fused_slices(cfg), cfg.block
    table: dict[str, ParamSpec] = {}

    def add(path: str, leaf: str, sizes: dict[str, int], initializer: str, inputs: int = 0) -> None:
        stacked = {"layers": cfg.num_layers} if path.startswith("layers.") else {}
        ending = "bias" if leaf == "bias" else "weight"
        shape, axes = (*stacked.values(), *sizes.values()), (*stacked, *sizes)
        name = f"{names[path]}.{ending}"
        table[f"{path}.{leaf}"] = ParamSpec(shape, axes, initializer, name, inputs, fused.get(path))

    def norm(path: str) -> None:
        add(path, "scale", embed, "ones")
        if block.norm_bias:
            add(path, "bias", embed, "zeros")

    def linear(path: str, inputs: dict[str, int], outputs: dict[str, int], *, bias: bool = False) -> None:
        experts = {"experts": block.num_experts} if "{expert}" in names[path] else {}
        add(path, "kernel", experts | inputs | outputs, "normal", len(inputs))
        if bias:
            add(path, "bias", outputs, "zeros")

    embed, mlp, vocab = {"embed": cfg.hidden_size}, {"mlp": cfg.intermediate_size}, {"vocab": cfg.vocab_size}
    query = {"heads": cfg.num_heads, "head_dim": cfg.head_dim}
    key = {"kv_heads": cfg.num_kv_heads, "head_dim": cfg.head_dim}
    add("embed", "embedding", vocab | embed, "normal")
    norm("layers.attention_norm")
    for name, outputs in {"q": query, "k": key, "v": key}.items():
        linear(f"layers.attention.{name}", embed, outputs, bias=cfg.attention_bias)
    linear("layers.attention.o", query, embed, bias=cfg.attention_bias and cfg.architecture != "qwen2")
    norm("layers.mlp_norm")
    if block.num_experts:
        linear("layers.mlp.router", embed, {"experts": block.num_experts})
    for name in ("gate", "up") if block.gated else ("up",):
        linear(f"layers.mlp.{name}", embed, mlp, bias=cfg.mlp_bias)
    linear("layers.mlp.down", mlp, embed, bias=cfg.mlp_bias)
    norm("final_norm")
    if not cfg.tie_embeddings:
        linear("head", embed, vocab)
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
