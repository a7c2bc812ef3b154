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
dtype; they are cast to `cfg.dtype` where they are used. `cached_states` is the same decoder over a cache of keys
and values, for `fusejax.models.generation`. Not here: sampling, the router's auxiliary loss.
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

__all__ = ["Cache", "Llama", "cached_states", "head_kernel", "hidden_states", "logits"]

Tree = Mapping[str, Any]


class Reading(NamedTuple):
    """Who reads whom, and how positions enter; the same for all layers, but for `mask`."""

    mask: jax.Array  # [B, 1, T, S] bool; S keys, T of them without a cache
    rotation: tuple[jax.Array, jax.Array] | None  # cos and sin [B, T, R / 2]
    bias: jax.Array | None  # [1, N, T, S]
    segments: jax.Array | None = None  # [B, T] int32, where they and the window say what the mask says


class Cache(NamedTuple):
    """Keys and values of all layers in slots; slot j of a row holds what its j-th column said."""

    keys: jax.Array  # [L, B, S, Nkv, H]
    values: jax.Array  # [L, B, S, Nkv, H]

    @classmethod
    def empty(cls, cfg: ModelConfig, rows: int, slots: int) -> "Cache":
        """Returns a cache of zeros in `cfg.dtype`."""
        shape = (cfg.num_layers, rows, slots, cfg.num_kv_heads, cfg.head_dim)
        return cls(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))

    def put(self, keys: jax.Array, values: jax.Array, slot: jax.Array) -> "Cache":
        """Writes `[B, T, Nkv, H]` from `slot` on into one layer's `[B, S, Nkv, H]`."""
        update = jax.lax.dynamic_update_slice_in_dim
        return Cache(update(self.keys, keys, slot, axis=1), update(self.values, values, slot, axis=1))


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
        positions = "stream" if "embed" in self.axes[self.inputs :] else "seq"
        y = layout.einsum(f"bt{summed},{summed}{produced}->bt{produced}", x, kernel, ("batch", positions, *outputs))
        if self.bias is None:
            return y
        return y + layout.gathered(self.bias[...].astype(x.dtype), self.axes[self.inputs :])


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions or linear biases."""

    def __init__(self, params: Tree, cfg: ModelConfig) -> None:
        query, key = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q = Linear(params["q"], query, inputs=1)
        self.k = Linear(params["k"], key, inputs=1)
        self.v = Linear(params["v"], key, inputs=1)
        self.o = Linear(params["o"], ("heads", "head_dim", "embed"), inputs=2)
        self.clip = cfg.block.clip_qkv
        self.window, self.implementation = cfg.sliding_window, cfg.attention

    def __call__(
        self, x: jax.Array, reading: Reading, layout: Layout, *, cache: Cache | None = None, slot: Any = None
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the mixed values `[B, T, D]` of `x` `[B, T, D]`, and the layer's cache with them in it."""
        x = layout.whole(x)
        q, k, v = (project(x, layout) for project in (self.q, self.k, self.v))
        if self.clip:
            q, k, v = (jnp.clip(y, -self.clip, self.clip) for y in (q, k, v))
        if reading.rotation is not None:
            q, k = (apply_rope(y, *reading.rotation) for y in (q, k))
        if cache is not None:
            cache = cache.put(k, v, slot)
            k, v = cache
        given = {"bias": reading.bias, "segments": reading.segments, "window": self.window}
        mixed = attention(q, k, v, reading.mask, layout, implementation=self.implementation, **given)
        return self.o(mixed, layout), cache


