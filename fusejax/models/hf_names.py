"""How Hugging Face checkpoints of each family name their tensors, and which of them hold several of our leaves.

A name is given without its ending (`.weight`, `.bias`). `{layer}` and `{expert}` are counted. Where a checkpoint
keeps q, k and v in one tensor, its rows are `groups` times `slots` heads, and a leaf is a range of the slots:
InternLM2 has a group per key head (its query heads, the key, the value), GPT-NeoX a group per head, MPT one
group of all queries, all keys, all values.
"""

from dataclasses import dataclass

import numpy as np

from fusejax.models.config import ModelConfig

__all__ = ["FusedSlice", "fused_slices", "hf_names"]

_LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_EXPERT = "block_sparse_moe.experts.{expert}"
_MIXTRAL_LAYER = _LLAMA_LAYER | {
    "mlp.router": "block_sparse_moe.gate",
    "mlp.gate": f"{_EXPERT}.w1",
    "mlp.up": f"{_EXPERT}.w3",
    "mlp.down": f"{_EXPERT}.w2",
}
_INTERNLM2_LAYER = {
    "attention_norm": "attention_norm",
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attention.wqkv"),
    "attention.o": "attention.wo",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "feed_forward.w1",
    "mlp.up": "feed_forward.w3",
    "mlp.down": "feed_forward.w2",
}
_MPT_LAYER = {
    "attention_norm": "norm_1",
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attn.Wqkv"),
    "attention.o": "attn.out_proj",
    "mlp_norm": "norm_2",
    "mlp.up": "ffn.up_proj",
    "mlp.down": "ffn.down_proj",
}
_GPT_NEOX_LAYER = {
    "attention_norm": "input_layernorm",
    **dict.fromkeys(("attention.q", "attention.k", "attention.v"), "attention.query_key_value"),
    "attention.o": "attention.dense",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.dense_h_to_4h",
    "mlp.down": "mlp.dense_4h_to_h",
}
# architecture -> embedding, layer prefix, final norm, head, names within a layer
_FAMILIES = {
    "internlm2": ("model.tok_embeddings", "model.layers", "model.norm", "output", _INTERNLM2_LAYER),
    "mixtral": ("model.embed_tokens", "model.layers", "model.norm", "lm_head", _MIXTRAL_LAYER),
    "mpt": ("transformer.wte", "transformer.blocks", "transformer.norm_f", "lm_head", _MPT_LAYER),
    "gpt_neox": (
        "gpt_neox.embed_in",
        "gpt_neox.layers",
        "gpt_neox.final_layer_norm",
        "embed_out",
        _GPT_NEOX_LAYER,
    ),
}
_LLAMA = ("model.embed_tokens", "model.layers", "model.norm", "lm_head", _LLAMA_LAYER)


@dataclass(frozen=True)
class FusedSlice:
    """Heads `start:stop` of the `slots` of each of `groups`, in the rows of a tensor `[groups * slots * H, ...]`."""

    groups: int
    slots: int
    start: int
    stop: int

    def rows(self, head_dim: int) -> int:
        """Returns the number of rows of the whole tensor."""
        return self.groups * self.slots * head_dim

    def take(self, whole: np.ndarray) -> np.ndarray:
        """Returns this slice's rows of the whole tensor."""
        rest = whole.shape[1:]
        return whole.reshape(self.groups, self.slots, -1, *rest)[:, self.start : self.stop].reshape(-1, *rest)

    def put(self, whole: np.ndarray, part: np.ndarray) -> None:
        """Writes this slice's rows into the whole tensor, which must be contiguous."""
        rest, count = whole.shape[1:], self.stop - self.start
        view = whole.reshape(self.groups, self.slots, -1, *rest)
        view[:, self.start : self.stop] = part.reshape(self.groups, count, -1, *rest)


def hf_names(architecture: str) -> dict[str, str]:
    """Returns our paths without their ending (`layers.mlp.up`, `embed`, `final_norm`, `head`) -> tensor names."""
    embedding, layers, norm, head, inside = _FAMILIES.get(architecture, _LLAMA)
    named = {f"layers.{path}": f"{layers}.{{layer}}.{name}" for path, name in inside.items()}
    return {"embed": embedding, "final_norm": norm, "head": head, **named}


def fused_slices(cfg: ModelConfig) -> dict[str, FusedSlice]:
    """Returns the paths of leaves that share a tensor, and where they lie in it; empty where none do."""
    heads, keys = cfg.num_heads, cfg.num_kv_heads
    if cfg.architecture in ("internlm2", "gpt_neox"):
        groups, queries, single = keys, heads // keys, 1
    elif cfg.architecture == "mpt":
        groups, queries, single = 1, heads, keys
    else:
        return {}
    ends = {"q": (0, queries), "k": (queries, queries + single), "v": (queries + single, queries + 2 * single)}
    slots = queries + 2 * single
    return {f"layers.attention.{name}": FusedSlice(groups, slots, *end) for name, end in ends.items()}
