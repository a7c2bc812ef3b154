"""Dotted names of the leaves of a nested dict: `layers.attention.q.kernel` and back.

A parameter tree is a plain nested dict of arrays. Tables, checkpoints and messages name its leaves by
dotted paths; these two functions are the only place where the two forms meet.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["flatten_paths", "unflatten_paths"]


def flatten_paths(tree: Mapping[str, Any], *, prefix: str = "") -> dict[str, Any]:
    """Returns `{dotted path: leaf}` of a nested dict, in its order."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}.{name}" if prefix else name
        flat |= flatten_paths(value, prefix=path) if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten_paths(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the nested dict whose leaves have the given dotted paths."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
