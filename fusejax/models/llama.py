"""Llama and Mistral as Flax NNX modules: the only file that imports flax.

A module is built from the parameter tree *by name* and is itself a pytree, so it is made inside the traced
function and leaves nothing behind: `hidden_states(params, cfg, ...)` is a pure function of arrays, and the
tree of a module's state is the parameter tree again. Of NNX only Module and Param are used; never its
transforms, its optimiser, partitioning metadata or mutable state.

Layers are stacked and scanned, so that compile time does not grow with depth. Parameters may be kept in any
dtype; they are cast to `cfg.dtype` where they are used. Not here: a cache, sampling, other architectures.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from fusejax.models.config import ModelConfig
from fusejax.models.layers import apply_rope, attention, attention_mask, rms_norm, swiglu
from fusejax.models.rope import rope_tables
from fusejax.parallel.sharding import Layout, ShardingRules

__all__ = ["Llama", "head_kernel", "hidden_states", "logits"]

Tree = Mapping[str, Any]
_STREAM = ("batch", "seq", None)


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
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, params: Tree) -> None:
        query, key = ("embed", "heads", "head_dim"), ("embed", "kv_heads", "head_dim")
        self.q = Linear(params["q"], query, inputs=1)
        self.k = Linear(params["k"], key, inputs=1)
        self.v = Linear(params["v"], key, inputs=1)
        self.o = Linear(params["o"], ("heads", "head_dim", "embed"), inputs=2)

    def __call__(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], mask: jax.Array, layout: Layout
    ) -> jax.Array:
        """Returns the mixed values `[B, T, D]` of `x` `[B, T, D]`."""
        q, k = (apply_rope(project(x, layout), *rotation) for project in (self.q, self.k))
        return self.o(attention(q, k, self.v(x, layout), mask, layout), layout)


class Mlp(nnx.Module):
    """The gated feed-forward part."""

    def __init__(self, params: Tree) -> None:
        self.gate = Linear(params["gate"], ("embed", "mlp"), inputs=1)
        self.up = Linear(params["up"], ("embed", "mlp"), inputs=1)
        self.down = Linear(params["down"], ("mlp", "embed"), inputs=1)

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Returns `down(silu(gate(x)) * up(x))`, `[B, T, D]`."""
        return self.down(swiglu(self.gate(x, layout), self.up(x, layout)), layout)


class Norm(nnx.Module):
    """Root-mean-square normalisation."""

    def __init__(self, params: Tree, *, eps: float) -> None:
        self.scale = nnx.Param(params["scale"])
        self.eps = eps

    def __call__(self, x: jax.Array, layout: Layout) -> jax.Array:
        """Returns the normalised `x` `[B, T, D]`."""
        return rms_norm(x, layout.gathered(self.scale[...], ("embed",)), eps=self.eps)


class Layer(nnx.Module):
    """One decoder layer; with stacked parameters, all of them."""

    def __init__(self, params: Tree, cfg: ModelConfig) -> None:
        self.attention_norm = Norm(params["attention_norm"], eps=cfg.norm_eps)
        self.attention = Attention(params["attention"])
        self.mlp_norm = Norm(params["mlp_norm"], eps=cfg.norm_eps)
        self.mlp = Mlp(params["mlp"])

    def __call__(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], mask: jax.Array, layout: Layout
    ) -> jax.Array:
        """Returns the residual stream `[B, T, D]` after this layer."""
        x = x + self.attention(self.attention_norm(x, layout), rotation, mask, layout)
        return x + self.mlp(self.mlp_norm(x, layout), layout)


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
        self.final_norm = Norm(params["final_norm"], eps=cfg.norm_eps)
        self.head = None if cfg.tie_embeddings else Linear(params["head"], ("embed", "vocab"), inputs=1)

    def __call__(self, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array, layout: Layout) -> jax.Array:
        """Returns the hidden states `[B, T, D]` after the last norm."""
        cfg = self.cfg
        table = layout.gathered(self.embed.embedding[...], ("vocab", "embed"))
        x = layout.take_rows(table, tokens, _STREAM).astype(cfg.dtype)
        rotation = rope_tables(cfg.rope, positions, head_dim=cfg.head_dim, max_positions=cfg.max_positions)
        mask = attention_mask(segment_ids, sliding_window=cfg.sliding_window)

        def step(x: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            return layer(x, rotation, mask, layout), None

        x, _ = jax.lax.scan(_rematerialised(step, cfg.remat), x, self.layers)
        return self.final_norm(x, layout)


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
