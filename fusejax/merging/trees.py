"""Merging whole trees, and one leaf at a time for callers that stream checkpoints."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import InputError
from fusejax.merging.keys import matrix_keys
from fusejax.merging.matrices import apply_to_leaf, check_leaves, check_trees, is_stacked, named_leaves
from fusejax.merging.registry import MergeMethod, resolve
from fusejax.types import Array

__all__ = ["merge_leaf", "merge_trees"]


def merge_trees(base: Any, targets: Sequence[Any], *, method: str, coefficients: bool = False, **params: Any) -> Any:
    """Merges pytrees of parameters into one of the same structure, shapes and dtypes.

    Usable under `jit`, on sharded arrays, and differentiable in the trees and in numeric per-target parameters
    wherever the method is; checks of values (NaN, ranges) are then left out, as values are not known.

    Args:
      base: pytree of arrays the targets were trained from, or None for methods that need none. Leaves under
        `layers.` are stacked, [L, ...], and merged per layer.
      targets: J pytrees like base. Numpy leaves give numpy leaves.
      method: a name in `MERGE_METHODS`.
      coefficients: also return the coefficient of every target in every matrix.
      **params: the method's parameters; random methods also take `key`, of jax.random, instead of `seed`.

    Returns:
      The merged pytree; with `coefficients`, also a dict from path to [J] float32, or [L, J] where stacked.

    Raises:
      InputError: unknown method or parameter, a value out of range, trees that do not match, a NaN.
    """
    targets = _target_list(targets)
    spec, values = resolve(method, params, len(targets), base is not None)
    _check_coefficients(method, spec, coefficients)
    check_trees(base, targets)
    base_leaves = None if base is None else named_leaves(base)
    target_leaves = [named_leaves(tree) for tree in targets]
    reference = target_leaves[0] if base_leaves is None else base_leaves
    leaves = {
        path: (None if base_leaves is None else base_leaves[path], [tree[path] for tree in target_leaves])
        for path in reference
    }
    energies = _unit_energies(leaves, spec, values)
    merged, factors = {}, {}
    for path, (origin, changed) in leaves.items():
        merged[path], factor = _merge(path, origin, changed, spec, values, coefficients, energies.get(path))
        if factor is not None:
            factors[path] = factor
    tree = jax.tree.unflatten(jax.tree.structure(targets[0] if base is None else base), merged.values())
    return (tree, factors) if coefficients else tree


def merge_leaf(
    path: str, base: Array | None, targets: Sequence[Array], *, method: str, params: Mapping[str, Any],
    coefficients: bool = False, dtype: Any = None,
) -> Any:  # fmt: skip
    """Merges one leaf of every tree, so that a checkpoint can be streamed leaf by leaf.

    Args:
      path: the leaf's dot-joined path; under `layers.` axis 0 runs over layers.
      base: [...] the base's leaf, or None for methods that need none.
      targets: J arrays of the base's shape and dtype.
      method: a name in `MERGE_METHODS`.
      params: the method's parameters.
      coefficients: also return the coefficients.
      dtype: of the result; the inputs may then be of several floating dtypes. None: that of the inputs.

    Returns:
      The merged leaf; with `coefficients`, also [J] or [L, J] float32 (None for a
      leaf that is not floating point).

    Raises:
      InputError: as `merge_trees`, naming the path.
    """
    spec, values = resolve(method, params, len(targets), base is not None)
    _check_coefficients(method, spec, coefficients)
    check_leaves(path, base, targets, mixed=dtype is not None)
    if spec.unit and spec.unit(path, **values):
        raise InputError(f"{method} with {dict(params)} weighs units wider than one matrix; use merge_trees.")
    result = _merge(path, base, targets, spec, values, coefficients, dtype=dtype)
    return result if coefficients else result[0]


def _merge(
    path: str, base: Array | None, targets: Sequence[Array], spec: MergeMethod, values: dict[str, Any],
    coefficients: bool, energy: Array | None = None, dtype: Any = None,
) -> tuple[Array, Array | None]:  # fmt: skip
    """Merges one checked leaf; the coefficients are None unless asked for."""
    first = targets[0]
    if not jnp.issubdtype(first.dtype, jnp.floating):
        return first, None
    functions = (spec.function,) + ((spec.coefficients,) if coefficients and spec.coefficients else ())
    per_matrix = {} if energy is None else {"energy": energy}
    if spec.random:
        layers = len(first) if is_stacked(path) else None
        per_matrix["key"] = matrix_keys(values["key"], path, layers)
        values = {name: value for name, value in values.items() if name != "key"}
    merged, *factors = apply_to_leaf(functions, is_stacked(path), base, targets, values, per_matrix)
    dtype = first.dtype if dtype is None else jnp.dtype(dtype)
    _check_overflow(path, merged, dtype)
    return merged.astype(dtype), factors[0] if factors else None


def _unit_energies(
    leaves: Mapping[str, tuple[Array | None, list[Array]]], spec: MergeMethod, values: dict[str, Any]
) -> dict[str, Array]:
    """Sums the energy of units wider than a matrix; returns it for every leaf of one, [J] or [L, J]."""
    units: dict[str, tuple[str, bool]] = {}
    sums: dict[str, Array] = {}
    if spec.unit is None or spec.energy is None:
        return {}
    for path, (base, targets) in leaves.items():
        unit = spec.unit(path, **values)
        if unit is None or not jnp.issubdtype(targets[0].dtype, jnp.floating):
            continue
        (energy,) = apply_to_leaf((spec.energy,), is_stacked(path), base, targets, values)
        name, by_layer = units[path] = unit
        if is_stacked(path) and not by_layer:
            energy = energy.sum(axis=0)
        sums[name] = sums[name] + energy if name in sums else energy
    shared = {path: sums[name] for path, (name, _) in units.items()}
    for path, energy in shared.items():
        if is_stacked(path) and energy.ndim == 1:  # one weight for all layers
            layers = leaves[path][1][0].shape[0]
            shared[path] = (jnp if isinstance(energy, jax.Array) else np).broadcast_to(energy, (layers, *energy.shape))
    return shared


def _target_list(targets: Any) -> list[Any]:
    if not isinstance(targets, Sequence) or isinstance(targets, str | bytes):
        raise InputError(f"targets must be a list of trees, got {type(targets).__name__}.")
    if not targets:
        raise InputError("targets is empty: give at least one tree.")
    return list(targets)


def _check_coefficients(method: str, spec: MergeMethod, wanted: bool) -> None:
    if wanted and spec.coefficients is None:
        raise InputError(f"{method} has no coefficients per matrix; call it with coefficients=False.")


def _check_overflow(path: str, merged: Array, dtype: Any) -> None:
    """Extrapolation may leave the range of a narrow dtype; an infinity must not be written silently."""
    if isinstance(merged, np.ndarray) and merged.size:
        largest = float(np.abs(merged).max())
        if not largest <= float(jnp.finfo(dtype).max):
            raise InputError(f"merging {path} gives values up to {largest:g}, beyond the range of {dtype}.")
