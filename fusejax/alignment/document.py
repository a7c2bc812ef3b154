"""One document through the alignment: captured source arrays in, aligned record arrays out.

This joins positions, vocabulary map and transport in the form in which artefacts are stored: A1 (`tokens`,
`labels`, `byte_ends`, `topk_ids`, `topk_logprobs`, `residual_logprob`, `realised_logprob`) becomes A3 (the
target's `tokens`, `labels`, `byte_ends`, then `ids`, `logprobs`, `residual_logprob`, `status`, and the source's
`source_byte_ends`, `source_realised`, which weigh sources by bits per byte later).

A position is `ALIGNED` when a source position ends at its byte and some of its mass has a symbol, `CONDITIONED`
when a `Conditioner` is given and finds mass for it; every other position is `DROPPED`: empty, trained by plain CLM.

A *chain* is the source's probability of a whole target token: where the token is longer than its symbol and both
sides have a boundary at its two ends, the sum of the source's realised log-probabilities over that span. The
distribution over symbols only supervises the token's beginning there; the chain gives back the rest of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fusejax.alignment.conditioning import Conditioner
from fusejax.alignment.opening import Opening
from fusejax.alignment.positions import align_positions
from fusejax.alignment.report import ALIGNED, CONDITIONED, DROPPED, DocumentReport, report_document
from fusejax.alignment.transport import transport
from fusejax.errors import InputError
from fusejax.types import Array, TopK, VocabMap

__all__ = ["AlignedDocument", "Encoding", "align_document", "chain_logprobs", "record_arrays"]


class Encoding(Protocol):
    """A document as the target's tokenizer encodes it (`fusejax.io.tokenizers.EncodedDocument` is one)."""

    @property
    def tokens(self) -> Array: ...

    @property
    def labels(self) -> Array: ...

    @property
    def byte_ends(self) -> Array: ...

    @property
    def n_bytes(self) -> int: ...


class AlignedDocument(NamedTuple):
    """An aligned record (artefact A3) and what happened on the way."""

    header: dict[str, Any]  # n_bytes, source_nll_nats, aligned, conditioned, dropped
    arrays: dict[str, Array]
    report: DocumentReport


def align_document(
    source: Mapping[str, Array],
    target: Encoding,
    vocab_map: VocabMap,
    *,
    n_bytes: int | None = None,
    max_entries: int | None = None,
    dtype: str = "float32",
    exact: bool = True,
    doc_id: str = "",
    opening: Opening | None = None,
    conditioner: Conditioner | None = None,
    chain: bool = False,
    begins: Sequence[int] = (0,),
) -> AlignedDocument:
    """Carries one captured document to the target's positions and symbols.

    Args:
      source: arrays of the captured record (A1), N_s positions, K entries.
      target: the same document encoded by the target's tokenizer, N positions.
      vocab_map: symbols of both vocabularies.
      n_bytes: the captured document's length, checked against the target's; None: not checked.
      max_entries: entries kept per position; None: K.
      dtype: of the stored log-probabilities.
      exact: whether both encodings' byte ends are exact, for the report.
      doc_id: for messages and the report.
      opening: names tokens where one side begins with a dummy space; None: the map holds there too.
      conditioner: fills positions inside a source token; None: they stay empty.
      chain: also store `chain_logprob`.
      begins: the byte ends at which text begins, for the opening.

    Returns:
      The aligned record and its report.

    Raises:
      InputError: the two sides are not the same document.
    """
    if n_bytes is not None and n_bytes != target.n_bytes:
        raise InputError(
            f"document {doc_id!r}: captured with {n_bytes} bytes, but the text has {target.n_bytes}; "
            "the corpus has changed since the capture, so capture it again."
        )
    index = align_positions(source["byte_ends"], target.byte_ends)
    first: list[tuple[int, Array]] = []
    if opening is not None:
        ends = source["byte_ends"], target.byte_ends
        first = opening(source["labels"], ends[0], target.labels, ends[1], index, begins=begins)
    stored = TopK(source["topk_ids"], source["topk_logprobs"], source["residual_logprob"])
    moved = _transported(stored, index, vocab_map, first, max_entries)
    kept = _kept(stored, moved, index)
    status = np.where((moved.ids >= 0).any(axis=1), ALIGNED, DROPPED).astype(np.int8)
    if conditioner is not None:
        _condition(moved, status, conditioner, source, target.byte_ends, index)
    report = report_document(
        source["labels"],
        target.labels,
        target.byte_ends,
        index,
        vocab_map,
        status=status,
        kept=kept,
        n_bytes=target.n_bytes,
        exact=exact,
        doc_id=doc_id,
        opening=first,
    )
    arrays = record_arrays(source, target, moved, status, dtype)
    if chain:
        symbols = np.asarray(vocab_map.symbol_of_target)[arrays["labels"]]
        needed = symbols != arrays["labels"]
        found = chain_logprobs(source["realised_logprob"], index, arrays["byte_ends"], needed=needed)
        arrays["chain_logprob"] = np.where(status == ALIGNED, found, -np.inf).astype(dtype)
    header = {
        "n_bytes": target.n_bytes,
        "source_nll_nats": float(-np.asarray(source["realised_logprob"], np.float64).sum()),
        "aligned": report.aligned,
        "conditioned": report.conditioned,
        "dropped": report.dropped,
    }
    return AlignedDocument(header, arrays, report)


