"""The architecture of a model.

`ModelConfig` is frozen and hashable, so that it can be a static argument of a jitted function. It holds
every number that changes the function a checkpoint computes. `BlockConfig` holds what the layers of one
family do and those of another do not: one decoder with a few explicit switches computes them all, and the
table below says which switches a family may turn. `fusejax.models.hf_config` translates from and to a Hugging
Face `config.json`.

SOLAR is a Llama and says so in its config. InternLM2 is one too, but for the names and the fused layout of its
weights. Not here: the dtype of the weights, which belongs to the weights. `dtype` is that of activations.
"""

from dataclasses import dataclass, field, fields

from fusejax.errors import InputError, nearest
from fusejax.models.rope import RopeConfig

__all__ = ["ARCHITECTURES", "DTYPES", "REMAT_POLICIES", "BlockConfig", "ModelConfig"]

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "internlm2": "InternLM2ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "mpt": "MptForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}
DTYPES = ("float32", "bfloat16")
REMAT_POLICIES = ("none", "full", "dots")
ATTENTION = ("auto", "auto_rows", "xla", "cudnn", "cudnn_rows")


@dataclass(frozen=True)
class BlockConfig:
    """What layers do; the defaults are those of Llama.

    `norm`: "rms" or "layer" (mean and variance), the latter with or without a bias. `gated`: the feed-forward
    part is `down(act(gate) * up)`, else `down(act(up))`; `activation`: "silu", "gelu" (exact) or "gelu_tanh".
    `parallel_residual`: attention and feed-forward part both read the layer's input. `num_experts` 0: one
    feed-forward part, else the `experts_per_token` most likely ones of them. `alibi_bias_max` 0: rotary
    positions, else linear biases (arXiv:2108.12409). `clip_qkv` 0: none. The first `full_attention_layers`
    layers ignore the sliding window.
    """

    norm: str = "rms"
    norm_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    parallel_residual: bool = False
    num_experts: int = 0
    experts_per_token: int = 2
    alibi_bias_max: float = 0.0
    clip_qkv: float = 0.0
    full_attention_layers: int = 0


