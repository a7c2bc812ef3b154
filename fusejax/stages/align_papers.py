"""align as the papers do it: tokens paired by dynamic time warping of their strings, maps by edit distance or counts.

`align.positions: dtw` writes the same artefact (A3) as the byte-exact alignment, so every later stage takes it as it
is: the partition is the identity (every target token is its own event), and a fallback is a distribution with all
mass on the next token (status 3). `loss.tail: renormalize` and `score: token_ce` complete the papers' recipe.

`exact` and `min_ed` form distributions as FuseLLM does, `statistics` as FuseChat 2 does; that one aligns the corpus
twice, once to count. Strings are spelled from bytes, so no table of tokenizer classes is needed.
"""

__all__ = ["Parity", "min_ed_vocabulary_map", "parity_of"]

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusejax.alignment import AlignedDocument, report_document
from fusejax.alignment.document import record_arrays
from fusejax.alignment.parity import (
    PairCounter,
    PairCounts,
    StringAligner,
    Vocabulary,
    Warp,
    aligned_topk,
    choose_fusechat,
    choose_fusellm,
    literal_ids,
    min_ed_map,
    statistics_map,
    vocabulary_of_bytes,
)
from fusejax.alignment.parity.transform import ONE_HOT
from fusejax.errors import InputError
from fusejax.io.maps import kept_map
from fusejax.io.progress import progress
from fusejax.io.store import Record, RecordReader
from fusejax.io.tokenizers import EncodedDocument, Tokenizer
from fusejax.types import Array, TopK, VocabMap

MAX_CELLS = 1 << 32  # of the dynamic program; a quarter byte each


class Parity(NamedTuple):
    """What the papers' alignment of one pair of tokenizers needs."""

    source: Vocabulary
    target: Vocabulary
    aligner: StringAligner
    literal: Array  # [V_s] int32
    table: Array  # [V_s] int32, the vocabulary map
    fusechat: bool

    @property
    def vocab_map(self) -> VocabMap:
        """The map as artefacts store it: every target token is its own symbol."""
        return VocabMap(self.table, np.arange(len(self.target.pieces), dtype=np.int32))

    def align(self, source: Record, target: EncodedDocument, *, dtype: str) -> AlignedDocument:
        """Aligns one captured document with its encoding by the target's tokenizer; returns the record (A3)."""
        record, doc_id = source.arrays, source.doc_id
        if int(source.header["n_bytes"]) != target.n_bytes:
            raise InputError(
                f"document {doc_id!r}: captured with {source.header['n_bytes']} bytes, but the text has "
                f"{target.n_bytes}; the corpus has changed since the capture, so capture it again."
            )
        stored = TopK(record["topk_ids"], record["topk_logprobs"], record["residual_logprob"])
        moved, status, index = self._distributions(stored, record["tokens"], target, doc_id)
        realised = np.asarray(record["realised_logprob"])
        report = report_document(
            record["labels"],
            target.labels,
            target.byte_ends,
            index,
            self.vocab_map,
            status=status,
            n_bytes=target.n_bytes,
            exact=target.exact,
            doc_id=doc_id,
        )
        arrays = record_arrays(record, target, moved, status, dtype)
        header = {
            "n_bytes": target.n_bytes,
            "source_nll_nats": float(-realised.astype(np.float64).sum()),
            "aligned": report.aligned,
            "dropped": report.dropped,
            "one_hot": int((status == ONE_HOT).sum()),
        }
        return AlignedDocument(header, arrays, report)

    def _distributions(
        self, stored: TopK, tokens: Array, target: EncodedDocument, doc_id: str
    ) -> tuple[TopK, Array, Array]:
        """(distributions, status [T], source position of each aligned target position or -1)."""
        if not len(tokens) or not len(target.tokens):
            empty = len(target.tokens), stored.ids.shape[1]
            none = TopK(
                np.full(empty, -1, np.int32), np.full(empty, -np.inf, np.float32), np.zeros(empty[0], np.float32)
            )
            return none, np.zeros(empty[0], np.int8), np.full(empty[0], -1, np.int32)
        warp = _warp(self.aligner, tokens, target.tokens, doc_id)
        if self.fusechat:
            choice = choose_fusechat(warp, tokens, target.tokens, self.source, self.target)
        else:
            begun = np.flatnonzero(np.asarray(target.byte_ends) > 0)
            choice = choose_fusellm(
                warp, tokens, target.tokens, self.source, self.target, self.table,
                literal=self.literal, text_start=int(begun[0]) if begun.size else None,
            )  # fmt: skip
        moved, status = aligned_topk(stored, choice, self.table, target.labels, max_entries=stored.ids.shape[1])
        return moved, status, np.maximum(choice.source, -1)


