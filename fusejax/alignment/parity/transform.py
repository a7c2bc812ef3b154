"""Distributions at the target's positions, in the target's vocabulary, from a choice of source positions.

`aligned_topk` is what training uses: entries that meet in one target token are summed, what has no target token joins
the residual, and a fallback puts all mass on the *next* token, which is what the position predicts. With
`reference_bugs` the first of entries that meet is kept and what the others had joins the residual.

`aligned_logits` is the released programs' to the digit (`reference_bugs`): of entries that meet the first is kept and
the others are dropped, logits are not normalised, and FuseLLM and FuseChat 1 put the fallback on the token that the
position has just *read*, which teaches the model to repeat it (a third of all English positions for a byte-level
source, 95 % of Chinese ones).
"""

import numpy as np

from fusejax.alignment.parity.choose import FALLBACK, Choice
from fusejax.alignment.parity.spelling import generation_of
from fusejax.alignment.report import ALIGNED, DROPPED
from fusejax.alignment.transport import transport
from fusejax.types import Array, TopK, VocabMap

__all__ = ["ONE_HOT", "aligned_logits", "aligned_topk"]

ONE_HOT = 3  # status of a fallback position, beside those of `fusejax.alignment.report`


def aligned_topk(
    source: TopK,
    choice: Choice,
    table: Array,
    labels: Array,
    *,
    max_entries: int | None = None,
    reference_bugs: bool = False,
) -> tuple[TopK, Array]:
    """Forms the distributions, the programs' defects mended.

    Args:
      source: `ids [n, K]`, `logprobs [n, K]`, `residual_logprob [n]` of the source positions.
      choice: for each of T target positions.
      table: [V_s] int32, the vocabulary map.
      labels: [T] int, the next token of each target position; what a fallback names.
      max_entries: entries kept per position; None: K.
      reference_bugs: of entries that meet in one target token the first is kept, not their sum. (FuseLLM's other
        defect here, a fallback on the token just read, is had by giving these as `labels`.)

    Returns:
      (TopK over target tokens, [T, K] and [T]; status [T] int8: 0 none, 1 aligned, 3 fallback).
    """
    vocab_map = VocabMap(table, np.zeros(0, np.int32))
    source = _first_of_equals(source, table) if reference_bugs else source
    moved = transport(_mixed(source, choice), _extended(choice, len(source.ids)), vocab_map, max_entries=max_entries)
    one_hot = np.flatnonzero(choice.source == FALLBACK)
    moved.ids[one_hot, 0] = np.asarray(labels)[one_hot]
    moved.logprobs[one_hot, 0] = 0.0
    moved.residual_logprob[one_hot] = -np.inf
    status = np.where((moved.ids >= 0).any(axis=1), ALIGNED, DROPPED).astype(np.int8)
    status[one_hot] = ONE_HOT
    return moved, status


def aligned_logits(
    ids: Array, logits: Array, choice: Choice, table: Array, target_ids: Array, *, generation: str
) -> tuple[list[list[int]], list[list[float]]]:
    """Forms the distributions as the released programs do.

    Args:
      ids: [n, K] int, source tokens; logits: [n, K], most likely first.
      choice: for each of T target positions.
      table: [V_s] int32; target_ids: [T] int, the tokens that are read.
      generation: says which token a fallback names; after the last position FuseChat 2 repeats the last token.

    Returns:
      (target ids, logits) per position, of 0 to K entries.
    """
    target_ids = np.asarray(target_ids)
    named = np.append(target_ids[1:], target_ids[-1:]) if generation_of(generation).next_token else target_ids
    mapped = table[np.asarray(ids)]
    new = mapped >= 0
    for k in range(1, mapped.shape[1]):
        new[:, k] &= (mapped[:, :k] != mapped[:, k : k + 1]).all(axis=1)
    all_ids, all_logits = [], []
    for index, at in enumerate(choice.source.tolist()):
        if index in choice.mixed:
            pieces, counts = choice.mixed[index]
            best = _max_merged(mapped, np.asarray(logits), new, pieces, np.array(counts, np.float64))
            found, values = list(best), list(best.values())
        elif at >= 0:
            found, values = mapped[at][new[at]].tolist(), np.asarray(logits)[at][new[at]].tolist()
        else:
            found, values = [int(named[index])], [1.0]
        all_ids.append(found)
        all_logits.append(values)
    return all_ids, all_logits


