"""Comparing sources fairly: bits per byte over windows of the text, not cross-entropy per own token.

Mean cross-entropy per token compares tokenizers as much as models. Here a realised token's negative
log-likelihood is spread evenly over the bytes it covers, so that two sources can be compared over any window of
bytes. (The papers' score per own token is `fusejax.alignment.parity.fusion.window_metric`.)
"""

__all__ = ["choose_min", "softmin_weights", "window_bits_per_byte", "window_of_bytes"]

import numpy as np


def window_bits_per_byte(
    byte_ends: np.ndarray, realised_logprob: np.ndarray, n_bytes: int, *, window_bytes: int | None
) -> np.ndarray:
    """Bits per byte of a source over consecutive windows of a document.

    Args:
      byte_ends: [N] int, bytes read at each predicting position, ascending.
      realised_logprob: [N] nats, of the token that follows each position.
      n_bytes: bytes of the document.
      window_bytes: bytes per window; None is one window over the document. The last window may be shorter.

    Returns:
      [W] float64 bits per byte, W = ceil(n_bytes / window_bytes); a final token without bytes (eos) counts in
      the last window.
    """
    if n_bytes == 0:
        return np.zeros(0)
    width = n_bytes if window_bytes is None else window_bytes
    edges = np.minimum(np.arange(0, n_bytes + width, width), n_bytes)
    edges = edges[: int(np.ceil(n_bytes / width)) + 1]
    starts = np.asarray(byte_ends, np.int64)
    stops = np.append(starts[1:], n_bytes)
    nll = -np.asarray(realised_logprob, np.float64)
    wide = stops > starts
    # The cumulative likelihood is piecewise linear in the byte position; zero-width tokens are steps.
    steps = np.zeros(len(edges) - 1)
    np.add.at(steps, np.minimum(starts[~wide] // width, len(steps) - 1), nll[~wide])
    cumulative = np.concatenate([[0.0], np.cumsum(nll[wide])])
    knots = np.concatenate([starts[:1], stops[wide]])  # bytes before a missing bos were not predicted
    total = np.diff(np.interp(edges, knots, cumulative)) + steps
    return total / (np.log(2) * np.diff(edges))


def window_of_bytes(byte_ends: np.ndarray, n_bytes: int, *, window_bytes: int | None) -> np.ndarray:
    """The window in which the text predicted at each position begins, [N] int."""
    if window_bytes is None or n_bytes == 0:
        return np.zeros(len(byte_ends), np.int64)
    last = int(np.ceil(n_bytes / window_bytes)) - 1
    return np.minimum(np.asarray(byte_ends, np.int64) // window_bytes, last)


def choose_min(scores: np.ndarray) -> np.ndarray:
    """MinCE's choice, [S, W] scores -> [W] source index; NaN never wins, ties go to the first source."""
    return np.argmin(np.where(np.isnan(scores), np.inf, scores), axis=0)


def softmin_weights(scores: np.ndarray, *, temperature: float = 1.0) -> np.ndarray:
    """AvgCE's weights, [S, W] scores -> [S, W] softmax of -score / temperature over the sources.

    A source without a score (NaN) has weight 0; where no source has one, all weights are 0.
    """
    scaled = -np.where(np.isnan(scores), np.inf, scores) / temperature
    best = scaled.max(axis=0, keepdims=True)
    weights = np.exp(scaled - np.where(np.isfinite(best), best, 0.0))
    return weights / np.maximum(weights.sum(axis=0, keepdims=True), np.finfo(np.float64).tiny)
