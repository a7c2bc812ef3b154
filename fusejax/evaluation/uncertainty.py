"""How much bits per byte vary: between documents, and between samples of documents.

Bits per byte of a domain are a ratio of two sums over documents, so their standard error is found by drawing documents
with replacement. Pieces of one document are drawn together, for they are not independent. All models see the same
draws; they rise and fall together on hard and easy text, so the error of a *difference* between two models is smaller
than their errors suggest.

Not here: the spread between trainings with other seeds, which needs other trainings.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusejax.evaluation.bits_per_byte import bits_per_byte
from fusejax.types import Array

__all__ = ["document_quantiles", "standard_errors"]

_SHARES = {"p10": 0.1, "median": 0.5, "p90": 0.9}
_AT_ONCE = 1 << 22  # counts of draws in memory


def document_quantiles(evaluation: Any) -> dict[str, float]:
    """Returns the number of documents and the quantiles of their bits per byte: p10, median, p90."""
    values = [bits_per_byte(document.nll_nats, document.n_bytes) for document in evaluation.documents]
    found = {name: float(np.quantile(values, share)) for name, share in _SHARES.items()} if values else {}
    return {"count": len(values)} | found


def standard_errors(
    evaluations: Mapping[str, Any], domains: Sequence[str], origins: Sequence[str], *, draws: int = 1000, seed: int = 0
) -> dict[str, dict[str, float]]:
    """Returns the bootstrap standard error of every model's bits per byte, per domain and of their mean.

    Args:
      evaluations: model -> scores of documents.
      domains: the domain of every text that was scored, as in `by_domain`.
      origins: what every text is a piece of; equal ones are drawn together.
      draws: samples of documents.
      seed: of the draws.

    Returns:
      Model -> domain (and "mean") -> bits per byte. A domain of fewer than two origins has no error, and then the
      mean has none.
    """
    rng, names = np.random.default_rng(seed), list(evaluations)
    found: dict[str, Array] = {}
    for domain in dict.fromkeys(domains):
        members = {origin for origin, its in zip(origins, domains, strict=True) if its == domain}
        nats, sizes = _sums([evaluations[name] for name in names], domain, domains, origins, sorted(members))
        keep = sizes.any(axis=1)
        nats, sizes = nats[keep], sizes[keep]
        if keep.any():
            found[domain] = _ratios(nats, sizes, draws, rng) if len(nats) > 1 else np.full((draws, len(names)), np.nan)
    table: dict[str, dict[str, float]] = {name: {} for name in names}
    rows = found | ({"mean": np.mean(list(found.values()), axis=0)} if found else {})
    for domain, ratios in rows.items():
        for name, values in zip(names, ratios.T, strict=True):
            if np.isfinite(values).all():
                table[name][domain] = float(np.std(values, ddof=1))
    return table


def _sums(
    evaluations: Sequence[Any], domain: str, domains: Sequence[str], origins: Sequence[str], members: Sequence[str]
) -> tuple[Array, Array]:
    """Nats and bytes of every origin of a domain by every model, [G, M]."""
    place = {origin: number for number, origin in enumerate(members)}
    nats, sizes = np.zeros((2, len(members), len(evaluations)))
    for column, evaluation in enumerate(evaluations):
        for document in evaluation.documents:
            if domains[document.index] == domain:
                row = place[str(origins[document.index])]
                nats[row, column] += document.nll_nats
                sizes[row, column] += document.n_bytes
    return nats, sizes


def _ratios(nats: Array, sizes: Array, draws: int, rng: np.random.Generator) -> Array:
    """Bits per byte of `draws` samples of G origins, [draws, M]; not a number where a sample has no bytes."""
    count = len(nats)
    rows = max(1, _AT_ONCE // count)
    parts = []
    for start in range(0, draws, rows):
        weights = rng.multinomial(count, np.full(count, 1 / count), size=min(rows, draws - start)).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            parts.append((weights @ nats) / (weights @ sizes) / np.log(2))
    return np.concatenate(parts)
