"""Embeddings of models whose vocabularies differ, brought to one order of rows before they are merged.

`merge_vocabularies` decides the tokens of the output and finds the row of each in every model; `align_rows` gathers
the rows. A token that a model lacks takes the default model's embedding (the base's), if that has it, else the
mean of those that have it; so a task vector there is 0, or what the owners say. Rows beyond the tokens of the
model whose vocabulary is taken (padding) are kept, as they are in that model.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import InputError
from fusejax.types import Array

__all__ = ["Vocabulary", "align_rows", "merge_vocabularies"]


class Vocabulary(NamedTuple):
    """The tokens of the output by id (None: padding), and the row of each in every model (-1: it has none)."""

    tokens: tuple[str | None, ...]
    rows: Mapping[str, np.ndarray]


def merge_vocabularies(
    vocabularies: Mapping[str, Mapping[str, int]], *, sizes: Mapping[str, int], reference: str, union: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Vocabulary:  # fmt: skip
    """Chooses the tokens of the output.

    Args:
      vocabularies: token -> id of every model.
      sizes: rows of every model's embeddings.
      reference: the model whose ids are kept.
      union: add the other models' tokens after the reference's, in the order of the models and of their ids.
      pad_to_multiple_of: at least this granularity of the number of rows; None keeps the reference's padding.

    Returns:
      Tokens and rows, of one length.

    Raises:
      InputError: an id beyond the rows of its model, or two tokens with one id in the reference.
    """
    for name, ids in vocabularies.items():
        if ids and max(ids.values()) >= sizes[name]:
            raise InputError(
                f"the tokenizer of {name} has the id {max(ids.values())}, but its embeddings have {sizes[name]} rows; "
                "use the tokenizer that belongs to the model."
            )
    ids = dict(vocabularies[reference])
    if len(set(ids.values())) < len(ids):
        raise InputError(f"the tokenizer of {reference} gives one id to two tokens.")
    if union:
        following = max(ids.values(), default=-1) + 1
        for others in vocabularies.values():
            for token in sorted(others, key=others.__getitem__):
                if token not in ids:
                    ids[token], following = following, following + 1
    size = max(ids.values(), default=-1) + 1
    if pad_to_multiple_of is None:
        size = max(size, sizes[reference])
    else:
        size = -(-size // pad_to_multiple_of) * pad_to_multiple_of
    tokens: list[str | None] = [None] * size
    for token, i in ids.items():
        tokens[i] = token
    rows = {name: np.array([own.get(t, -1) if t is not None else -1 for t in tokens], np.int32)
            for name, own in vocabularies.items()}  # fmt: skip
    padding = np.array([i for i, token in enumerate(tokens) if token is None and i < sizes[reference]], np.int64)
    rows[reference][padding] = padding
    return Vocabulary(tuple(tokens), rows)


def align_rows(
    matrices: Mapping[str, Array], rows: Mapping[str, np.ndarray], *, default: str | None = None
) -> dict[str, Array]:
    """Gathers the rows of every model's embeddings in the order of the output's tokens.

    Args:
      matrices: [V_m, ...] of every model, float.
      rows: [V] int32 of every model, as `merge_vocabularies` returns.
      default: the model whose row stands in for a missing one.

    Returns:
      [V, ...] of every model, in its own dtype; rows that no model has are 0.
    """
    xp = jnp if any(isinstance(matrix, jax.Array) for matrix in matrices.values()) else np
    trailing = (1,) * (next(iter(matrices.values())).ndim - 1)
    present = {name: (rows[name] >= 0).reshape(-1, *trailing) for name in matrices}
    gathered = {name: matrix[np.maximum(rows[name], 0)] for name, matrix in matrices.items()}
    missing = {name for name, mask in present.items() if not mask.all()}
    if not missing:
        return gathered
    wide = {name: x.astype(xp.promote_types(x.dtype, np.float32)) for name, x in gathered.items()}
    owners = np.maximum(sum(mask.astype(np.float32) for mask in present.values()), 1)
    stand_in = sum(xp.where(present[name], x, 0) for name, x in wide.items()) / owners
    if default is not None:
        stand_in = xp.where(present[default], wide[default], stand_in)
    return {
        name: xp.where(present[name], x, stand_in.astype(x.dtype)) if name in missing else x
        for name, x in gathered.items()
    }
