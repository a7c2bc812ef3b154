"""Pairwise fusion in short: one fusion per source with the target, the pivot, in place of a list of them.

`fusions: pairwise` and `fusions: {pairwise: {method: min_ce, ...}, multi: true}` are written out here, so that
everything else, stored configurations too, knows only lists. A source is then added by one entry of `sources`.
"""

__all__ = ["PairwiseConfig", "written_out"]

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from fusejax.config.base import Config
from fusejax.errors import nearest

_SET = ("name", "sources", "include_target")  # by pairwise fusion itself


class PairwiseConfig(Config):
    """FuseChat's fusions: the pivot with each source, each of which trains one target."""

    pairwise: dict[str, Any] | None = Field(
        description="Options that all of them share: those of a fusion but name, sources and include_target."
    )
    multi: bool = Field(default=False, description="Also one fusion, `multi`, of the pivot with all sources at once.")


def written_out(value: Any, sources: Sequence[str]) -> Any:
    """Returns the fusions as a list where `value` is their short form, else `value`.

    Args:
      value: what the configuration has under `fusions`.
      sources: names of all sources.

    Raises:
      ValueError: an unknown key, or an option that pairwise fusion sets.
    """
    if isinstance(value, str) and value == "pairwise":
        value = {"pairwise": {}}
    if isinstance(value, str):
        raise ValueError("must be a list of fusions, `pairwise`, or {pairwise: {...}, multi: ...}")
    if not isinstance(value, dict):
        return value
    known = list(PairwiseConfig.model_fields)
    for key in value:
        if key not in known:
            raise ValueError(f"unknown key {key!r}.{nearest(str(key), known)} Known: {', '.join(known)}")
    options, multi = value.get("pairwise"), value.get("multi", False)
    if "pairwise" not in value or not isinstance(options, dict | None) or not isinstance(multi, bool):
        raise ValueError("must be a list of fusions, `pairwise`, or {pairwise: {option: value}, multi: true or false}")
    options = options or {}
    if taken := sorted(set(options) & set(_SET)):
        raise ValueError(f"pairwise fusion sets {', '.join(taken)} itself; leave it out, or list the fusions")
    fusions = [{"name": name, "sources": [name], "include_target": True} | options for name in sources]
    return fusions + [{"name": "multi", "include_target": True} | options] * multi
