"""What an alignment did: counts and shares that need no model, and the mass kept where there is one.

Numbers per document are a NamedTuple of sums, so documents, shards and processes add up; shares are formed once,
in `summary`. The *symbol agreement* is the share of aligned positions at which the true next tokens of both
sides have the same symbol: what is left to 1 is supervision that contradicts the text, whatever the source.

Not done here: pictures and tables (`fusejax.report`).
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusejax.errors import InputError
from fusejax.types import Array, VocabMap

__all__ = [
    "ALIGNED",
    "CONDITIONED",
    "DROPPED",
    "DocumentReport",
    "Span",
    "add_up",
    "report_document",
    "summary",
    "true_symbols",
]

DROPPED, ALIGNED, CONDITIONED = 0, 1, 2
WORST_PER_DOCUMENT = 3


class Span(NamedTuple):
    """A stretch of text without agreeing supervision."""

    doc_id: str
    start: int  # byte
    stop: int  # byte
    positions: int  # target positions in it


class DocumentReport(NamedTuple):
    """Sums over the target positions of one document, or of several that were added up."""

    documents: int
    inexact: int  # documents whose byte ends came from offsets
    n_bytes: int
    positions: int
    aligned: int
    conditioned: int
    dropped: int
    agreed: int  # aligned positions whose true next tokens have the same symbol
    full_resolution: int  # agreed positions whose target token is the symbol itself
    mass_kept: float  # sum over aligned positions of (mass with a symbol / mass stored); NaN without distributions
    worst: tuple[Span, ...]


def report_document(
    source_labels: Array,
    target_labels: Array,
    target_ends: Array,
    source_index: Array,
    vocab_map: VocabMap,
    *,
    status: Array | None = None,
    kept: Array | None = None,
    n_bytes: int | None = None,
    exact: bool = True,
    doc_id: str = "",
    opening: Sequence[tuple[int, Array]] = (),
) -> DocumentReport:
    """Counts what the alignment of one document did.

    Args:
      source_labels: [T_s] int, true next source tokens.
      target_labels: [T] int, true next target tokens.
      target_ends: [T] int, byte ends of the target positions.
      source_index: [T] int32, the aligned source positions (-1: none).
      vocab_map: the symbols of both vocabularies.
      status: [T] int8, what became of each position (0 dropped, 1 aligned, 2 conditioned); None: `source_index`.
      kept: [T] share of the stored mass that has a symbol; None: no distributions were moved.
      n_bytes: length of the document; None: the last byte end.
      exact: whether both sides' byte ends are sums of token bytes.
      doc_id: named in the worst spans.
      opening: positions and the symbols [V_s] of source tokens there (`fusejax.alignment.opening`).

    Returns:
      The sums.
    """
    paired = np.asarray(source_index) >= 0
    status = np.where(paired, ALIGNED, DROPPED) if status is None else np.asarray(status)
    ends = np.asarray(target_ends, np.int64)
    size = int(ends[-1]) if n_bytes is None and ends.size else int(n_bytes or 0)
    own = np.asarray(vocab_map.symbol_of_target)[np.asarray(target_labels)]
    agreed = (true_symbols(source_labels, source_index, vocab_map, opening=opening) == own) & (own >= 0)
    aligned = status == ALIGNED
    return DocumentReport(
        documents=1,
        inexact=int(not exact),
        n_bytes=size,
        positions=ends.size,
        aligned=int(aligned.sum()),
        conditioned=int((status == CONDITIONED).sum()),
        dropped=int((status == DROPPED).sum()),
        agreed=int((agreed & aligned).sum()),
        full_resolution=int((agreed & aligned & (own == np.asarray(target_labels))).sum()),
        mass_kept=float("nan") if kept is None else float(np.asarray(kept, np.float64)[aligned].sum()),
        worst=_worst_spans(~(agreed & aligned), ends, size, doc_id),
    )


def true_symbols(
    source_labels: Array, source_index: Array, vocab_map: VocabMap, *, opening: Sequence[tuple[int, Array]] = ()
) -> Array:
    """Returns the symbol [T] int32 of the source's true next token at each target position; -1: none."""
    index = np.asarray(source_index)
    symbols = np.full(index.size, -1, np.int32)
    paired = index >= 0
    symbols[paired] = np.asarray(vocab_map.symbol_of_source)[np.asarray(source_labels)[index[paired]]]
    for row, table in opening:
        symbols[row] = table[source_labels[index[row]]]
    return symbols


def add_up(reports: Iterable[DocumentReport], *, worst: int = 10) -> DocumentReport:
    """Returns the sums of several reports, with the `worst` longest spans among theirs.

    Raises:
      InputError: there is none.
    """
    rows = list(reports)
    if not rows:
        raise InputError("no document was aligned, so there is nothing to report; is the data file empty?")
    sums = {name: sum(getattr(row, name) for row in rows) for name in DocumentReport._fields[:-1]}
    spans = sorted((span for row in rows for span in row.worst), key=lambda span: span.start - span.stop)[:worst]
    return DocumentReport(**sums, worst=tuple(spans))


def summary(reports: Iterable[DocumentReport], *, worst: int = 10) -> dict[str, Any]:
    """Adds up documents and forms the shares.

    Args:
      reports: one per document, or sums of several.
      worst: number of worst spans to keep.

    Returns:
      JSON values: the sums of `DocumentReport`, and `aligned_share`, `symbol_agreement`,
      `full_resolution_share`, `mass_kept` (means over aligned positions; None where undefined), `worst_spans`.
    """
    sums = add_up(reports, worst=worst)._asdict()
    mass, spans, aligned = sums.pop("mass_kept"), sums.pop("worst"), sums["aligned"]
    return sums | {
        "aligned_share": aligned / sums["positions"] if sums["positions"] else None,
        "symbol_agreement": sums["agreed"] / aligned if aligned else None,
        "full_resolution_share": sums["full_resolution"] / aligned if aligned else None,
        "mass_kept": mass / aligned if aligned and np.isfinite(mass) else None,
        "worst_spans": [span._asdict() for span in spans],
    }


def _worst_spans(bad: Array, ends: Array, n_bytes: int, doc_id: str) -> tuple[Span, ...]:
    """The longest runs of bad positions, in bytes from where the run reads to where the next good one does."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], bad.astype(np.int8), [0]])))
    starts, stops = edges[::2], edges[1::2]
    closing = np.concatenate([ends, [n_bytes]])
    lengths = closing[stops] - ends[starts]
    order = np.argsort(-lengths, kind="stable")[:WORST_PER_DOCUMENT]
    return tuple(Span(doc_id, int(ends[starts[i]]), int(closing[stops[i]]), int(stops[i] - starts[i])) for i in order)
