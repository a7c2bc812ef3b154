"""align as the papers do it: tokens paired by dynamic time warping of their strings, maps by edit distance or counts.

`align.positions: dtw` writes the same artefact (A3) as the byte-exact alignment, so every later stage takes it as it
is: the partition is the identity (every target token is its own event), and a fallback is a distribution with all
mass on the next token (status 3). `loss.tail: renormalize` and `score: token_ce` complete the papers' recipe.

`exact` and `min_ed` form distributions as FuseLLM does, `statistics` as FuseChat 2 does; that one aligns the corpus
twice, once to count (the map that comes of it is kept in the user's cache). `reference_bugs` gives the released
programs' defects back. Strings are spelled from bytes, so no table of tokenizer classes is needed.
"""

__all__ = ["Parity", "min_ed_vocabulary_map", "parity_of"]

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusejax.alignment import AlignedDocument, mask_target, report_document
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
from fusejax.config import AlignConfig
from fusejax.data.corpus import Document
from fusejax.data.encoding import DocumentEncoder
from fusejax.errors import InputError
from fusejax.io.manifest import fingerprint_of
from fusejax.io.maps import kept_map
from fusejax.io.progress import progress
from fusejax.io.store import Record, RecordReader
from fusejax.io.tokenizers import EncodedDocument, Tokenizer
from fusejax.types import Array, TopK, VocabMap

BATCH = 256  # documents encoded at a time
MAX_CELLS = 1 << 32  # of the dynamic program; a quarter byte each


class Parity(NamedTuple):
    """What the papers' alignment of one pair of tokenizers needs."""

    source: Vocabulary
    target: Vocabulary
    aligner: StringAligner
    literal: Array  # [V_s] int32
    table: Array  # [V_s] int32, the vocabulary map
    fusechat: bool
    reference_bugs: bool = False

    @property
    def vocab_map(self) -> VocabMap:
        """The map as artefacts store it: every target token is its own symbol."""
        return VocabMap(self.table, np.arange(len(self.target.pieces), dtype=np.int32))

    def align(self, source: Record, target: EncodedDocument, is_chat: bool = False, *, dtype: str) -> AlignedDocument:
        """Aligns one captured document with its encoding by the target's tokenizer; returns the record (A3).

        A conversation is aligned whole, as FuseChat does it; what is not trained is emptied afterwards.
        """
        record, doc_id = source.arrays, source.doc_id
        if int(source.header["n_bytes"]) != target.n_bytes:
            raise InputError(
                f"document {doc_id!r}: captured with {source.header['n_bytes']} bytes, but the text has "
                f"{target.n_bytes}; the corpus has changed since the capture, so capture it again."
            )
        stored = TopK(record["topk_ids"], record["topk_logprobs"], record["residual_logprob"])
        moved, status, index = self._distributions(stored, record["tokens"], target, doc_id)
        arrays = record_arrays(record, target, moved, status, dtype)
        rows = np.arange(len(target.tokens))
        if target.spans is not None:
            rows = np.flatnonzero(target.spans >= 0)
            arrays = mask_target(arrays, target, record)
        report = report_document(
            record["labels"],
            target.labels[rows],
            target.byte_ends[rows],
            index[rows],
            self.vocab_map,
            status=status[rows],
            n_bytes=target.n_bytes,
            exact=target.exact,
            doc_id=doc_id,
        )
        header = {
            "n_bytes": target.n_bytes,
            "source_nll_nats": float(-arrays["source_realised"].astype(np.float64).sum()),
            "aligned": report.aligned,
            "dropped": report.dropped,
            "one_hot": int((status[rows] == ONE_HOT).sum()),
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
                reference_bugs=self.reference_bugs,
            )  # fmt: skip
        # FuseLLM's program names the token just read where it should name the next one; FuseChat 2's does not.
        named = target.tokens if self.reference_bugs and not self.fusechat else target.labels
        options = {"max_entries": stored.ids.shape[1], "reference_bugs": self.reference_bugs}
        moved, status = aligned_topk(stored, choice, self.table, named, **options)
        return moved, status, np.maximum(choice.source, -1)


def parity_of(
    options: AlignConfig,
    source: Tokenizer,
    target: DocumentEncoder,
    reader: RecordReader,
    documents: Sequence[Document],
    *,
    stops: tuple[int, int] | None = None,
) -> Parity:
    """Prepares the papers' alignment of a captured source.

    Args:
      options: `vocabulary` is "exact", "min_ed" or "statistics".
      source: the source's tokenizer; target: what reads documents as the target does.
      reader: the captured records, in the order of `documents`; read for "statistics" only.
      documents: of the corpus.
      stops: the ids that close a turn of a conversation on both sides, which are paired.

    Returns:
      What aligns its documents.
    """
    ours, theirs = _spelled(source), _spelled(target.tokenizer)
    literal = literal_ids(ours, theirs)
    fusechat = options.vocabulary == "statistics"
    aligner = StringAligner(ours, theirs, generation="fusechat_v2" if fusechat else "fusellm")
    if options.vocabulary == "min_ed":
        table = min_ed_vocabulary_map(source, target.tokenizer).symbol_of_source
    elif fusechat:

        def make() -> VocabMap:
            counts = _count(aligner, source, target, reader, documents)
            table = statistics_map(counts, ours, theirs, reference_bugs=options.reference_bugs)
            table = np.where(literal >= 0, literal, table).astype(np.int32)
            return VocabMap(table, np.arange(len(theirs.pieces), dtype=np.int32))

        # Counting aligns the whole corpus, so its outcome is kept, by the corpus and by what reads it.
        read = [reader.manifest.parents, reader.manifest.settings.get("chat_template"), target.fingerprint]
        method = f"statistics-{fingerprint_of([*read, options.reference_bugs])[:16]}"
        table = kept_map(method, source, target.tokenizer, make).symbol_of_source
    else:
        table = literal
    if stops is not None:
        table = np.array(table, np.int32)
        table[stops[0]] = stops[1]
    return Parity(ours, theirs, aligner, literal, table, fusechat, options.reference_bugs)


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
    target: DocumentEncoder,
    reader: RecordReader,
    documents: Sequence[Document],
) -> PairCounts:
    """Counts aligned pairs over the corpus, conversations whole."""
    counter = PairCounter(source.vocab_size)
    with progress("count aligned pairs", total=len(documents), unit="documents") as bar:
        for first in range(0, len(documents), BATCH):
            part = documents[first : first + BATCH]
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
