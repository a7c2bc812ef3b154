"""The values that cross module boundaries: NamedTuples of arrays, and nothing else.

Every distribution in the pipeline (captured, aligned, fused) is a `TopK`, so stages compose and can be
skipped. Arrays may be numpy or jax; this module imports neither, so that it costs nothing to import.

Axes: `B` batch, `T` positions, `S` sources, `M` distributions mixed at one position, `K` top-k entries,
`G` gathered ids, `V` vocabulary, `L` layers. The shift is said once, here: position `t` reads token `t`
and predicts token `t + 1`; every distribution is indexed by the position that *predicts*.
"""

from typing import Any, NamedTuple

Array = Any  # numpy.ndarray or jax.Array

__all__ = [
    "Array",
    "EventGroups",
    "FusionBatch",
    "MasterState",
    "TokenAlignment",
    "TopK",
    "TrainState",
    "VocabMap",
]


class TopK(NamedTuple):
    """The K most likely next tokens (or symbols) of a position, and the mass outside them."""

    ids: Array  # [..., K] int32, token ids; -1 marks an unused entry
    logprobs: Array  # [..., K] nats; -inf in unused entries
    residual_logprob: Array  # [...] nats, log of the probability outside the K entries


class VocabMap(NamedTuple):
    """A partition of two vocabularies into common symbols, each named by one target token id."""

    symbol_of_source: Array  # [V_source] int32, target id that names the symbol, or -1: no symbol
    symbol_of_target: Array  # [V_target] int32, likewise; idempotent: s[s[v]] == s[v]


class EventGroups(NamedTuple):
    """A partition of the target vocabulary in compressed rows: who belongs to each symbol."""

    offsets: Array  # [V + 1] int32, members of symbol s are members[offsets[s]:offsets[s + 1]]
    members: Array  # [V] int32, target ids, ascending within a symbol; tail filled with -1


class TokenAlignment(NamedTuple):
    """For each target position, the source position whose prefix ends at the same byte."""

    source_index: Array  # [T] int32, position in the source sequence, or -1 where none ends there


class FusionBatch(NamedTuple):
    """One training batch; `M` distributions may supervise one position (M = 1 for MinCE)."""

    tokens: Array  # [B, T] int32, the tokens that are read
    labels: Array  # [B, T] int32, the next tokens
    segment_ids: Array  # [B, T] int32, document within the row from 1; 0 is padding
    positions: Array  # [B, T] int32, position within the document
    mask: Array  # [B, T] float32, 1 where the label is trained
    targets: TopK  # ids [B, T, M, K], in the target's vocabulary
    partition: Array  # [B, T, M] int32, row of the group tables (one per source), -1: no distribution
    weights: Array  # [B, T, M] float32, mixing weights, summing to 1 over distributions; a chain repeats its source's


class MasterState(NamedTuple):
    """The optimiser's state where the parameters between two steps are bfloat16."""

    master: Any  # the parameters in float32
    inner: Any  # optax state


class TrainState(NamedTuple):
    """What a training step reads and writes."""

    step: Array  # [] int32, optimiser steps done
    params: Any  # nested dict of arrays, as documented in `fusejax.models.params`
    opt_state: Any  # optax state, or a MasterState
