"""MinCE and AvgCE with the papers' rewards, and the dense targets that their losses see.

A source's metric is its mean cross-entropy per own token, in nats; its reward is exp(-metric). MinCE takes the source
with the largest reward, AvgCE weighs by softmax of the rewards. The level says over what the mean runs: a document
("sequence"), a packed block ("block": `block_metric`), or what
lies beside one target position ("token"). The published runs use sequences (FuseChat) and blocks (FuseLLM).

With `reference_bugs` rewards are rounded to bfloat16, so sources closer than 1/64 nat tie and the first wins, and a
NaN metric wins MinCE; without, they are float64 and NaN never wins.

The pipeline keeps distributions sparse; dense targets are here for comparison with the papers' programs.
"""

from collections.abc import Sequence

import ml_dtypes
import numpy as np

from fusejax.alignment.parity.dtw import Warp
from fusejax.errors import InputError
from fusejax.types import Array

__all__ = [
    "avg_ce_weights",
    "block_metric",
    "dense_target",
    "min_ce_choice",
    "rewards",
    "sequence_metric",
    "token_metric",
    "window_metric",
]

BF16 = ml_dtypes.bfloat16


def sequence_metric(realised: Array, *, mask: Array | None = None) -> float:
    """Mean nats per own token of a document; NaN where the mask leaves none.

    Args:
      realised: [n] nats, log-probability of the token that follows each position.
      mask: [n] bool, positions that count; None: all.
    """
    counted = np.asarray(realised, np.float64)
    counted = counted if mask is None else counted[np.asarray(mask, bool)]
    return float(-counted.mean()) if counted.size else float("nan")


def block_metric(metrics: Sequence[float], lengths: Sequence[int]) -> float:
    """A packed block's metric: the mean over its tokens of their documents' metrics."""
    return float(np.average(np.asarray(metrics, np.float64), weights=np.asarray(lengths)))


def token_metric(realised: Array, warp: Warp) -> Array:
    """Mean nats of the source positions beside each target position, [T] float64.

    The released program copies the source's values without aligning them, so that lengths differ; this is what it
    meant.
    """
    total = np.concatenate([[0.0], np.cumsum(-np.asarray(realised, np.float64))])
    return (total[warp.last + 1] - total[warp.first]) / (warp.last - warp.first + 1)


def window_metric(byte_ends: Array, realised: Array, n_bytes: int, *, window_bytes: int | None) -> Array:
    """Mean nats per own token over windows of the text: blocks, or with `window_bytes=1` single tokens.

    Args:
      byte_ends: [n] int, bytes read at each source position, ascending; realised: [n] nats.
      n_bytes: bytes of the document.
      window_bytes: bytes per window; None: one window, the document.

    Returns:
      [W] float64, W at least 1; every token counts in the windows it overlaps, a last one without bytes (eos) in the
      last window; NaN where there is none.
    """
    total = np.concatenate([[0.0], np.cumsum(-np.asarray(realised, np.float64))])
    width = max(n_bytes if window_bytes is None else window_bytes, 1)
    edges = np.minimum(np.arange(max(-(-n_bytes // width), 1) + 1, dtype=np.int64) * width, n_bytes)
    starts = np.asarray(byte_ends, np.int64)
    stops = np.append(starts[1:], n_bytes)
    first = np.searchsorted(stops, edges[:-1], side="right")
    last = np.searchsorted(starts, edges[1:], side="left")
    first[0], last[-1] = 0, starts.size
    count = np.maximum(last - first, 0)
    return np.where(count > 0, (total[first + count] - total[first]) / np.maximum(count, 1), np.nan)


def rewards(metrics: Array, *, reference_bugs: bool = False) -> Array:
    """exp(-metric) of the same shape, float64, or bfloat16 computed as `1 / exp(metric)` step by step."""
    metrics = np.asarray(metrics, np.float64)
    if not reference_bugs:
        return np.exp(-metrics)
    exponential = np.exp(metrics.astype(BF16).astype(np.float32)).astype(BF16)
    return (1 / exponential.astype(np.float32)).astype(BF16)


def min_ce_choice(metrics: Array, *, reference_bugs: bool = False) -> Array:
    """The source with the largest reward, [S, ...] -> [...] int; ties go to the first.

    With `reference_bugs` NaN wins, as in `torch.argmax`.
    """
    found = np.asarray(rewards(metrics, reference_bugs=reference_bugs), np.float64)
    return np.argmax(np.where(np.isnan(found), np.inf if reference_bugs else -np.inf, found), axis=0)


def avg_ce_weights(metrics: Array, *, reference_bugs: bool = False) -> Array:
    """softmax over sources of the rewards, [S, ...] -> [S, ...]; a NaN source has weight 0.

    Rewards lie in (0, 1], so that the largest weight is at most e times the smallest.
    """
    found = rewards(metrics, reference_bugs=reference_bugs).astype(np.float64)
    raw = np.where(np.isnan(found), 0.0, np.exp(found))
    weights = raw / np.maximum(raw.sum(axis=0), np.finfo(np.float64).tiny)
    return weights.astype(BF16).astype(np.float64) if reference_bugs else weights


def dense_target(
    ids: Sequence[Sequence[int]],
    logits: Sequence[Sequence[float]],
    vocab: int,
    *,
    temperature: float = 1.0,
    length: int | None = None,
    pad_id: int = 0,
    instead: Array | None = None,
    reference_bugs: bool = False,
) -> Array:
    """The papers' dense target: softmax over the entries kept, nothing anywhere else.

    Args:
      ids, logits: entries of each position.
      vocab: width; temperature: divides logits.
      length: positions of the result; those after the sequence have all mass on `pad_id`.
      instead: [length, vocab], what a position without entries receives.
      reference_bugs: computed in bfloat16, and of repeated ids the last is kept instead of their sum.

    Returns:
      [length, vocab] float64.
    """
    result = np.zeros((len(ids) if length is None else length, vocab))
    result[len(ids) :, pad_id] = 1.0
    for index, (names, values) in enumerate(zip(ids, logits, strict=True)):
        if not len(names):
            if instead is None:
                raise InputError(f"position {index} has no entries; give `instead`, the target's own distribution.")
            result[index] = instead[index]
        elif reference_bugs:
            result[index, list(names)] = _softmax_bf16(values, temperature)
        else:
            raw = np.exp((np.asarray(values, np.float64) - max(values)) / temperature)
            np.add.at(result[index], list(names), raw / raw.sum())
    return result


def _softmax_bf16(values: Sequence[float], temperature: float) -> Array:
    scaled = (np.asarray(values, np.float32).astype(BF16).astype(np.float32) / np.float32(temperature)).astype(BF16)
    raw = np.exp(scaled.astype(np.float32) - scaled.astype(np.float32).max())
    return (raw / raw.sum()).astype(BF16).astype(np.float64)
