"""What the rivals' losses compare, in aligned records (A3): whole positions by number (ULD), chunks of text (ALM).

Neither asks which tokens the entries are. The records have the fields of any other, so that sources are scored, chosen
and weighed alike, but another meaning, which `fusejax.losses.rivals` knows:

* by number: position i of the source, of each trained span, stands at position i of the target, as far as the shorter
  reaches. The id of an entry is its rank.
* by chunks: a chunk is what lies between two neighbouring bytes at which both tokenizers have a boundary. At the
  position that predicts its last token there is one entry: its id is the number of the target's tokens in the chunk,
  its log-probability that of the whole chunk under the source. The rest says nothing. What follows the last boundary
  of a document is no chunk, nor is one less likely than exp(-100), which is longer than any text should need.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fusejax.alignment.document import AlignedDocument, Encoding, record_arrays
from fusejax.alignment.positions import align_positions
from fusejax.alignment.report import ALIGNED, DROPPED, report_document
from fusejax.errors import InputError
from fusejax.types import Array, TopK, VocabMap

__all__ = ["align_by_chunks", "align_by_index", "chunk_targets"]

_LEAST = -100.0  # nats: float32 and the store keep no less


def align_by_index(
    source: Mapping[str, Array],
    target: Encoding,
    vocab_map: VocabMap,
    *,
    n_bytes: int | None = None,
    dtype: str = "float32",
    exact: bool = True,
    doc_id: str = "",
    begins: Sequence[int] = (0,),
) -> AlignedDocument:
    """Carries a captured document's distributions to the target's positions by their number in the text.

    Args:
      source: arrays of the captured record (A1).
      target: the same document encoded by the target's tokenizer, N positions.
      vocab_map: for the report alone.
      n_bytes, dtype, exact, doc_id: as in `align_document`.
      begins: the byte ends at which trained spans begin; each is counted by itself.

    Raises:
      InputError: the two sides are not the same document.
    """
    _check_length(n_bytes, target, doc_id)
    index = _by_number(np.asarray(source["byte_ends"]), np.asarray(target.byte_ends), np.asarray(begins))
    ids, logprobs = np.asarray(source["topk_ids"]), np.asarray(source["topk_logprobs"], np.float32)
    rows, there = np.maximum(index, 0), index >= 0
    width = ids.shape[1]
    if not len(ids):
        empty = (len(index), width)
        moved = TopK(np.full(empty, -1, np.int32), np.full(empty, -np.inf, np.float32), np.zeros(len(index)))
        return _record(source, target, vocab_map, moved, index, there, dtype=dtype, exact=exact, doc_id=doc_id)
    used = there[:, None] & (ids[rows] >= 0)
    moved = TopK(
        np.where(used, np.arange(width, dtype=np.int32), np.int32(-1)),
        np.where(used, logprobs[rows], np.float32(-np.inf)),
        np.where(there, np.asarray(source["residual_logprob"], np.float32)[rows], np.float32(0)),
    )
    return _record(source, target, vocab_map, moved, index, there, dtype=dtype, exact=exact, doc_id=doc_id)


def align_by_chunks(
    source: Mapping[str, Array],
    target: Encoding,
    vocab_map: VocabMap,
    *,
    n_bytes: int | None = None,
    dtype: str = "float32",
    exact: bool = True,
    doc_id: str = "",
    begins: Sequence[int] = (0,),
) -> AlignedDocument:
    """Writes the source's likelihood of every smallest chunk of text at the position that predicts its last token.

    Arguments and errors are those of `align_by_index`; trained spans begin at boundaries, `begins` is not needed.
    """
    del begins
    _check_length(n_bytes, target, doc_id)
    index = align_positions(source["byte_ends"], target.byte_ends)
    lengths, logprobs = chunk_targets(source["realised_logprob"], index)
    ends = lengths > 0
    moved = TopK(
        np.where(ends, lengths, -1).astype(np.int32)[:, None],
        logprobs.astype(np.float32)[:, None],
        np.where(ends, -np.inf, 0.0).astype(np.float32),  # so that the store keeps the likelihood, not one minus it
    )
    return _record(source, target, vocab_map, moved, index, ends, dtype=dtype, exact=exact, doc_id=doc_id)


def chunk_targets(source_realised: Array, source_index: Array) -> tuple[Array, Array]:
    """The smallest chunks that both sides can be cut in.

    Args:
      source_realised: [T_s] nats, the source's log-probability of its own next token.
      source_index: [T] int32, of `align_positions`.

    Returns:
      (lengths [T] int64: at the position that predicts a chunk's last token, how many of the target's tokens it has,
      else 0; logprobs [T] float64 nats of that chunk under the source, -inf elsewhere).
    """
    before = np.concatenate([[0.0], np.cumsum(np.asarray(source_realised, np.float64))])
    index = np.asarray(source_index)
    lengths, logprobs = np.zeros(len(index), np.int64), np.full(len(index), -np.inf)
    bounds = np.flatnonzero(index >= 0)
    found = np.minimum(before[index[bounds[1:]]] - before[index[bounds[:-1]]], 0.0)
    keep = found >= _LEAST
    last = bounds[1:][keep] - 1
    lengths[last], logprobs[last] = np.diff(bounds)[keep], found[keep]
    return lengths, logprobs


def _by_number(source_ends: Array, target_ends: Array, begins: Array) -> Array:
    """[T] int32, the source position with the same number in the same span, -1 where the source's is shorter."""
    spans, theirs = (np.searchsorted(begins, ends, side="right") for ends in (target_ends, source_ends))
    number = np.arange(len(spans)) - np.searchsorted(spans, spans)
    first, after = np.searchsorted(theirs, spans, side="left"), np.searchsorted(theirs, spans, side="right")
    return np.where(first + number < after, first + number, -1).astype(np.int32)


def _record(
    source: Mapping[str, Array],
    target: Encoding,
    vocab_map: VocabMap,
    moved: TopK,
    index: Array,
    there: Array,
    *,
    dtype: str,
    exact: bool,
    doc_id: str,
) -> AlignedDocument:
    status = np.where(there, ALIGNED, DROPPED).astype(np.int8)
    sides = (source["labels"], target.labels, target.byte_ends, index, vocab_map)
    given = {"status": status, "n_bytes": target.n_bytes, "exact": exact, "doc_id": doc_id}
    report = report_document(*sides, **given)
    header = {
        "n_bytes": target.n_bytes,
        "source_nll_nats": float(-np.asarray(source["realised_logprob"], np.float64).sum()),
        "aligned": report.aligned,
        "conditioned": 0,
        "dropped": report.dropped,
    }
    return AlignedDocument(header, record_arrays(source, target, moved, status, dtype), report)


def _check_length(n_bytes: int | None, target: Encoding, doc_id: str) -> None:
    if n_bytes is not None and n_bytes != target.n_bytes:
        raise InputError(
            f"document {doc_id!r}: captured with {n_bytes} bytes, but the text has {target.n_bytes}; "
            "the corpus has changed since the capture, so capture it again."
        )
