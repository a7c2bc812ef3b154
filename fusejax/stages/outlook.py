"""What is known of a model before the run has made it: its architecture and, where it is given, its tokenizer."""

__all__ = ["Outlook", "how", "outlook", "shaped", "tokenizer_directory"]

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fusejax.config import ModelRef, PretrainConfig, RunConfig, TokenizerConfig, place_of
from fusejax.errors import InputError
from fusejax.io.models import open_config, resolve_model
from fusejax.io.tokenizers import Tokenizer, load_tokenizer
from fusejax.models.config import ModelConfig


class Outlook(NamedTuple):
    """A model that is pretrained by the run."""

    config: ModelConfig
    tokenizer: Tokenizer | None  # None: trained together with the model


def outlook(config: RunConfig, ref: ModelRef, *, load: Callable[[Path], Tokenizer] = load_tokenizer) -> Outlook:
    """Returns what a pretrained model will be; of one with a tokenizer of its own, as large as it may become.

    Args:
      config: the run.
      ref: one of its models that has `pretrain`, or lies where another one makes it.
      load: opens a tokenizer's directory.

    Raises:
      InputError: an architecture that there is not, or no such tokenizer or start.
    """
    ref = config.pretrained[place_of(ref.model)]
    options = how(ref)
    if options.start is not None:
        earlier = config.pretrained.get(place_of(options.start))
        if earlier is not None:
            return outlook(config, earlier, load=load)
        directory = resolve_model(options.start)
        return Outlook(open_config(directory), load(directory))
    directory = tokenizer_directory(options)
    tokenizer = None if directory is None else load(directory)
    try:
        return Outlook(shaped(options, tokenizer), tokenizer)
    except InputError as error:
        raise InputError(f"{ref.name}: pretrain.shape: {error}") from error


def how(ref: ModelRef) -> PretrainConfig:
    """How a model is pretrained that is."""
    if ref.pretrain is None:
        raise ValueError(f"{ref.name} is not pretrained")
    return ref.pretrain


def tokenizer_directory(options: PretrainConfig) -> Path | None:
    """Where a tokenizer lies that is given; None: it is trained, or comes from `start`.

    Raises:
      InputError: there is none.
    """
    if options.tokenizer is None or isinstance(options.tokenizer, TokenizerConfig):
        return None
    try:
        return resolve_model(options.tokenizer, weights=False)
    except InputError as error:
        raise InputError(f"pretrain.tokenizer {options.tokenizer}: no directory of a tokenizer ({error})") from error


def shaped(options: PretrainConfig, tokenizer: Tokenizer | None) -> ModelConfig:
    """Returns the architecture of a model that is trained from scratch."""
    shape = options.shape
    if shape is None:
        raise ValueError("a model that goes on from another has that one's architecture")
    wanted = options.tokenizer.vocab_size if isinstance(options.tokenizer, TokenizerConfig) else 0
    return ModelConfig(
        architecture=shape.architecture,
        vocab_size=wanted if tokenizer is None else tokenizer.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size or -(-shape.hidden_size * 8 // 3 // 8) * 8,
        num_layers=shape.num_layers,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads or shape.num_heads,
        max_positions=shape.max_positions or options.seq_len,
        sliding_window=shape.sliding_window,
        tie_embeddings=shape.tie_embeddings,
        bos_id=None if tokenizer is None else tokenizer.bos_id,
        eos_id=None if tokenizer is None else tokenizer.eos_id,
    )