def _max_merged(mapped: Array, logits: Array, new: Array, pieces: list[int], counts: Array) -> dict[int, float]:
    """FuseChat 1's mixture: logits times softmax(counts), the largest per token."""
    weights = np.exp(counts - counts.max())
    weights /= weights.sum()
    best: dict[int, float] = {}
    for piece, weight in zip(pieces, weights.tolist(), strict=True):
        scaled = zip(mapped[piece][new[piece]].tolist(), logits[piece][new[piece]].tolist(), strict=True)
        for token, value in scaled:
            best[token] = max(best.get(token, -np.inf), value * weight)
    return best


def _first_of_equals(source: TopK, table: Array) -> TopK:
    """The source without entries whose target token an earlier entry has; their mass joins the residual."""
    ids, logprobs = np.asarray(source.ids), np.asarray(source.logprobs, np.float32)
    mapped = np.where(ids >= 0, table[np.maximum(ids, 0)], -1)
    later = np.zeros(ids.shape, bool)
    for k in range(1, ids.shape[1]):
        later[:, k] = (mapped[:, k] >= 0) & (mapped[:, :k] == mapped[:, k : k + 1]).any(axis=1)
    dropped = np.where(later, np.exp(logprobs.astype(np.float64)), 0.0).sum(axis=1)
    with np.errstate(divide="ignore"):
        residual = np.log(np.exp(np.asarray(source.residual_logprob, np.float64)) + dropped)
    return TopK(np.where(later, -1, ids), np.where(later, -np.inf, logprobs), residual.astype(np.float32))


def _mixed(source: TopK, choice: Choice) -> TopK:
    """The source's rows and, after them, one row of mixed probabilities for every mixture."""
    if not choice.mixed:
        return source
    ids, logprobs = np.asarray(source.ids), np.asarray(source.logprobs, np.float32)
    residual = np.asarray(source.residual_logprob, np.float32)
    width = ids.shape[1] * max(len(pieces) for pieces, _ in choice.mixed.values())
    rows = TopK(
        np.full((len(choice.mixed), width), -1, np.int32),
        np.full((len(choice.mixed), width), -np.inf, np.float32),
        np.zeros(len(choice.mixed), np.float32),
    )
    with np.errstate(divide="ignore"):
        for row, (pieces, counts) in enumerate(choice.mixed.values()):
            log_weights = np.log(np.array(counts, np.float64) / max(sum(counts), 1))
            size = ids.shape[1] * len(pieces)
            rows.ids[row, :size] = ids[pieces].ravel()
            rows.logprobs[row, :size] = (logprobs[pieces] + log_weights[:, None]).ravel()
            rows.residual_logprob[row] = np.log((np.exp(residual[pieces] + log_weights)).sum())
    pad = ((0, 0), (0, width - ids.shape[1]))
    return TopK(
        np.concatenate([np.pad(ids, pad, constant_values=-1), rows.ids]),
        np.concatenate([np.pad(logprobs, pad, constant_values=-np.inf), rows.logprobs]),
        np.concatenate([residual, rows.residual_logprob]),
    )


def _extended(choice: Choice, positions: int) -> Array:
    """Source rows of the target positions, mixtures pointing at their rows; -1 where there is none."""
    rows = np.maximum(choice.source, -1).astype(np.int32)
    rows[list(choice.mixed)] = positions + np.arange(len(choice.mixed), dtype=np.int32)
    return rows
