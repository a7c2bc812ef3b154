"""The ensemble of models with different tokenizers: the mean of their probabilities, weighted or not.

Two tokenizers share no tokens, but they share bytes. A document is cut into the smallest spans whose two ends are
token boundaries in every model; the probability of a span is, for each model, the product of its labels' in it; the
ensemble's is the weighted mean over models. With equal tokenizers every span is one token and this is the exact
mixture.

A label without bytes belongs to the span before it (at the very start, to the one after it). The end of the document
is an event of its own, after the last byte; models must agree on whether there is one.

Not done: per-token weights, and mixing inside a span, which would need every model's distribution.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusejax.errors import InputError
from fusejax.evaluation.bits_per_byte import bits_per_byte
from fusejax.evaluation.documents import DocumentScore, Evaluation
from fusejax.types import Array

__all__ = ["EnsembleDocument", "EnsembleEvaluation", "ensemble_document", "ensemble_evaluations", "span_logprobs"]


class EnsembleDocument(NamedTuple):
    """What an ensemble says of one document of P spans."""

    index: int
    logprob: np.ndarray  # [P] float64 nats, of each span
    byte_ends: np.ndarray  # [P] int32, where each span ends
    n_bytes: int

    @property
    def nll_nats(self) -> float:
        """Negative log-likelihood of the document."""
        return -float(np.sum(self.logprob))


class EnsembleEvaluation(NamedTuple):
    """The ensemble's scores of all documents."""

    documents: tuple[EnsembleDocument, ...]

    @property
    def nll_nats(self) -> float:
        """Negative log-likelihood of all documents."""
        return sum(document.nll_nats for document in self.documents)

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(document.n_bytes for document in self.documents)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of all documents together."""
        return bits_per_byte(self.nll_nats, self.n_bytes)


def span_logprobs(documents: Sequence[DocumentScore]) -> tuple[np.ndarray, np.ndarray]:
    """Sums each model's log-probabilities over the smallest spans common to all.

    Args:
      documents: S scores of one text by different models.

    Returns:
      Log-probabilities [S, P] float64, and the byte ends of the spans [P].

    Raises:
      InputError: the scores are of different texts, or only some models predict the end of the document.
    """
    if not documents:
        raise InputError("an ensemble needs at least one model.")
    sizes = sorted({document.n_bytes for document in documents})
    if len(sizes) > 1:
        raise InputError(f"the models scored different texts: their lengths in bytes are {sizes}.")
    if not all(len(document.byte_ends) for document in documents):
        return np.zeros((len(documents), 0)), np.zeros(0, np.int32)  # a model predicts nothing of this text
    # Keys order boundaries: twice the byte; the end of the document comes one after its last byte.
    ends = [_label_ends(document) for document in documents]
    if len({int(e[-1]) % 2 for e in ends}) > 1:
        raise InputError("only some models predict the end of the document; encode with the end token for all or none.")
    starts = [2 * int(document.byte_ends[0]) for document in documents]
    common = set(ends[0].tolist()) | {starts[0]}
    for start, keys in zip(starts, ends, strict=True):
        common &= set(keys.tolist()) | {start}
    boundaries = np.array(sorted(key for key in common if key >= max(starts)), np.int64)
    if boundaries.size < 2:
        return np.zeros((len(documents), 0)), np.zeros(0, np.int32)
    sums = np.stack([_sums(d, keys, boundaries) for d, keys in zip(documents, ends, strict=True)])
    return sums, (boundaries[1:] // 2).astype(np.int32)


def _label_ends(document: DocumentScore) -> np.ndarray:
    """Where each label ends, as keys."""
    ends = 2 * np.append(document.byte_ends[1:], document.n_bytes).astype(np.int64)
    ends[-1] += int(document.byte_ends[-1] == document.n_bytes)  # a last label without bytes is the end token
    return ends


def _sums(document: DocumentScore, ends: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """Sums log-probabilities between boundaries; labels that end at or before the first start the first span."""
    logprobs = document.realised_logprob.astype(np.float64)
    begins = 2 * document.byte_ends.astype(np.int64)
    span = np.searchsorted(boundaries[1:], ends)
    inside = (begins >= boundaries[0]) & (span < len(boundaries) - 1)
    return np.bincount(span[inside], logprobs[inside], minlength=len(boundaries) - 1)


def ensemble_document(
    documents: Sequence[DocumentScore], *, weights: Sequence[float] | Array | None = None
) -> EnsembleDocument:
    """Mixes the scores of one text by several models.

    Args:
      documents: S scores of one text.
      weights: [S], not negative, divided by their sum; None: equal.

    Returns:
      The log of the mean probability of every span.

    Raises:
      InputError: as `span_logprobs`; weights that are negative, of another number or sum to 0.
    """
    log_weights = _log_weights(weights, len(documents))
    logprobs, ends = span_logprobs(documents)
    mixed = np.logaddexp.reduce(logprobs + log_weights[:, None], axis=0)
    return EnsembleDocument(documents[0].index, mixed, ends, documents[0].n_bytes)


def ensemble_evaluations(
    evaluations: Sequence[Evaluation], *, weights: Sequence[float] | Array | None = None
) -> EnsembleEvaluation:
    """Mixes several models' scores of the same documents.

    Args:
      evaluations: of S models.
      weights: [S] as in `ensemble_document`, or [D, S], those of every document.

    Raises:
      InputError: the models scored different documents; or as `ensemble_document`.
    """
    if not evaluations:
        raise InputError("an ensemble needs at least one model.")
    indices = [[document.index for document in evaluation.documents] for evaluation in evaluations]
    if any(other != indices[0] for other in indices[1:]):
        raise InputError("the models scored different documents; evaluate all on the same texts.")
    columns = list(zip(*(evaluation.documents for evaluation in evaluations), strict=True))
    each = [weights] * len(columns) if weights is None or np.ndim(weights) == 1 else list(weights)
    if len(each) != len(columns):
        raise InputError(f"weights are of {len(each)} documents, {len(columns)} were scored.")
    mixed = (ensemble_document(column, weights=own) for column, own in zip(columns, each, strict=True))
    return EnsembleEvaluation(tuple(mixed))


def _log_weights(weights: Sequence[float] | Array | None, count: int) -> np.ndarray:
    values = np.ones(count) if weights is None else np.asarray(weights, np.float64)
    if values.shape != (count,) or not np.isfinite(values).all() or (values < 0).any() or (count and not values.any()):
        raise InputError(f"weights must be {count} numbers >= 0 that do not sum to 0, got {weights!r}.")
    with np.errstate(divide="ignore"):
        return np.log(values) - np.log(values.sum())
