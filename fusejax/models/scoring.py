"""Log-probabilities of given tokens, and the most likely ones, without holding all logits.

The head is applied to a chunk of positions at a time, so that memory is `chunk * V` floats whatever the
batch. A `TopK` from here is exact: entries are normalised by the log-sum-exp of the whole vocabulary, and
the residual is summed over the entries that were *not* taken. `1 - sum(top-k)` would lose all digits where
it matters, at confident positions, whose residual may be 1e-6 of the mass.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from fusejax.distributions import topk_from_logits
from fusejax.models.config import ModelConfig
from fusejax.models.llama import head_kernel, hidden_states
from fusejax.parallel.sharding import Layout, ShardingRules
from fusejax.types import TopK

__all__ = ["score_tokens"]

_CHUNK_ENTRIES = 2**24  # logits held at once by default: 64 MiB of float32


def score_tokens(
    params: Mapping[str, Any],
    cfg: ModelConfig,
    tokens: jax.Array,
    labels: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    k: int = 0,
    chunk: int | None = None,
    valid_vocab: int | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules | None = None,
) -> tuple[jax.Array, TopK | None]:
    """Returns the log-probability `[B, T]` (float32, nats) of each label, and the `TopK` `[B, T, k]` if k > 0.

    To be jitted by the caller with `cfg`, `k`, `chunk`, `valid_vocab`, `mesh` and `rules` static.

    Args:
        params: the parameter tree.
        cfg: the architecture.
        tokens, labels, positions, segment_ids: `[B, T]` int32; the results at padding mean nothing.
        k: entries per position; those beyond the vocabulary have id -1 and log-probability -inf.
        chunk: positions (of all rows together) whose logits are held at once.
        valid_vocab: only ids below it take part; the others are padding rows of the head.
        mesh, rules: where parameters and batch lie.

    Raises:
        ValueError: a `k`, `chunk` or `valid_vocab` out of range.
    """
    valid = cfg.vocab_size if valid_vocab is None else valid_vocab
    if k < 0 or (chunk is not None and chunk < 1) or not 1 <= valid <= cfg.vocab_size:
        raise ValueError(
            f"need k >= 0, chunk >= 1 and 1 <= valid_vocab <= {cfg.vocab_size}, "
            f"got k={k}, chunk={chunk}, valid_vocab={valid_vocab}"
        )
    layout = Layout(mesh, rules or ShardingRules())
    hidden = hidden_states(params, cfg, tokens, positions, segment_ids, mesh=mesh, rules=rules)
    kernel, form = head_kernel(params, cfg)
    kernel = layout.gathered(kernel.astype(hidden.dtype), ("vocab", "embed") if form == "vd" else ("embed", "vocab"))

    def score(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, TopK | None]:
        states, targets = part
        axes = ("batch", None, "vocab")
        logits = layout.einsum(f"bcd,{form}->bcv", states, kernel, axes, preferred_element_type=jnp.float32)
        return _per_device(logits, targets, k=k, valid=valid, layout=layout)

    rows, length = tokens.shape
    width = max(1, min(length, (chunk or max(1, _CHUNK_ENTRIES // cfg.vocab_size)) // rows))
    scored = jax.lax.map(score, (_split(hidden, width), _split(labels, width)))
    return jax.tree.map(lambda x: _join(x, length), scored)


def _score_logits(logits: jax.Array, labels: jax.Array, *, k: int, valid: int) -> tuple[jax.Array, TopK | None]:
    """Returns the labels' log-probabilities and the top-k of logits `[..., V]`."""
    logits = logits[..., :valid]
    lse = jax.nn.logsumexp(logits, axis=-1)
    inside = (labels >= 0) & (labels < valid)
    chosen = jnp.take_along_axis(logits, jnp.where(inside, labels, 0)[..., None], axis=-1)[..., 0]
    realised = jnp.where(inside, chosen - lse, -jnp.inf)
    if k == 0:
        return realised, None
    taken = min(k, valid)
    topk = topk_from_logits(logits, taken)
    unused = [(0, 0)] * labels.ndim + [(0, k - taken)]
    return realised, TopK(
        ids=jnp.pad(topk.ids, unused, constant_values=-1),
        logprobs=jnp.pad(topk.logprobs, unused, constant_values=-jnp.inf),
        residual_logprob=topk.residual_logprob,
    )


def _per_device(
    logits: jax.Array, labels: jax.Array, *, k: int, valid: int, layout: Layout
) -> tuple[jax.Array, TopK | None]:
    """Scores the rows of each device alone, with the whole vocabulary."""

    def score(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, TopK | None]:
        return _score_logits(logits, labels, k=k, valid=valid)

    if layout.mesh is None:
        return score(logits, labels)
    spec = layout.sharding(("batch",)).spec
    logits, labels = (layout.constrain(x, ("batch",) + (None,) * (x.ndim - 1)) for x in (logits, labels))
    return jax.shard_map(score, mesh=layout.mesh, in_specs=(spec, spec), out_specs=spec)(logits, labels)


def _split(x: jax.Array, width: int) -> jax.Array:
    """`[B, T, ...]` -> `[n, B, width, ...]`, the last part padded with zeros."""
    rows, length = x.shape[:2]
    parts = -(-length // width)
    padded = jnp.pad(x, [(0, 0), (0, parts * width - length)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(padded.reshape(rows, parts, width, *x.shape[2:]), 1, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """`[n, B, width, ...]` -> `[B, T, ...]`."""
    moved = jnp.moveaxis(x, 0, 1)
    return moved.reshape(moved.shape[0], -1, *moved.shape[3:])[:, :length]
