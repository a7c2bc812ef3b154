"""Models that a run makes first: trained from random weights, or on from another model, on text of their own."""

__all__ = ["PretrainConfig", "ShapeConfig", "TokenizerConfig"]

from typing import Literal

from pydantic import Field, model_validator

from fusejax.config.base import Config
from fusejax.config.text import TextSource


class ShapeConfig(Config):
    """The architecture of a model that is trained from scratch."""

    architecture: str = Field(default="llama", description="llama, mistral, qwen2, internlm2, mpt, gpt_neox.")
    hidden_size: int = Field(ge=2, description="Channels.")
    intermediate_size: int | None = Field(
        default=None, ge=1, description="Channels of the feed-forward part; None: 8/3 of hidden_size, a multiple of 8."
    )
    num_layers: int = Field(ge=1, description="Layers.")
    num_heads: int = Field(ge=1, description="Query heads.")
    num_kv_heads: int | None = Field(default=None, ge=1, description="Key and value heads; None: as many as num_heads.")
    sliding_window: int | None = Field(default=None, ge=1, description="Tokens that a position sees; None: all.")
    max_positions: int | None = Field(default=None, ge=2, description="Longest window; None: `seq_len`.")
    tie_embeddings: bool = Field(default=True, description="One matrix for embedding and output.")


class TokenizerConfig(Config):
    """A tokenizer that is trained on the model's own text."""

    kind: Literal["byte_bpe", "unigram", "spm_bpe"] = Field(description="As GPT-2's, T5's or Llama's.")
    vocab_size: int = Field(ge=257, description="Tokens wanted; fewer where the text has not so many pieces.")


class PretrainConfig(Config):
    """How a run makes a model before anything else. The user picks text that the run does not test on."""

    shape: ShapeConfig | None = Field(default=None, description="The architecture; None with `start`, which has one.")
    tokenizer: str | TokenizerConfig | None = Field(
        default=None,
        description="Directory or hub name of a tokenizer, whose files are copied, or {kind, vocab_size}: trained on "
        "the text. None with `start`.",
    )
    start: str | None = Field(
        default=None,
        description="Train on from this model: a directory, a hub name, or `model` of another one that is pretrained.",
    )
    text: tuple[TextSource, ...] = Field(
        min_length=1, description="What it is trained on; of conversations the assistant's turns."
    )
    max_bytes: int | None = Field(default=None, ge=1, description="Cap on the bytes of text per domain.")
    max_document_bytes: int = Field(
        default=8192, ge=16, description="Longer documents are cut, losslessly, in bytes; conversations stay whole."
    )
    epochs: int = Field(default=1, ge=1, description="Passes over the text.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimiser steps.")
    batch_size: int = Field(default=8, ge=1, description="Rows per optimiser step.")
    seq_len: int = Field(default=256, ge=2, description="Tokens per row.")
    packing: bool = Field(default=True, description="Several documents per row, without attention across them.")
    learning_rate: float = Field(default=3e-3, gt=0, description="Peak of a cosine schedule.")
    warmup_ratio: float = Field(default=0.02, ge=0, le=1, description="Share of the steps spent warming up.")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW decay of matrices; norms and biases have none.")
    compute_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Dtype of activations.")
    remat: Literal["none", "dots", "full"] = Field(
        default="dots", description="What is recomputed in the backward pass."
    )
    checkpoint_every: int = Field(default=250, ge=1, description="Steps between checkpoints.")
    seed: int | None = Field(default=None, ge=0, description="Of initialisation and data order; None: the run's.")

    @property
    def has_chat(self) -> bool:
        """Whether any of the text is conversations."""
        return any(source.is_chat for source in self.text)

    @model_validator(mode="after")
    def _one_origin(self) -> "PretrainConfig":
        given = [name for name in ("shape", "tokenizer") if getattr(self, name) is not None]
        if self.start is not None and given:
            raise ValueError(f"{' and '.join(given)} come from the model of `start`; leave them or `start` out")
        if self.start is None and len(given) < 2:
            raise ValueError("needs `shape` and `tokenizer`, or `start`: a model to train on from")
        if isinstance(self.tokenizer, TokenizerConfig) and self.shape and self.shape.architecture == "qwen2":
            raise ValueError(
                "transformers splits the text of every Qwen2 as Qwen2's own tokenizer does, which none of the kinds "
                "does; give the directory of such a tokenizer"
            )
        return self
