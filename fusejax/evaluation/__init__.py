"""Evaluation of models and ensembles in bits per byte, the measure that tokenizers do not change."""

from fusejax.evaluation.bits_per_byte import aggregate, bits_per_byte
from fusejax.evaluation.choice import choose, lowest, weights_from_bits_per_byte
from fusejax.evaluation.documents import DocumentScore, Evaluation, evaluate_documents
from fusejax.evaluation.ensemble import ensemble_document, ensemble_evaluations
from fusejax.evaluation.tables import by_domain
from fusejax.evaluation.uncertainty import document_quantiles, standard_errors

__all__ = [
    "DocumentScore",
    "Evaluation",
    "aggregate",
    "bits_per_byte",
    "by_domain",
    "choose",
    "document_quantiles",
    "ensemble_document",
    "ensemble_evaluations",
    "evaluate_documents",
    "lowest",
    "standard_errors",
    "weights_from_bits_per_byte",
]