class Mlp(nnx.Module):
    """The feed-forward part, gated or plain."""

    def __init__(self, params: Tree, *, activation: str) -> None:
        self.gate = Linear(params["gate"], ("embed", "mlp"), inputs=1) if "gate" in params else None
        self.up = Linear(params["up"], ("embed", "mlp"), inputs=1)
        self.down = Linear(params["down"], ("mlp", "embed"), inputs=1)
        self.activation = activation

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Returns `down(act(gate(x)) * up(x))` or `down(act(up(x)))`, `[B, T, D]`."""
        x = layout.whole(x)
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
        x = layout.whole(x)
        weights = layout.spread(expert_weights(self.router(x, layout), count=self.count))

        def add(total: jax.Array, expert: tuple[Linear, Linear, Linear, jax.Array]) -> tuple[jax.Array, None]:
            gate, up, down, weight = expert
            y = down(activate(gate(x, layout), "silu") * up(x, layout), layout)
            return total + y * weight[..., None].astype(x.dtype), None

        experts = (self.gate, self.up, self.down, jnp.moveaxis(weights, -1, 0))
        return jax.lax.scan(add, layout.spread(jnp.zeros_like(x)), experts)[0]


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
        self.attention = Attention(params["attention"], cfg)
        self.mlp_norm = Norm(params["mlp_norm"], kind=block.norm, eps=cfg.norm_eps)
        mlp = params["mlp"]
        self.mlp = SparseMlp(mlp, block) if block.num_experts else Mlp(mlp, activation=block.activation)
        self.parallel = block.parallel_residual

    def __call__(
        self, x: jax.Array, reading: Reading, layout: Layout, *, cache: Cache | None = None, slot: Any = None
    ) -> tuple[jax.Array, Cache | None]:
        """Returns the residual stream `[B, T, D]` after this layer, and the layer's cache."""
        attended, cache = self.attention(self.attention_norm(x, layout), reading, layout, cache=cache, slot=slot)
        mixed = x + attended
        return mixed + self.mlp(self.mlp_norm(x if self.parallel else mixed, layout), layout), cache


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
        cfg, whole = self.cfg, None
        mask = attention_mask(segment_ids, sliding_window=cfg.sliding_window)
        if self._some_ignore_the_window:
            whole = attention_mask(segment_ids)
        bias = self._bias(jnp.arange(tokens.shape[1]), tokens.shape[1])
        reading = self._reading(positions, mask, bias)._replace(segments=segment_ids if whole is None else None)
        return self._decode(tokens, reading, whole, layout)[0]

    def continued(
        self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, cache: Cache, slot: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Returns what `cached_states` does."""
        cfg, whole = self.cfg, None
        rows, slots = slot + jnp.arange(tokens.shape[1]), segment_ids.shape[1]
        queries = jax.lax.dynamic_slice_in_dim(segment_ids, slot, tokens.shape[1], axis=1)
        mask = attention_mask(segment_ids, sliding_window=cfg.sliding_window, queries=queries, rows=rows)
        if self._some_ignore_the_window:
            whole = attention_mask(segment_ids, queries=queries, rows=rows)
        reading = self._reading(positions, mask, self._bias(rows, slots))
        layout = Layout(None, ShardingRules())
        hidden, cache = self._decode(tokens, reading, whole, layout, cache=cache, slot=slot)
        return hidden, cache

    def _decode(
        self, tokens: jax.Array, reading: Reading, whole: jax.Array | None, layout: Layout, **cached: Any
    ) -> tuple[jax.Array, Any]:
        """Runs the layers; `whole` is the mask of those that ignore the sliding window."""
        cfg = self.cfg
        x = layout.spread(layout.take_rows(self.embed.embedding[...], tokens, dtype=cfg.dtype))

        def step(x: jax.Array, layer: tuple[Layer, jax.Array | None, Cache | None]) -> tuple[jax.Array, Cache | None]:
            module, ignores, cache = layer
            if whole is None or ignores is None:
                return module(x, reading, layout, cache=cache, slot=cached.get("slot"))
            mask = jnp.where(ignores, whole, reading.mask)
            return module(x, reading._replace(mask=mask), layout, cache=cache, slot=cached.get("slot"))

        ignores = None if whole is None else jnp.arange(cfg.num_layers) < cfg.block.full_attention_layers
        x, cache = jax.lax.scan(_rematerialised(step, cfg.remat), x, (self.layers, ignores, cached.get("cache")))
        return layout.whole(self.final_norm(x, layout)), cache

    @property
    def _some_ignore_the_window(self) -> bool:
        return self.cfg.sliding_window is not None and bool(self.cfg.block.full_attention_layers)

    def _bias(self, rows: jax.Array, keys: int) -> jax.Array | None:
        largest = self.cfg.block.alibi_bias_max
        return alibi_bias(self.cfg.num_heads, keys, bias_max=largest, rows=rows) if largest else None

    def _reading(self, positions: jax.Array, mask: jax.Array, bias: jax.Array | None) -> Reading:
        cfg = self.cfg
        if bias is not None:
            return Reading(mask, None, bias)
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


def cached_states(
    params: Tree,
    cfg: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    cache: Cache,
    slot: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Returns the hidden states `[B, T, D]` of T tokens that follow what the cache holds, and the cache with them.

    Args:
        params, cfg: as for `hidden_states`; one device.
        tokens, positions: `[B, T]` int32, of the columns `slot` to `slot + T`.
        segment_ids: `[B, S]` int32 of every slot: 1 where a row reads it, 0 where it is padding.
        cache: filled in the slots before `slot`.
        slot: int32 scalar.
    """
    return Llama(params, cfg).continued(tokens, positions, segment_ids, cache, slot)


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
