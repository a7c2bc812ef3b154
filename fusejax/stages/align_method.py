"""What aligns the documents of one source: the vocabulary map of a configuration, and a function of one record.

Conversations and texts with trained spans go through the same code as plain documents, on their trained positions
(`fusejax.alignment.masked`); in conversations the stop tokens of the two chat templates are paired.
"""

__all__ = ["choose_method"]

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from fusejax.alignment import (
    AlignedDocument,
    Conditioner,
    Opening,
    align_by_chunks,
    align_by_index,
    align_document,
    align_masked,
    pair_stops,
    stop_label,
    trained_source,
)
from fusejax.config import AlignConfig
from fusejax.data.corpus import Document
from fusejax.data.encoding import DocumentEncoder
from fusejax.io.store import Record, RecordReader
from fusejax.io.tokenizers import EncodedDocument, Tokenizer
from fusejax.stages.align_papers import min_ed_vocabulary_map, parity_of
from fusejax.stages.compare import first_bytes, vocabulary_map
from fusejax.types import VocabMap

_RIVALS = {"index": align_by_index, "chunks": align_by_chunks}
# A captured record, the document as the target reads it, and whether it is a conversation.
AlignRecord = Callable[[Record, EncodedDocument, bool], AlignedDocument]


def choose_method(
    options: AlignConfig,
    reader: RecordReader,
    source: DocumentEncoder,
    target: DocumentEncoder,
    documents: Sequence[Document],
    *,
    dtype: str,
) -> tuple[VocabMap, AlignRecord]:
    """Returns the vocabulary map, and what aligns one document.

    Args:
      options: of the configuration.
      reader: the captured records, in the order of `documents`.
      source, target: what reads documents as the two models do.
      documents: of the corpus.
      dtype: of log-probabilities.
    """
    ours, theirs, name = source.tokenizer, target.tokenizer, options.vocabulary
    stops = _stops(source, target, documents)
    if options.positions in _RIVALS:
        vocab_map = vocabulary_map("exact", ours, theirs, ())
        return vocab_map, partial(_align_rival, _RIVALS[options.positions], vocab_map, dtype=dtype)
    if ours.fingerprint == theirs.fingerprint:  # a tokenizer with itself needs neither strings nor counts
        name = name if name == "coarse" else "exact"
    elif options.positions == "dtw":
        parity = parity_of(options, ours, target, reader, documents, stops=stops)
        return parity.vocab_map, partial(parity.align, dtype=dtype)
    if name == "min_ed":
        vocab_map = min_ed_vocabulary_map(ours, theirs)
    else:
        sample = first_bytes((document.text for document in documents), options.calibration_bytes)
        vocab_map = vocabulary_map(name, ours, theirs, sample)
    plain, chat = (vocab_map, vocab_map) if stops is None else pair_stops(vocab_map, *stops)
    counts = _token_counts(reader, ours) if options.conditioned else None
    of_plain = _tools(plain, ours, theirs, coarse=name == "coarse", counts=counts)
    of_chat = of_plain if stops is None else _tools(chat, ours, theirs, coarse=name == "coarse", counts=counts)

    def align_record(record: Record, encoded: EncodedDocument, is_chat: bool) -> AlignedDocument:
        masked = encoded.spans is not None or "spans" in record.arrays
        return (align_masked if masked else align_document)(
            record.arrays,
            encoded,
            chat if is_chat else plain,
            n_bytes=int(record.header["n_bytes"]),
            dtype=dtype,
            exact=encoded.exact and record.header.get("exact", True),
            doc_id=record.doc_id,
            chain=options.chain,
            **(of_chat if is_chat else of_plain),
        )

    return plain, align_record


def _align_rival(
    align: Callable[..., AlignedDocument],
    vocab_map: VocabMap,
    record: Record,
    encoded: EncodedDocument,
    is_chat: bool,
    *,
    dtype: str,
) -> AlignedDocument:
    """Aligns one document for a rival's loss; conversations and trained spans by their trained positions."""
    masked = is_chat or encoded.spans is not None or "spans" in record.arrays
    return (partial(align_masked, align=align) if masked else align)(
        record.arrays,
        encoded,
        vocab_map,
        n_bytes=int(record.header["n_bytes"]),
        dtype=dtype,
        exact=encoded.exact and record.header.get("exact", True),
        doc_id=record.doc_id,
    )


def _tools(
    vocab_map: VocabMap, source: Tokenizer, target: Tokenizer, *, coarse: bool, counts: np.ndarray | None
) -> dict[str, Any]:
    return {
        "opening": Opening(source, target, vocab_map) if coarse else None,
        "conditioner": None if counts is None else Conditioner(source, target, vocab_map, counts=counts),
    }


def _stops(source: DocumentEncoder, target: DocumentEncoder, documents: Sequence[Document]) -> tuple[int, int] | None:
    """The ids that close a turn on both sides, from the first conversation; None where there is none."""
    if source.template is None or target.template is None:
        return None
    talk = next((document for document in documents if document.turns), None)
    return None if talk is None else (stop_label(source.encode(talk)), stop_label(target.encode(talk)))


def _token_counts(reader: RecordReader, source: Tokenizer) -> np.ndarray:
    """How often each of the source's tokens is trained in its captured documents, [V_s]."""
    counts = np.zeros(source.vocab_size, np.int64)
    for record in reader:
        counts += np.bincount(trained_source(record.arrays)["labels"], minlength=source.vocab_size)
    return counts
