"""Continuing prompts: a cache of keys and values, greedy choice or sampling, stop tokens.

Prompts of different lengths are laid against the right edge of one array, so that every row writes the same slot at
every step; the padding on the left is a segment of its own and is never read. The state is a pytree that can be
continued: a caller that looks for stop *strings* generates a few tokens, looks, and goes on.

The first tokens of the prompt are read at once, the rest one by one, all by one decoder (`cached_states`), so a
continuation is what the training model says, to rounding. One device. Not here: beams, speculation, paged caches.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import InputError
from fusejax.models.config import ModelConfig
from fusejax.models.llama import Cache, cached_states, head_kernel

__all__ = ["Generation", "Sampling", "continue_generation", "generate", "start_generation"]


class Sampling(NamedTuple):
    """How the next token is chosen; `temperature` 0 takes the likeliest.

    `top_k` (0: all) and `top_p` (1: all) leave only the likeliest tokens; the likeliest one always stays.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


class Generation(NamedTuple):
    """Rows that are being continued; the slots before `count` hold tokens, the cache all of these but the last."""

    tokens: jax.Array  # [B, S] int32
    segment_ids: jax.Array  # [B, S] int32, 0 on the left of the prompt
    logprobs: jax.Array  # [B, S] float32 nats, of generated tokens under the model (not the sampling)
    finished: jax.Array  # [B] bool, a stop token was generated
    count: jax.Array  # int32
    cache: Cache
    key: jax.Array


def start_generation(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int = 0,
    multiple: int = 32,
) -> Generation:
    """Reads prompts, all but their last tokens.

    Args:
        params: the parameter tree, on one device.
        cfg: the architecture.
        prompts: B sequences of ids, of at least one token each.
        max_new_tokens: most tokens that can follow.
        seed: of the sampling.
        multiple: the prompts' common length is rounded up to a multiple of it, so that few programs are compiled.

    Raises:
        InputError: an empty prompt, an id outside the vocabulary, or more tokens than the model has positions.
    """
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not longest or min(len(prompt) for prompt in prompts) < 1 or max_new_tokens < 1:
        raise InputError("generation needs prompts of at least one token each, and max_new_tokens of at least 1")
    if longest + max_new_tokens > cfg.max_positions:
        raise InputError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {cfg.max_positions} "
            "positions; shorten the prompt or generate less"
        )
    ids = np.concatenate([np.asarray(prompt) for prompt in prompts])
    if ids.min() < 0 or ids.max() >= cfg.vocab_size:
        raise InputError(f"prompt ids run from {ids.min()} to {ids.max()}, the vocabulary has {cfg.vocab_size}")
    width = -(-longest // multiple) * multiple
    tokens = np.zeros((len(prompts), width + max_new_tokens), np.int32)
    segments = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) : width] = prompt
        segments[row, width - len(prompt) :] = 1
    return _read_prompts(params, jnp.asarray(tokens), jnp.asarray(segments), jax.random.key(seed), cfg=cfg, width=width)


@partial(jax.jit, static_argnames=("cfg", "width"))
def _read_prompts(
    params: Any, tokens: jax.Array, segments: jax.Array, key: jax.Array, *, cfg: ModelConfig, width: int
) -> Generation:
    rows, slots = tokens.shape
    cache = Cache.empty(cfg, rows, slots)
    if width > 1:
        read = slice(0, width - 1)
        positions = _positions(segments)[:, read]
        _, cache = cached_states(params, cfg, tokens[:, read], positions, segments, cache, jnp.int32(0))
    unknown = jnp.zeros((rows, slots), jnp.float32)
    return Generation(tokens, segments, unknown, jnp.zeros(rows, bool), jnp.int32(width), cache, key)


@partial(jax.jit, static_argnames=("cfg", "sampling", "steps", "valid_vocab"), donate_argnames=("state",))
def continue_generation(
    params: Mapping[str, Any],
    state: Generation,
    stop_ids: jax.Array,
    *,
    cfg: ModelConfig,
    steps: int,
    sampling: Sampling = Sampling(),  # noqa: B008  (a NamedTuple is immutable)
    valid_vocab: int | None = None,
) -> Generation:
    """Generates up to `steps` tokens per row; stops earlier when every row has finished or the slots are full.

    Args:
        params: the parameter tree.
        state: of `start_generation`; donated.
        stop_ids: `[n]` int32; a row that generates one of them has finished, and repeats it from then on.
        cfg, steps, sampling: static.
        valid_vocab: ids from here on are never chosen (padding rows of the head).

    Raises:
        InputError: a sampling out of range.
    """
    _check_sampling(sampling)
    positions = _positions(state.segment_ids)
    last = jnp.minimum(state.count + steps, state.tokens.shape[1])

    def unfinished(state: Generation) -> jax.Array:
        return (state.count < last) & ~jnp.all(state.finished)

    def step(state: Generation) -> Generation:
        slot = state.count - 1
        column = partial(jax.lax.dynamic_slice_in_dim, start_index=slot, slice_size=1, axis=1)
        hidden, cache = cached_states(
            params, cfg, column(state.tokens), column(positions), state.segment_ids, state.cache, slot
        )
        kernel, form = head_kernel(params, cfg)
        logits = jnp.einsum(
            f"bd,{form}->bv", hidden[:, 0], kernel.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        logits = logits[:, :valid_vocab]
        key, own = jax.random.split(state.key)
        chosen = jnp.where(state.finished, column(state.tokens)[:, 0], _choose(logits, own, sampling))
        chosen = chosen.astype(jnp.int32)
        told = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen[:, None], axis=-1)[:, 0]
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.count, axis=1)
        return state._replace(
            tokens=put(state.tokens, chosen[:, None]),
            logprobs=put(state.logprobs, jnp.where(state.finished, 0.0, told)[:, None]),
            finished=state.finished | jnp.isin(chosen, stop_ids),
            count=state.count + 1,
            cache=cache,
            key=key,
        )

    return jax.lax.while_loop(unfinished, step, state)


def generate(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
    valid_vocab: int | None = None,
) -> list[list[int]]:
    """Returns the tokens that follow each prompt, up to and without the first stop token.

    Args:
        params, cfg, prompts, max_new_tokens, seed: see `start_generation`.
        stop_ids: ids that end a row.
        sampling: greedy by default.
        valid_vocab: see `continue_generation`.
    """
    state = start_generation(params, cfg, prompts, max_new_tokens=max_new_tokens, seed=seed)
    stops = jnp.asarray(list(stop_ids) or [-1], jnp.int32)
    first = int(state.count)
    state = continue_generation(
        params, state, stops, cfg=cfg, steps=max_new_tokens, sampling=sampling, valid_vocab=valid_vocab
    )
    found = np.asarray(state.tokens)[:, first : int(state.count)]
    ends = np.isin(found, list(stop_ids))
    return [row[: int(end.argmax()) if end.any() else None].tolist() for row, end in zip(found, ends, strict=True)]


def _check_sampling(sampling: Sampling) -> None:
    if sampling.temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise InputError(f"need temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got {sampling}")


def _positions(segments: jax.Array) -> jax.Array:
    """`[B, S]`: how many tokens of the row come before; 0 on its padding."""
    return jnp.maximum(jnp.cumsum(segments, axis=1) - 1, 0)


def _choose(logits: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Chooses one id per row of logits `[B, V]`; of equal logits the lowest id."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        smallest = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        kept = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True)
        smallest = jnp.take_along_axis(ordered, kept - 1, axis=-1)
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    return jax.random.categorical(key, logits)
