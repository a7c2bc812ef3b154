"""From a function on one matrix to a function on leaves and trees.

Paths are the dot-joined keys of a leaf. A leaf under `layers.` holds the layers stacked, [L, ...], and every
layer is a matrix of its own: one weight for a whole stack would be wrong (0.605 was measured where the layers'
own weights ran from 0.20 to 0.92). So the function is vmapped over L; a numpy leaf is taken layer by layer
instead, which needs the working memory of one matrix. `layers.<number>.` is an ordinary, unstacked path.

Statistics and arithmetic are float32 (float64 for float64 leaves), rounded once to the leaf's dtype at the end.
Leaves that are not floating point must be equal in all trees and are copied.
"""

import contextlib
import functools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from fusejax.errors import InputError
from fusejax.types import Array

__all__ = ["apply_to_leaf", "check_leaves", "check_trees", "is_stacked", "named_leaves"]

_SHOWN = 20


def is_stacked(path: str) -> bool:
    """Returns whether a leaf's first axis runs over layers."""
    return re.match(r"layers\.(?!\d+(\.|$))", path) is not None


def named_leaves(tree: Any) -> dict[str, Array]:
    """Returns the leaves of any pytree by their dot-joined path."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


def apply_to_leaf(
    functions: tuple[Callable[..., Array], ...], stacked: bool, base: Array | None, targets: Sequence[Array],
    values: Mapping[str, Any], per_matrix: Mapping[str, Array] | None = None,
) -> tuple[Array, ...]:  # fmt: skip
    """Calls functions `(base, targets [J, ...], **values, **per_matrix)` on a leaf, per layer where it is stacked.

    Args:
      functions: each returns an array per matrix; they share one compiled program.
      stacked: whether axis 0 of the leaf runs over layers.
      base: [...] or [L, ...], any float dtype; None if the functions take none.
      targets: J arrays like base. If everything is numpy the results are numpy.
      values: parameters; arrays are traced, everything else is part of the program. A jax array among them
        or among the leaves gives jax results.
      per_matrix: arrays of which a stacked leaf has one per layer, [L, ...].

    Returns:
      For each function its result, [...] or [L, ...], in float32 (float64 for float64 leaves).
    """
    static = tuple((name, value) for name, value in values.items() if not hasattr(value, "shape"))
    traced = {name: value for name, value in values.items() if hasattr(value, "shape")}
    leaves = (base, tuple(targets), dict(per_matrix or {}))
    if any(isinstance(array, jax.Array) for array in jax.tree.leaves((leaves, traced))):
        return _on_device(functions, static, stacked, *leaves, traced)
    wide = any(x.dtype == np.float64 for x in (*targets, *([] if base is None else [base])))
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        if not stacked:
            return tuple(np.asarray(x) for x in _on_device(functions, static, False, *leaves, traced))
        layers = [
            _on_device(functions, static, False, *jax.tree.map(operator.itemgetter(i), leaves), traced)
            for i in range(len(targets[0]))
        ]
        return tuple(np.stack([np.asarray(x) for x in results]) for results in zip(*layers, strict=True))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _on_device(functions, static, stacked, base, targets, per_matrix, traced):
    inputs = targets if base is None else (base, *targets)
    dtype = functools.reduce(jnp.promote_types, (leaf.dtype for leaf in inputs), jnp.float32)
    targets = jnp.stack([leaf.astype(dtype) for leaf in targets])
    base = None if base is None else base.astype(dtype)
    per_matrix, traced = jax.tree.map(lambda value: _as(value, dtype), (per_matrix, traced))

    def on_matrix(base, targets, per_matrix):
        return tuple(function(base, targets, **dict(static), **traced, **per_matrix) for function in functions)

    if stacked:
        on_matrix = jax.vmap(on_matrix, in_axes=(None if base is None else 0, 1, 0))
    return on_matrix(base, targets, per_matrix)


def _as(value: Array, dtype: Any) -> Array:
    return jnp.asarray(value, None if value.dtype == np.uint32 else dtype)  # keys stay what they are


def check_trees(base: Any, targets: Sequence[Any]) -> None:
    """Checks that trees can be merged: same paths, shapes and dtypes, finite values, no target twice.

    Args:
      base: pytree of arrays, or None.
      targets: pytrees of arrays.

    Raises:
      InputError: with all problems at once.
    """
    trees = {f"target {j}": named_leaves(tree) for j, tree in enumerate(targets)}
    if base is not None:
        trees = {"base": named_leaves(base)} | trees
    problems = []
    for i, tree in enumerate(targets):
        twins = [j for j in range(i) if targets[j] is tree and base is not tree]
        problems += [f"target {i} is the same object as target {j}" for j in twins[:1]]
    reference_name, reference = next(iter(trees.items()))
    if not reference:
        problems.append(f"{reference_name} has no leaves")
    for name, leaves in trees.items():
        problems += [f"{name} lacks {path}" for path in reference if path not in leaves]
        problems += [f"{name} has {path}, which {reference_name} lacks" for path in leaves if path not in reference]
    shared = [path for path in reference if all(path in leaves for leaves in trees.values())]
    for path in shared:
        problems += leaf_problems(path, {name: leaves[path] for name, leaves in trees.items()})
    _raise(problems)


def check_leaves(path: str, base: Array | None, targets: Sequence[Array], *, mixed: bool = False) -> None:
    """Checks one leaf of every tree as `check_trees` does, for callers that stream; `mixed` allows several dtypes."""
    leaves = {} if base is None else {"base": base}
    _raise(leaf_problems(path, leaves | {f"target {j}": leaf for j, leaf in enumerate(targets)}, mixed=mixed))


def leaf_problems(path: str, leaves: dict[str, Array], *, mixed: bool = False) -> list[str]:
    """Returns what is wrong with the leaves at one path, by the name of their tree."""
    (reference_name, reference), *_ = leaves.items()
    missing = [f"{path} of {name} is not an array but {type(leaf).__name__}" for name, leaf in leaves.items()
               if not isinstance(leaf, np.ndarray | jax.Array)]  # fmt: skip
    if missing:
        return missing
    problems = []
    for name, leaf in leaves.items():
        if leaf.shape != reference.shape:
            problems.append(f"{path} of {name} has shape {leaf.shape}, {reference_name} has {reference.shape}")
        elif leaf.dtype != reference.dtype and not (mixed and _floating(leaf) and _floating(reference)):
            problems.append(f"{path} of {name} is {leaf.dtype}, {reference_name} is {reference.dtype}")
        elif not isinstance(leaf, Tracer):  # values are not known while tracing
            problems += _value_problems(path, name, leaf, reference_name, reference)
    if reference.ndim == 0 and is_stacked(path):
        problems.append(f"{path} lies under `layers.` but has no layer axis")
    return problems


def _value_problems(path: str, name: str, leaf: Array, reference_name: str, reference: Array) -> list[str]:
    with jax.ensure_compile_time_eval():  # known arrays may meet traced ones
        if _floating(leaf):
            finite = jnp.isfinite(leaf) if isinstance(leaf, jax.Array) else np.isfinite(leaf)
            bad = leaf.size - int(finite.sum())
            return [f"{path} of {name} has {bad} values that are NaN or infinite"] if bad else []
        if isinstance(reference, Tracer) or bool((leaf == reference).all()):
            return []
        return [f"{path} is {leaf.dtype} and differs between {name} and {reference_name}"]


def _floating(leaf: Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def _raise(problems: list[str]) -> None:
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise InputError("the trees cannot be merged:\n  " + "\n  ".join(problems[:_SHOWN] + more))
