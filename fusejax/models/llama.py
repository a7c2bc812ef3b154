"""Llama and its relatives as Flax NNX modules: the only file that imports flax.

One decoder computes every family: `cfg.block` says which norm, feed-forward part, positions and residual its
layers have. Experts are computed densely, one after another over all tokens, and weighted: `num_experts /
experts_per_token` times the work that routing needs, but the memory of one expert's activations, no capacity,
no dropped token, and the same program on every mesh. That is right for running a source; to train one at
scale, group the tokens by expert.

A module is built from the parameter tree *by name* and is itself a pytree, so it is made inside the traced
function and leaves nothing behind: `hidden_states(params, cfg, ...)` is a pure function of arrays, and the
tree of a module's state is the parameter tree again. Of NNX only Module and Param are used; never its
transforms, its optimiser, partitioning metadata or mutable state.

Layers are stacked and scanned, so that compile time does not grow with depth. Parameters may be kept in any
dtype; they are cast to `cfg.dtype` where they are used. Not here: a cache, sampling, the router's auxiliary loss.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fusejax.models.config import BlockConfig, ModelConfig
from fusejax.models.layers import (
    activate,
    alibi_bias,
    apply_rope,
    attention,
    attention_mask,
    expert_weights,
    layer_norm,
    rms_norm,
)
from fusejax.models.rope import rope_tables
from fusejax.parallel.sharding import Layout, ShardingRules

__all__ = ["Llama", "head_kernel", "hidden_states", "logits"]

Tree = Mapping[str, Any]
_STREAM = ("batch", "seq", None)


class Reading(NamedTuple):
    """Who reads whom, and how positions enter; the same for all layers, but for `mask`."""

    mask: jax.Array  # [B, 1, T, T] bool
    rotation: tuple[jax.Array, jax.Array] | None  # cos and sin [B, T, R / 2]
    bias: jax.Array | None  # [1, N, T, T]


class Linear(nnx.Module):
    """A matrix product and an optional bias."""

    def __init__(self, params: Tree, axes: tuple[str, ...], *, inputs: int) -> None:
        self.kernel = nnx.Param(params["kernel"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        self.axes = axes
        self.inputs = inputs

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Contracts the last `inputs` axes of `x` `[B, T, ...]`."""
        kernel = layout.gathered(self.kernel[...].astype(x.dtype), self.axes)
        outputs = tuple(None if axis == "embed" else axis for axis in self.axes[self.inputs :])
        summed, produced = "xy"[: self.inputs], "uv"[: len(outputs)]
        y = layout.einsum(f"bt{summed},{summed}{produced}->bt{produced}", x, kernel, ("batch", "seq", *outputs))
        if self.bias is None:
            return y
        return y + layout.gathered(self.bias[...].astype(x.dtype), self.axes[self.inputs :])


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions or linear biases."""

    def __init__(self, params: Tree, *, clip: float) -> None:
        query, key = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q = Linear(params["q"], query, inputs=1)
        self.k = Linear(params["k"], key, inputs=1)
        self.v = Linear(params["v"], key, inputs=1)
        self.o = Linear(params["o"], ("heads", "head_dim", "embed"), inputs=2)
        self.clip = clip

    def __call__(self, x: jax.Array, reading: Reading, layout: Layout) -> jax.Array:
        """Returns the mixed values `[B, T, D]` of `x` `[B, T, D]`."""
        q, k, v = (project(x, layout) for project in (self.q, self.k, self.v))
        if self.clip:
            q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
        if reading.rotation is not None:
            q, k = (apply_rope(y, *reading.rotation) for y in (q, k))
        return self.o(attention(q, k, v, reading.mask, layout, bias=reading.bias), layout)


class Mlp(nnx.Module):
    """The feed-forward part, gated or plain."""

    def __init__(self, params: Tree, *, activation: str) -> None:
        self.gate = Linear(params["gate"], ("embed", "mlp"), inputs=1) if "gate" in params else None
        self.up = Linear(params["up"], ("embed", "mlp"), inputs=1)
        self.down = Linear(params["down"], ("mlp", "embed"), inputs=1)
        self.activation = activation

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Returns `down(act(gate(x)) * up(x))` or `down(act(up(x)))`, `[B, T, D]`."""
        up = self.up(x, layout)
        if self.gate is None:
            return self.down(activate(up, self.activation), layout)
        return self.down(activate(self.gate(x, layout), self.activation) * up, layout)


