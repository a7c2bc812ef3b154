"""Bits per byte by domain."""

from collections.abc import Sequence

from fusejax.errors import InputError
from fusejax.evaluation.bits_per_byte import aggregate
from fusejax.evaluation.documents import Evaluation
from fusejax.evaluation.ensemble import EnsembleEvaluation

__all__ = ["by_domain"]


def by_domain(evaluation: Evaluation | EnsembleEvaluation, domains: Sequence[str]) -> dict[str, float]:
    """Returns the bits per byte of every domain, and their unweighted mean under "mean".

    Args:
      evaluation: scores of documents.
      domains: the domain of every text that was given to the evaluation, empty ones included.

    Raises:
      InputError: a domain is called "mean", is missing for a document, or nothing was scored.
    """
    if "mean" in domains:
        raise InputError('a domain may not be called "mean": that is the name of the mean over domains.')
    parts: dict[str, list[tuple[float, int]]] = {domain: [] for domain in domains}
    for document in evaluation.documents:
        if document.index >= len(domains):
            raise InputError(f"document {document.index} has no domain: got {len(domains)} domains.")
        parts[domains[document.index]].append((document.nll_nats, document.n_bytes))
    table = {domain: aggregate(found) for domain, found in parts.items() if found}
    if not table:
        raise InputError("no document was scored, so there is no bits per byte.")
    return table | {"mean": sum(table.values()) / len(table)}
