"""The merges of a run: one, as a mapping, or several, as a list.

One alone is called `merged` and is written out as a list of one, so that everything else, stored configurations too,
knows only lists. In a list, a merge without a name is called after its method.
"""

__all__ = ["MergeConfig", "default_name", "listed"]

from typing import Any

from pydantic import Field

from fusejax.config.base import NAME, Config

_METHOD = "sce"


class MergeConfig(Config):
    """One merge of fused targets."""

    name: str = Field(
        default="merged", pattern=NAME, description="Name of the merged model; in a list by default merged-METHOD."
    )
    method: str = Field(default=_METHOD, description="A method of `fusejax merge --help`.")
    targets: tuple[str, ...] = Field(default=(), description="Trained targets to merge; empty: all fusions.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters of the method.")


def default_name(method: str) -> str:
    """The name of a merge in a list that gives it none."""
    return f"merged-{method}"


def listed(value: Any) -> Any:
    """Returns what the configuration has under `merge` as a list of merges, each with a name.

    Raises:
      ValueError: neither a merge, nor a list, nor nothing.
    """
    if value is None:
        return []
    if isinstance(value, dict | MergeConfig):
        return [value]
    if not isinstance(value, list | tuple):
        raise ValueError("must be a merge, {method: ...}, or a list of them")
    return [_named(item) for item in value]


def _named(item: Any) -> Any:
    if isinstance(item, dict) and "name" not in item and isinstance(method := item.get("method", _METHOD), str):
        return {"name": default_name(method)} | item
    return item
