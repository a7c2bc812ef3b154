"""The merges of a run on a page: which target shaped which matrix."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fusejax.report.coefficients import coefficient_figures
from fusejax.report.page import pictures, table

__all__ = ["MergeFacts", "merges_html"]


class MergeFacts(NamedTuple):
    """One merge: what was merged how, and the coefficient of every target in every matrix where there are any."""

    method: str
    targets: Sequence[str]
    coefficients: Mapping[str, Sequence[float]]  # tensor -> one factor per target


def merges_html(merges: Mapping[str, MergeFacts], plots: Path) -> str:
    """Returns method and coefficients of every merge; `plots` is the directory of the figures."""
    parts = []
    for number, (name, merge) in enumerate(merges.items()):
        parts.append(
            f"<h3>{html.escape(name)}: {html.escape(merge.method)} of {html.escape(', '.join(merge.targets))}</h3>\n"
        )
        kept = {tensor: factors for tensor, factors in merge.coefficients.items() if len(factors) == len(merge.targets)}
        if not kept:
            parts.append("<p>The method has no coefficient per matrix.</p>\n")
            continue
        rows = [(target, _row([factors[j] for factors in kept.values()])) for j, target in enumerate(merge.targets)]
        parts.append(table(["target", "mean", "smallest", "largest"], rows, label=f"coefficients of {name}"))
        drawn = coefficient_figures(kept, merge.targets, plots / f"coefficients-{number}")
        parts.append(pictures([*drawn], wide=True) or "<p>It is the same in every matrix.</p>\n")
    return "".join(parts)


def _row(values: Sequence[float]) -> str:
    return "".join(f"<td>{value:.4f}</td>" for value in (sum(values) / len(values), min(values), max(values)))
