"""What a merge will do, tensor by tensor: the value that joins recipes to whatever reads and writes files.

`recipe.parse_recipe` turns a YAML mapping into a `Recipe`; `planner.plan_merge` turns a recipe and the facts of its
input models into a `MergePlan`, or refuses it with all problems at once. A plan holds no arrays but row numbers.
To carry it out, for each of `plan.tensors` in any order:

    base, targets = (read each ref), rows of a `vocabulary` tensor through `vocabulary.align_rows(...)` if plan.rows
    merge_leaf(step.output, base, targets, method=step.method, params=step.parameters, dtype=step.dtype)

Models are named as the recipe names them; tensors by their names in the model's files (`model.layers.3...`). What
is not said here (configuration, tokenizer files, generation settings) is copied from the model `plan.template`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["MergePlan", "ModelFacts", "TensorMerge", "TensorRef", "TensorSpec"]


class TensorSpec(NamedTuple):
    """Shape and dtype name (as numpy or ml_dtypes spell it: "float32", "bfloat16") of a stored tensor."""

    shape: tuple[int, ...]
    dtype: str


class ModelFacts(NamedTuple):
    """What planning needs to know of one input model, all of it in file headers."""

    tensors: Mapping[str, TensorSpec]
    tokens: Mapping[str, int] | None = None  # token -> id of its tokenizer; None: it has none


class TensorRef(NamedTuple):
    """One tensor of one input model."""

    model: str
    name: str


class TensorMerge(NamedTuple):
    """How one output tensor is made; `parameters` are the values for this tensor, ready for `merge_leaf`."""

    output: str
    method: str
    base: TensorRef | None  # None: the method takes none
    targets: tuple[TensorRef, ...]
    parameters: Mapping[str, Any]  # by the names of MERGE_METHODS; per-target ones are tuples; holds the seed
    dtype: str  # of the output; the arithmetic is float32 or wider, whatever this is
    vocabulary: bool = False  # axis 0 runs over tokens


class MergePlan(NamedTuple):
    """A whole merge. `rows[model][i]` is the row of the model's embeddings that holds output token i, or -1."""

    tensors: tuple[TensorMerge, ...]
    models: tuple[str, ...]  # every input model once; the base first where there is one
    template: str  # the model whose configuration, tokenizer and settings are copied
    num_layers: int | None  # layers of the output if slices change it; None: as the template has
    rows: Mapping[str, np.ndarray]  # empty: embeddings are merged as they are
    tokens: tuple[str | None, ...]  # of the output by id if `rows`; None: a padding row; else empty
    default_model: str | None  # whose embedding stands in for a missing token, if it has it; else the owners' mean
    notes: tuple[str, ...]  # what was decided or ignored, for --explain and the model card
