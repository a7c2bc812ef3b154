"""Capture: a source's top-k next-token distribution at every position of every document.

Documents are cut in windows of at most `context` positions; each window starts afresh. Windows of similar
length share a batch whose shape is one of few, so that little is padded and little is compiled. Batches never
cross a shard of the store, so a shard's bytes depend on its own documents alone: a killed run that goes on
writes what an undisturbed one would have written.

Deliberately not here: overlapping windows (a position's context would depend on an option that the aligned
side does not know) and any cache of past keys.
"""

__all__ = ["CapturedDocument", "capture_shard", "record_of", "window_batches"]

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusejax.errors import InputError
from fusejax.types import TopK


class CapturedDocument(NamedTuple):
    """What a source says along one document; N predicting positions."""

    topk: TopK  # ids [N, K], logprobs [N, K], residual_logprob [N]
    realised_logprob: np.ndarray  # [N] nats, of the document's own next token


class _Batch(NamedTuple):
    rows: list[tuple[int, int, int]]  # (document, start, stop) of each row that is used
    length: int  # positions per row
    count: int  # rows, padding rows included


def window_batches(
    lengths: Sequence[int], *, context: int, batch_tokens: int, row_multiple: int = 1, shares: int = 1
) -> list[_Batch]:
    """Groups the windows of documents into batches of few different shapes.

    Args:
      lengths: predicting positions of each document.
      context: most positions in a window.
      batch_tokens: positions in a batch, padding included, rounded up where rows must be a multiple.
      row_multiple: the rows of every batch are a multiple of this, the devices that share them.
      shares: processes that divide those devices, and with them the rows, evenly.
    """
    if context < 1 or batch_tokens < context:
        raise ValueError(f"context {context} must be at least 1 and at most batch_tokens {batch_tokens}")
    buckets = sorted({max(1, context // 4), max(1, context // 2), context})
    groups: dict[int, list[tuple[int, int, int]]] = {bucket: [] for bucket in buckets}
    for document, length in enumerate(lengths):
        for start in range(0, length, context):
            stop = min(start + context, length)
            groups[next(b for b in buckets if b >= stop - start)].append((document, start, stop))
    batches = []
    for bucket, rows in groups.items():
        count = max(1, batch_tokens // bucket // row_multiple) * row_multiple // shares
        batches += [_Batch(rows[i : i + count], bucket, count) for i in range(0, len(rows), count)]
    return batches


def _arrays(batch: _Batch, documents: Sequence[Any]) -> tuple[np.ndarray, ...]:
    shape = (batch.count, batch.length)
    tokens, labels, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    for row, (document, start, stop) in enumerate(batch.rows):
        n = stop - start
        tokens[row, :n] = documents[document].tokens[start:stop]
        labels[row, :n] = documents[document].labels[start:stop]
        positions[row, :n] = np.arange(n)
        segments[row, :n] = 1
    return tokens, labels, positions, segments


def capture_shard(
    score: Callable[..., tuple[Any, TopK]],
    documents: Sequence[Any],
    *,
    top_k: int,
    context: int,
    batch_tokens: int,
    dtype: str = "float32",
    row_multiple: int = 1,
    shares: int = 1,
    on_batch: Callable[[int], None] | None = None,
    names: Sequence[str] | None = None,
) -> Iterator[CapturedDocument]:
    """Yields the distributions of `documents`, in order.

    Args:
      score: (tokens, labels, positions, segment_ids, each [B, T] int32) -> (realised logprob [B, T], TopK [B, T, K]).
      documents: encoded documents with `tokens` and `labels` [N].
      top_k: K.
      context: most positions in a window.
      batch_tokens: positions per call of `score`.
      dtype: numpy dtype of the log-probabilities.
      row_multiple, shares: see `window_batches`.
      on_batch: told how many positions were done.
      names: of the documents, for messages; by default their numbers.

    Raises:
      InputError: the source gives NaN, or no probability to a token of the text; names the documents.
    """
    kept = [
        CapturedDocument(
            TopK(
                np.full((len(d.tokens), top_k), -1, np.int32),
                np.full((len(d.tokens), top_k), -np.inf, dtype),
                np.zeros(len(d.tokens), dtype),
            ),
            np.zeros(len(d.tokens), dtype),
        )
        for d in documents
    ]
    lengths = [len(d.tokens) for d in documents]
    shapes = {"context": context, "batch_tokens": batch_tokens, "row_multiple": row_multiple, "shares": shares}
    for batch in window_batches(lengths, **shapes):
        realised, topk = score(*_arrays(batch, documents))
        realised, ids, logprobs, residual = map(np.asarray, (realised, topk.ids, topk.logprobs, topk.residual_logprob))
        _check(batch, realised, logprobs, documents, names)
        for row, (document, start, stop) in enumerate(batch.rows):
            n, into = stop - start, kept[document]
            into.topk.ids[start:stop] = ids[row, :n]
            into.topk.logprobs[start:stop] = logprobs[row, :n]
            into.topk.residual_logprob[start:stop] = residual[row, :n]
            into.realised_logprob[start:stop] = realised[row, :n]
        if on_batch is not None:
            on_batch(sum(stop - start for _, start, stop in batch.rows))
    yield from kept


def _check(
    batch: _Batch, realised: np.ndarray, logprobs: np.ndarray, documents: Sequence[Any], names: Sequence[str] | None
) -> None:
    """Refuses what cannot be stored, with the documents that it concerns."""
    bad: dict[str, str] = {}
    for row, (document, start, stop) in enumerate(batch.rows):
        label, entries = realised[row, : stop - start], logprobs[row, : stop - start]
        wrong = np.flatnonzero(~np.isfinite(label) | np.isnan(entries).any(axis=1))
        if wrong.size:
            first = int(wrong[0])
            nan = np.isnan(label[first]) or np.isnan(entries[first]).any()
            token = int(documents[document].labels[start + first])
            what = "NaN" if nan else f"no probability for token {token}"
            name = str(document) if names is None else names[document]
            bad.setdefault(
                name, f"{name!r}: {what} at position {start + first} ({wrong.size} of {stop - start} positions)"
            )
    if bad:
        shown = "\n  ".join([*list(bad.values())[:5], *(["..."] if len(bad) > 5 else [])])
        raise InputError(
            f"the source gives no usable probabilities in {len(bad)} documents:\n  {shown}\nCheck that its weights are "
            "whole and belong to its tokenizer; a model that overflows in bfloat16 needs capture.compute_dtype float32"
        )


def record_of(document: Any, captured: CapturedDocument) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns header and arrays of the captured record (artefact A1) of one document; a masked one has `spans`."""
    spans = getattr(document, "spans", None)
    counted = slice(None) if spans is None else spans >= 0
    header = {
        "n_bytes": int(document.n_bytes),
        "nll_nats": float(-captured.realised_logprob[counted].astype(np.float64).sum()),
        "exact": bool(document.exact),
    }
    arrays = {
        "tokens": np.asarray(document.tokens, np.int32),
        "labels": np.asarray(document.labels, np.int32),
        "byte_ends": np.asarray(document.byte_ends, np.int32),
        "topk_ids": captured.topk.ids,
        "topk_logprobs": captured.topk.logprobs,
        "residual_logprob": captured.topk.residual_logprob,
        "realised_logprob": captured.realised_logprob,
    }
    if spans is not None:
        arrays["spans"] = np.asarray(spans, np.int32)
    return header, arrays