class SparseMlp(nnx.Module):
    """A router, and experts of which the likeliest few count at each position."""

    def __init__(self, params: Tree, block: BlockConfig) -> None:
        self.router = Linear(params["router"], ("embed", "experts"), inputs=1)
        self.gate = Linear(params["gate"], ("embed", "mlp"), inputs=1)
        self.up = Linear(params["up"], ("embed", "mlp"), inputs=1)
        self.down = Linear(params["down"], ("mlp", "embed"), inputs=1)
        self.count = block.experts_per_token

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Returns the weighted sum of the experts' outputs, `[B, T, D]`."""
        weights = expert_weights(self.router(x, layout), count=self.count)

        def add(total: jax.Array, expert: tuple[Linear, Linear, Linear, jax.Array]) -> tuple[jax.Array, None]:
            gate, up, down, weight = expert
            y = down(activate(gate(x, layout), "silu") * up(x, layout), layout)
            return total + y * weight[..., None].astype(x.dtype), None

        experts = (self.gate, self.up, self.down, jnp.moveaxis(weights, -1, 0))
        return jax.lax.scan(add, jnp.zeros_like(x), experts)[0]


class Norm(nnx.Module):
    """Root-mean-square or layer normalisation."""

    def __init__(self, params: Tree, *, kind: str, eps: float) -> None:
        self.scale = nnx.Param(params["scale"])
        self.bias = nnx.Param(params["bias"]) if "bias" in params else None
        self.kind = kind
        self.eps = eps

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Returns the normalised `x` `[B, T, D]`."""
        scale = layout.gathered(self.scale[...], ("embed",))
        if self.kind == "rms":
            return rms_norm(x, scale, eps=self.eps)
        bias = None if self.bias is None else layout.gathered(self.bias[...], ("embed",))
        return layer_norm(x, scale, bias, eps=self.eps)


class Layer(nnx.Module):
    """One decoder layer; with stacked parameters, all of them."""

    def __init__(self, params: Tree, cfg: ModelConfig) -> None:
        block = cfg.block
        self.attention_norm = Norm(params["attention_norm"], kind=block.norm, eps=cfg.norm_eps)
        self.attention = Attention(params["attention"], clip=block.clip_qkv)
        self.mlp_norm = Norm(params["mlp_norm"], kind=block.norm, eps=cfg.norm_eps)
        mlp = params["mlp"]
        self.mlp = SparseMlp(mlp, block) if block.num_experts else Mlp(mlp, activation=block.activation)
        self.parallel = block.parallel_residual

    def __call__(self, x: jax.Array, reading: Reading, layout: Layout) -> jax.Array:
        """Returns the residual stream `[B, T, D]` after this layer."""
        mixed = x + self.attention(self.attention_norm(x, layout), reading, layout)
        return mixed + self.mlp(self.mlp_norm(x if self.parallel else mixed, layout), layout)


class Embed(nnx.Module):
    """The table of token embeddings."""

    def __init__(self, params: Tree) -> None:
        self.embedding = nnx.Param(params["embedding"])


class Llama(nnx.Module):
    """A decoder over a parameter tree as `fusejax.models.params` documents it."""

    def __init__(self, params: Tree, cfg: ModelConfig) -> None:
        self.cfg = cfg
        self.embed = Embed(params["embed"])
        self.layers = Layer(params["layers"], cfg)
        self.final_norm = Norm(params["final_norm"], kind=cfg.block.norm, eps=cfg.norm_eps)
        self.head = None if cfg.tie_embeddings else Linear(params["head"], ("embed", "vocab"), inputs=1)

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, layout: Layout) -> jax.Array:
        """Returns the hidden states `[B, T, D]` after the last norm."""
        cfg = self.cfg
        table = layout.gathered(self.embed.embedding[...], ("vocab", "embed"))
        x = layout.take_rows(table, tokens, _STREAM).astype(cfg.dtype)
        reading = self._reading(tokens.shape[1], positions, segment_ids)
        whole = None  # the mask of the layers that ignore the sliding window
        if cfg.sliding_window is not None and cfg.block.full_attention_layers:
            whole = attention_mask(segment_ids)

        def step(x: jax.Array, layer: tuple[Layer, jax.Array | None]) -> tuple[jax.Array, None]:
            module, ignores = layer
            if whole is None or ignores is None:
                return module(x, reading, layout), None
            return module(x, reading._replace(mask=jnp.where(ignores, whole, reading.mask)), layout), None

        ignores = None if whole is None else jnp.arange(cfg.num_layers) < cfg.block.full_attention_layers
        x, _ = jax.lax.scan(_rematerialised(step, cfg.remat), x, (self.layers, ignores))
        return self.final_norm(x, layout)

    def _reading(self, length: int, positions: jax.Array, segment_ids: jax.Array) -> Reading:
        cfg, block = self.cfg, self.cfg.block
        mask = attention_mask(segment_ids, sliding_window=cfg.sliding_window)
        if block.alibi_bias_max:
            return Reading(mask, None, alibi_bias(cfg.num_heads, length, bias_max=block.alibi_bias_max))
        rotation = rope_tables(cfg.rope, positions, head_dim=cfg.rotary_dim, max_positions=cfg.max_positions)
        return Reading(mask, rotation, None)


def hidden_states(
    params: Tree,
    cfg: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> jax.Array:
    """Returns the hidden states `[B, T, D]` after the last norm, in `cfg.dtype`.

    Args:
        params: the parameter tree, see `fusejax.models.params.param_table`; any float dtype.
        cfg: the architecture (static).
        tokens: `[B, T]` int32, below `cfg.vocab_size`; others read NaN.
        positions: `[B, T]` int32, position within the document.
        segment_ids: `[B, T]` int32, document within the row from 1; 0 is padding.
        mesh: the mesh that parameters and batch lie on; None on one device.
        rules: where logical axes lie; the default rules if None.
    """
    layout = Layout(mesh, rules or ShardingRules())
    return Llama(params, cfg)(tokens, positions, segment_ids, layout)


def head_kernel(params: Tree, cfg: ModelConfig) -> tuple[jax.Array, str]:
    """Returns the output matrix and its layout: `[V, D]` "vd" where tied to the embedding, else `[D, V]` "dv"."""
    if cfg.tie_embeddings:
        return params["embed"]["embedding"], "vd"
    return params["head"]["kernel"], "dv"


def logits(
    params: Tree,
    cfg: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> jax.Array:
    """Returns float32 logits `[B, T, V]`; for tests and small models, as it holds all of them."""
    layout = Layout(mesh, rules or ShardingRules())
    hidden = hidden_states(params, cfg, tokens, positions, segment_ids, mesh=mesh, rules=rules)
    kernel, form = head_kernel(params, cfg)
    kernel = layout.gathered(kernel.astype(hidden.dtype), ("vocab", "embed") if form == "vd" else ("embed", "vocab"))
    axes = ("batch", "seq", "vocab")
    return layout.einsum(f"btd,{form}->btv", hidden, kernel, axes, preferred_element_type=jnp.float32)


def _rematerialised(step: Any, policy: str) -> Any:
    """Wraps a scanned step so that its backward pass keeps only what the policy names."""
    if policy == "none":
        return step
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if policy == "dots" else None
    return jax.checkpoint(step, policy=keep, prevent_cse=False)