def parity_of(
    vocabulary: str, source: Tokenizer, target: Tokenizer, reader: RecordReader, texts: Sequence[str], *, batch: int
) -> Parity:
    """Prepares the papers' alignment of a captured source.

    Args:
      vocabulary: "exact", "min_ed" or "statistics".
      source, target: the tokenizers.
      reader: the captured records, in the order of `texts`; read for "statistics" only.
      texts: the documents.
      batch: documents encoded at a time.

    Returns:
      What aligns its documents.
    """
    ours, theirs = _spelled(source), _spelled(target)
    literal = literal_ids(ours, theirs)
    fusechat = vocabulary == "statistics"
    aligner = StringAligner(ours, theirs, generation="fusechat_v2" if fusechat else "fusellm")
    if vocabulary == "min_ed":
        table = min_ed_vocabulary_map(source, target).symbol_of_source
    elif fusechat:
        counts = _count(aligner, source, target, reader, texts, batch=batch)
        table = np.where(literal >= 0, literal, statistics_map(counts, ours, theirs)).astype(np.int32)
    else:
        table = literal
    return Parity(ours, theirs, aligner, literal, table, fusechat)


def min_ed_vocabulary_map(source: Tokenizer, target: Tokenizer) -> VocabMap:
    """FuseLLM's vocabulary map, by bytes, from the cache where it was made before.

    Every target token is its own symbol. Special tokens are paired by role and have no other neighbour.
    """

    def make() -> VocabMap:
        ours, theirs = _spelled(source), _spelled(target)
        table = min_ed_map(ours, theirs)
        special = np.array([surface is None for surface in source.token_bytes], bool)
        table[special] = literal_ids(ours, theirs)[special]
        return VocabMap(table, np.arange(len(target.token_bytes), dtype=np.int32))

    return kept_map("min_ed", source, target, make)


def _spelled(tokenizer: Tokenizer) -> Vocabulary:
    return vocabulary_of_bytes(tokenizer.token_bytes, tokenizer.special_roles)


def _count(
    aligner: StringAligner,
    source: Tokenizer,
    target: Tokenizer,
    reader: RecordReader,
    texts: Sequence[str],
    *,
    batch: int,
) -> PairCounts:
    counter = PairCounter(source.vocab_size)
    with progress("count aligned pairs", total=len(texts), unit="documents") as bar:
        for first in range(0, len(texts), batch):
            part = texts[first : first + batch]
            for index, encoded in enumerate(target.encode_batch(part), first):
                record = reader[index]
                tokens = record.arrays["tokens"]
                if len(tokens) and len(encoded.tokens):
                    counter.add(_warp(aligner, tokens, encoded.tokens, record.doc_id), tokens, encoded.tokens)
            bar.update(len(part))
    return counter.counts()


def _warp(aligner: StringAligner, source: Array, target: Array, doc_id: str) -> Warp:
    if len(source) * len(target) > MAX_CELLS:
        raise InputError(
            f"document {doc_id!r} has {len(source)} by {len(target)} tokens, too many to compare each with each; "
            "cut documents by `corpus.max_document_bytes`, or use `align.positions: bytes`."
        )
    return aligner(source, target)
