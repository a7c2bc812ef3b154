"""compare: two tokenizers on a text, without any model: the numbers of an alignment, and a page that shows them.

The same text calibrates the coarse alphabet and is measured, as in a run, where both are the training text.
"""

__all__ = ["Comparison", "compare_tokenizers", "first_bytes", "vocabulary_map", "write_alignment_page"]

import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusejax.alignment import (
    Opening,
    align_positions,
    coarse_map,
    count_symbols,
    exact_map,
    join_symbols,
    report_document,
    summary,
)
from fusejax.alignment.details import alignment_details
from fusejax.io.manifest import write_json
from fusejax.io.maps import kept_map
from fusejax.io.tokenizers import EncodedDocument, Tokenizer
from fusejax.report.alignment import build_alignment_report
from fusejax.types import Array, VocabMap

CALIBRATION_BYTES = 2_000_000


class Comparison(NamedTuple):
    """What `compare_tokenizers` found, and what a closer look needs."""

    facts: dict[str, Any]  # of `fusejax.alignment.report.summary`
    source: Tokenizer
    target: Tokenizer
    texts: Sequence[str]
    sources: list[EncodedDocument]
    targets: list[EncodedDocument]
    indices: list[Array]
    openings: list[list[tuple[int, Array]]]
    vocab_map: VocabMap


def first_bytes(texts: Iterable[str], limit: int) -> list[str]:
    """Returns the first texts that are together at most `limit` bytes long."""
    kept, total = [], 0
    for text in texts:
        total += len(text.encode("utf-8", "surrogatepass"))
        if total > limit:
            break
        kept.append(text)
    return kept


def vocabulary_map(method: str, source: Tokenizer, target: Tokenizer, sample: Sequence[str]) -> VocabMap:
    """Returns the map of a method; the coarse alphabet calibrated on a sample of text (none: as it is)."""
    if method == "exact":
        return exact_map(source, target)
    vocab_map = kept_map("coarse", source, target, lambda: coarse_map(source, target))
    if not sample or source.fingerprint == target.fingerprint:
        return vocab_map
    pairs = [
        (theirs.labels, ours.labels, align_positions(theirs.byte_ends, ours.byte_ends))
        for theirs, ours in zip(source.encode_batch(sample), target.encode_batch(sample), strict=True)
    ]
    return join_symbols(vocab_map, target.token_bytes, *count_symbols(pairs, vocab_map))


def compare_tokenizers(source: Tokenizer, target: Tokenizer, texts: Sequence[str], *, vocabulary: str) -> Comparison:
    """Aligns two tokenizers on texts, without any model.

    Args:
      source, target: the tokenizers.
      texts: the documents.
      vocabulary: the vocabulary map.

    Returns:
      The comparison; its facts are the report of `fusejax.alignment.report.summary`, with `positions_per_second`
      of the alignment proper (tokenizing excluded).
    """
    vocab_map = vocabulary_map(vocabulary, source, target, first_bytes(texts, CALIBRATION_BYTES))
    sources, targets = source.encode_batch(texts), target.encode_batch(texts)
    start = time.perf_counter()
    indices = [align_positions(a.byte_ends, b.byte_ends) for a, b in zip(sources, targets, strict=True)]
    seconds = time.perf_counter() - start
    opening = Opening(source, target, vocab_map) if vocabulary == "coarse" else None
    openings = [
        opening(a.labels, a.byte_ends, b.labels, b.byte_ends, index) if opening else []
        for a, b, index in zip(sources, targets, indices, strict=True)
    ]
    reports = [
        report_document(
            a.labels, b.labels, b.byte_ends, index, vocab_map,
            n_bytes=b.n_bytes, exact=a.exact and b.exact, doc_id=str(number), opening=first,
        )
        for number, (a, b, index, first) in enumerate(zip(sources, targets, indices, openings, strict=True))
    ]  # fmt: skip
    facts = summary(reports)
    facts |= {"positions_per_second": facts["positions"] / max(seconds, 1e-9)}
    return Comparison(facts, source, target, texts, sources, targets, indices, openings, vocab_map)


def write_alignment_page(found: Comparison, directory: Path) -> Path:
    """Writes `alignment.json`, `alignment.png` and `alignment.html` of a comparison; returns the page."""
    details = alignment_details(
        found.sources, found.targets, found.indices, found.openings, found.vocab_map, found.source, found.target
    )
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "alignment.json", found.facts | {"details": details})
    return build_alignment_report(
        directory,
        found.facts,
        details,
        texts=found.texts,
        source=str(found.source.directory.name),
        target=str(found.target.directory.name),
    )