def chain_logprobs(source_realised: Array, source_index: Array, target_ends: Array, *, needed: Array) -> Array:
    """The source's log-probability of the target's true next token, where both sides have a boundary at its end.

    Args:
      source_realised: [T_s] nats, the source's log-probability of its own next token.
      source_index: [T] int32, the aligned source positions, -1: none.
      target_ends: [T] byte ends of the target positions, before the label is read.
      needed: [T] bool, where a chain is wanted (the label is longer than its symbol).

    Returns:
      [T] float64 nats; -inf where there is no chain.
    """
    before = np.concatenate([[0.0], np.cumsum(np.asarray(source_realised, np.float64))])
    index, ends = np.asarray(source_index), np.asarray(target_ends)
    chains = np.full(index.size, -np.inf)
    if index.size > 1:
        both = needed[:-1] & (index[:-1] >= 0) & (index[1:] >= 0) & (ends[1:] > ends[:-1])
        chains[:-1][both] = before[index[1:][both]] - before[index[:-1][both]]
    return chains


def _transported(
    stored: TopK, index: Array, vocab_map: VocabMap, first: Sequence[tuple[int, Array]], max_entries: int | None
) -> TopK:
    """The distributions of the aligned positions; openings by their own names."""
    moved = transport(stored, index, vocab_map, max_entries=max_entries)
    for row, table in first:
        names = vocab_map._replace(symbol_of_source=table)
        only = transport(stored, index[row : row + 1], names, max_entries=max_entries)
        for whole, part in zip(moved, only, strict=True):
            whole[row] = part[0]
    return moved


def _condition(
    moved: TopK, status: Array, conditioner: Conditioner, source: Mapping[str, Array], ends: Array, index: Array
) -> None:
    """Fills positions inside a source token, in place."""
    found = conditioner(source, ends, index, entries=moved.ids.shape[1])
    for whole, part in zip(moved, found.topk, strict=True):
        whole[found.rows] = part
    status[found.rows] = np.where((found.topk.ids >= 0).any(axis=1), CONDITIONED, DROPPED)


def record_arrays(
    source: Mapping[str, Array], target: Encoding, moved: TopK, status: Array, dtype: str
) -> dict[str, Array]:
    """Returns the arrays of an aligned record (A3): the target's `[T]`, its `moved` distributions, the source's."""
    return {
        "tokens": np.asarray(target.tokens, np.int32),
        "labels": np.asarray(target.labels, np.int32),
        "byte_ends": np.asarray(target.byte_ends, np.int32),
        "ids": moved.ids,
        "logprobs": moved.logprobs.astype(dtype),
        "residual_logprob": moved.residual_logprob.astype(dtype),
        "status": status,
        "source_byte_ends": np.asarray(source["byte_ends"], np.int32),
        "source_realised": np.asarray(source["realised_logprob"]),
    }


def _kept(stored: TopK, moved: TopK, index: Array) -> Array:
    """Mass with a symbol over mass stored, [T]; 0 where nothing was stored."""
    before = np.exp(np.asarray(stored.logprobs, np.float64)).sum(axis=1)[np.maximum(index, 0)] if len(index) else []
    after = np.exp(moved.logprobs.astype(np.float64)).sum(axis=1)
    return np.divide(after, before, out=np.zeros(len(index)), where=np.greater(before, 0))
