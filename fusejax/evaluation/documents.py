"""A model's log-probability of every token of documents longer than its context.

A document's positions are cut into windows of `context`. Window after window starts `context - overlap`
positions further; its first `overlap` positions are read again as context and not counted again, so that every
label is counted exactly once, with at least `overlap` positions before it (a stride, for models with room to
spare). Windows are laid into the rows of fixed [batch_size, context] arrays one after another, several in a row
where they fit, told apart by `segment_ids`: one shape, one compiled program, the same batches every time.

Not done here: running the model. `score_fn` does that, and may be anything that returns log-probabilities.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusejax.errors import InputError
from fusejax.evaluation.bits_per_byte import bits_per_byte

__all__ = ["DocumentScore", "Evaluation", "ScoreFn", "evaluate_documents"]

# (tokens, labels, positions, segment_ids), each [B, T] int32 -> log-probability of the labels [B, T], nats
ScoreFn = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], Any]


class DocumentScore(NamedTuple):
    """What a model says of one document of N predicting positions."""

    index: int  # place in the texts that were given
    realised_logprob: np.ndarray  # [N] float32 nats, of the label at each position that counts
    byte_ends: np.ndarray  # [N] int32, bytes of the text covered after reading the position's token
    n_bytes: int  # UTF-8 bytes of the text

    @property
    def nll_nats(self) -> float:
        """Negative log-likelihood of the document."""
        return -float(np.sum(self.realised_logprob, dtype=np.float64))

    @property
    def unpredicted_bytes(self) -> int:
        """Bytes of a first token that nothing precedes, where the tokenizer has no start token."""
        return int(self.byte_ends[0]) if len(self.byte_ends) else self.n_bytes


class Evaluation(NamedTuple):
    """Scores of all documents that are not empty."""

    documents: tuple[DocumentScore, ...]
    empty: int  # documents without text, left out

    @property
    def nll_nats(self) -> float:
        """Negative log-likelihood of all documents."""
        return sum(document.nll_nats for document in self.documents)

    @property
    def tokens(self) -> int:
        """Labels that were scored, each once."""
        return sum(len(document.realised_logprob) for document in self.documents)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(document.n_bytes for document in self.documents)

    @property
    def unpredicted_bytes(self) -> int:
        """Bytes that count though no label covers them: first tokens, where the tokenizer has no start token."""
        return sum(document.unpredicted_bytes for document in self.documents)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of all documents together."""
        return bits_per_byte(self.nll_nats, self.n_bytes)


class _Window(NamedTuple):
    document: int
    start: int  # first position that is read
    counted: int  # first position that is counted
    stop: int


class _Placed(NamedTuple):
    row: int
    column: int
    window: _Window


def evaluate_documents(
    score_fn: ScoreFn, tokenizer: Any, texts: Iterable[str], *, context: int, batch_size: int, overlap: int = 0,
    on_batch: Callable[[int], None] | None = None,
) -> Evaluation:  # fmt: skip
    """Scores texts with a model.

    Args:
      score_fn: (tokens, labels, positions, segment_ids), each [batch_size, context] int32 -> log-probability of
        the labels, [batch_size, context] nats. Attention must stay within a segment; segment 0 is padding, whose
        values are ignored.
      tokenizer: has `encode(text)`, giving `tokens`, `labels`, `byte_ends` [N] and `n_bytes`; where it also gives
        `spans` [N], only positions with a span (not -1) count, and bytes are those of the spans.
      texts: documents; those without text are left out and counted.
      context: most positions the model reads at once.
      batch_size: rows of a batch.
      overlap: positions that a later window reads again as context, in [0, context).
      on_batch: told how many labels each batch counted.

    Returns:
      The scores, in the order of the texts.

    Raises:
      InputError: bad sizes, a score of another shape, or NaN.
    """
    if context < 1 or batch_size < 1 or not 0 <= overlap < context:
        raise InputError(
            f"need context >= 1, batch_size >= 1 and 0 <= overlap < context; got {context}, {batch_size}, {overlap}."
        )
    encoded, indices, empty = [], [], 0
    for index, text in enumerate(texts):
        document = tokenizer.encode(text) if text else None
        if document is None or document.n_bytes == 0:
            empty += 1
            continue
        encoded.append(document)
        indices.append(index)
    scores = [np.full(len(document.labels), np.nan, np.float32) for document in encoded]
    lengths = [len(document.labels) for document in encoded]
    for batch in _batches(_windows(lengths, context, overlap), context, batch_size):
        _score_batch(score_fn, batch, encoded, scores, (batch_size, context))
        if on_batch is not None:
            on_batch(sum(placed.window.stop - placed.window.counted for placed in batch))
    documents = [
        DocumentScore(index, score[rows], np.asarray(document.byte_ends, np.int32)[rows], int(document.n_bytes))
        for index, document, score in zip(indices, encoded, scores, strict=True)
        for rows in [_counted(document)]
    ]
    _refuse_nan(documents)
    return Evaluation(tuple(documents), empty)


def _counted(document: Any) -> Any:
    """The positions of a document that count: all, or those of its spans."""
    spans = getattr(document, "spans", None)
    return slice(None) if spans is None else np.flatnonzero(spans >= 0)


def _windows(lengths: Sequence[int], context: int, overlap: int) -> Iterator[_Window]:
    for document, length in enumerate(lengths):
        start = counted = 0
        while counted < length:
            stop = min(start + context, length)
            yield _Window(document, start, counted, stop)
            start, counted = stop - overlap, stop


def _batches(windows: Iterable[_Window], context: int, batch_size: int) -> Iterator[list[_Placed]]:
    """Lays windows one after another into rows, and rows into batches."""
    batch: list[_Placed] = []
    row, column = 0, 0
    for window in windows:
        length = window.stop - window.start
        if column + length > context:
            row, column = row + 1, 0
        if row == batch_size:
            yield batch
            batch, row = [], 0
        batch.append(_Placed(row, column, window))
        column += length
    if batch:
        yield batch


def _score_batch(
    score_fn: ScoreFn, batch: list[_Placed], encoded: Sequence[Any], scores: list[np.ndarray], shape: tuple[int, int]
) -> None:
    tokens, labels, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    counts = np.zeros(shape[0], np.int32)
    for row, column, window in batch:
        length = window.stop - window.start
        place = (row, slice(column, column + length))
        tokens[place] = encoded[window.document].tokens[window.start : window.stop]
        labels[place] = encoded[window.document].labels[window.start : window.stop]
        positions[place] = np.arange(length)
        counts[row] += 1
        segments[place] = counts[row]
    found = np.asarray(score_fn(tokens, labels, positions, segments))
    if found.shape != shape:
        raise InputError(f"score_fn must return one log-probability per label, {shape}; got {found.shape}.")
    for row, column, window in batch:
        first = column + window.counted - window.start
        scores[window.document][window.counted : window.stop] = found[row, first : column + window.stop - window.start]


def _refuse_nan(documents: Sequence[DocumentScore]) -> None:
    for document in documents:
        bad = np.flatnonzero(np.isnan(document.realised_logprob))
        if bad.size:
            raise InputError(
                f"the model's log-probability is NaN at position {bad[0]} of document {document.index} "
                f"({bad.size} such positions there); look for NaN in the model's weights."
            )