# the layers of each family, and which of their fields a config may change
_PLAIN = {"norm": "layer", "gated": False, "activation": "gelu"}
_BLOCKS: dict[str, tuple[BlockConfig, tuple[str, ...]]] = {
    "qwen2": (BlockConfig(), ("full_attention_layers",)),
    "mixtral": (BlockConfig(num_experts=8), ("num_experts", "experts_per_token")),
    "mpt": (BlockConfig(**_PLAIN, alibi_bias_max=8.0), ("alibi_bias_max", "clip_qkv")),
    "gpt_neox": (
        BlockConfig(**_PLAIN, norm_bias=True, parallel_residual=True),
        ("activation", "parallel_residual"),
    ),
}
_LLAMA_BLOCK = BlockConfig()
_WINDOWED = ("mistral", "qwen2", "mixtral")
_ATTENTION_BIAS = ("llama", "qwen2", "internlm2", "gpt_neox")
_MLP_BIAS = ("llama", "gpt_neox")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model; sizes in tokens or channels.

    `num_kv_heads` 0 means as many as `num_heads`, `head_dim` 0 means `hidden_size // num_heads`, the default
    `block` means that of the architecture; all are filled in. `attention_bias`: on q, k, v and o; Qwen2 always
    has it, on q, k and v. GPT-NeoX always has `mlp_bias`. `remat` says what the backward pass keeps of a layer:
    all of it (`none`), its matrix products (`dots`) or its input only (`full`). `attention`: by the device's kernel
    where it serves (`auto`), by plain operations (`xla`) or by cuDNN (`cudnn`); `auto_rows` and `cudnn_rows` where no
    row holds two documents. `sliding_window`: a position sees itself and the `sliding_window - 1` before it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int = 0
    head_dim: int = 0
    architecture: str = "llama"
    max_positions: int = 2048
    rope: RopeConfig = field(default_factory=RopeConfig)
    sliding_window: int | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    bos_id: int | None = 1
    eos_id: int | tuple[int, ...] | None = 2
    pad_id: int | None = None
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    block: BlockConfig = _LLAMA_BLOCK

    def __post_init__(self) -> None:
        _check_choice("architecture", self.architecture, tuple(ARCHITECTURES))
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("remat", self.remat, REMAT_POLICIES)
        _check_choice("attention", self.attention, ATTENTION)
        block, _ = _BLOCKS.get(self.architecture, (_LLAMA_BLOCK, ()))
        filled = {
            "num_kv_heads": self.num_kv_heads or self.num_heads,
            "head_dim": self.head_dim or self.hidden_size // max(self.num_heads, 1),
            "block": block if self.block == _LLAMA_BLOCK else self.block,
            "attention_bias": self.attention_bias or self.architecture == "qwen2",
            "mlp_bias": self.mlp_bias or self.architecture == "gpt_neox",
        }
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        self._check_sizes()
        self._check_family()

    @property
    def rotary_dim(self) -> int:
        """How many channels of each head, the first ones, are rotated by position."""
        return int(
            self.head_dim * (1.0 if self.rope.partial_rotary_factor is None else self.rope.partial_rotary_factor)
        )

    def _check_sizes(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_positions"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} must be a positive integer, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads = {self.num_heads} is no multiple of num_kv_heads = {self.num_kv_heads}")
        if not self.block.alibi_bias_max and (self.rotary_dim < 2 or self.rotary_dim % 2):
            raise InputError(
                f"head_dim must be even for rotary embeddings, got {self.head_dim} ({self.rotary_dim} rotated)"
            )
        if self.sliding_window is not None and self.sliding_window < 1:
            raise InputError(f"sliding_window must be at least 1 or None, got {self.sliding_window}")

    def _check_family(self) -> None:
        """Raises for settings that no model of this architecture has."""
        kind = self.architecture
        block, free = _BLOCKS.get(kind, (_LLAMA_BLOCK, ()))
        names = [f.name for f in fields(BlockConfig)]
        wrong = [name for name in names if name not in free and getattr(self.block, name) != getattr(block, name)]
        if wrong:
            got = ", ".join(f"{name} = {getattr(self.block, name)!r}" for name in wrong)
            raise InputError(f"{kind} has no layers with {got}; expected {block}")
        if self.sliding_window is not None and kind not in _WINDOWED:
            raise InputError(f"{kind} has no sliding window (got {self.sliding_window}); use architecture 'mistral'")
        if (self.attention_bias and kind not in _ATTENTION_BIAS) or (self.mlp_bias and kind not in _MLP_BIAS):
            raise InputError(f"{kind} has no such biases; use architecture 'llama' or drop attention_bias and mlp_bias")
        if self.rope.partial_rotary_factor is not None and kind != "gpt_neox":
            raise InputError(f"{kind} rotates whole heads; partial_rotary_factor is for architecture 'gpt_neox'")
        if kind in ("mpt", "gpt_neox") and self.num_kv_heads != self.num_heads:
            raise InputError(f"{kind} has as many key heads as query heads, got {self.num_kv_heads}, {self.num_heads}")
        if kind in ("mpt", "gpt_neox") and self.num_heads * self.head_dim != self.hidden_size:
            raise InputError(f"{kind}: {self.num_heads} heads of {self.head_dim} are no hidden_size {self.hidden_size}")
        _check_choice("activation", self.block.activation, ("silu", "gelu", "gelu_tanh"))
        if kind == "mixtral" and not 1 <= self.block.experts_per_token <= self.block.num_experts:
            raise InputError(
                f"need 1 <= experts_per_token <= num_experts, got {self.block.experts_per_token} "
                f"and {self.block.num_experts}"
            )
        if not 0 <= self.block.full_attention_layers <= self.num_layers:
            raise InputError(
                f"full_attention_layers must be 0 to {self.num_layers}: {self.block.full_attention_layers}"
            )


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"unknown {name} {value!r}; known are {', '.join(choices)}.{nearest(str(value), choices)}")
