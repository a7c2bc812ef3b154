"""Alignment: distributions from one tokenizer's tokens and positions to another's, by bytes."""

from fusejax.alignment.calibration import count_symbols, join_symbols
from fusejax.alignment.conditioning import Conditioner
from fusejax.alignment.document import AlignedDocument, align_document
from fusejax.alignment.masked import align_masked, mask_target, pair_stops, stop_label, trained_source
from fusejax.alignment.opening import Opening
from fusejax.alignment.positions import align_positions
from fusejax.alignment.report import DocumentReport, add_up, report_document, summary
from fusejax.alignment.rivals import align_by_chunks, align_by_index
from fusejax.alignment.transport import transport
from fusejax.alignment.vocabulary import ByteVocabulary, coarse_map, event_groups, exact_map, padded_map

__all__ = [
    "AlignedDocument",
    "ByteVocabulary",
    "Conditioner",
    "DocumentReport",
    "Opening",
    "add_up",
    "align_by_chunks",
    "align_by_index",
    "align_document",
    "align_masked",
    "align_positions",
    "coarse_map",
    "count_symbols",
    "event_groups",
    "exact_map",
    "join_symbols",
    "mask_target",
    "padded_map",
    "pair_stops",
    "report_document",
    "stop_label",
    "summary",
    "trained_source",
    "transport",
]
