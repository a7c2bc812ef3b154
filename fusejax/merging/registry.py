"""Looking a merge method up, and checking its parameters against its row of the table.

Everything that can be said without the matrices is said here, before any work, in one error. Values that are being
traced or differentiated are checked for their shape only.
"""

import difflib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from fusejax.errors import InputError, nearest
from fusejax.merging.keys import key_data
from fusejax.merging.methods import MERGE_METHODS
from fusejax.merging.schema import MergeMethod, Parameter
from fusejax.types import Array

__all__ = ["MERGE_METHODS", "MergeMethod", "Parameter", "resolve"]


def resolve(method: str, params: Mapping[str, Any], count: int, has_base: bool) -> tuple[MergeMethod, dict[str, Any]]:
    """Looks a method up and completes its parameters.

    Args:
      method: a name in `MERGE_METHODS`.
      params: parameters by name; defaults fill the rest. A random method takes `key`, of jax.random, for `seed`.
      count: number of targets.
      has_base: whether base params are given.

    Returns:
      The method, and every parameter: traced ones as arrays, [count] if per target; the seed as `key`, its data.

    Raises:
      InputError: unknown method or parameter (the nearest is named), a value of the wrong kind or out of
        range, weights that sum to 0, the wrong number of targets, or no base where one is needed.
    """
    if method not in MERGE_METHODS:
        known = ", ".join(sorted(MERGE_METHODS))
        raise InputError(f"unknown merge method {method!r}.{nearest(str(method), MERGE_METHODS)} Known: {known}.")
    spec = MERGE_METHODS[method]
    params = dict(params)
    key = params.pop("key", None) if spec.random else None
    problems = [_unknown(method, name, spec) for name in params if name not in spec.parameters]
    problems += _count_problems(method, spec, count, has_base)
    if problems:
        raise InputError(" ".join(problems))
    values = {}
    for name, parameter in spec.parameters.items():
        given = params.get(name)
        values[name] = _value(f"{method}: {name}", parameter, parameter.default if given is None else given, count)
    if spec.nonzero_sum and values[spec.nonzero_sum[1]]:
        _check_sum(f"{method}: {spec.nonzero_sum[0]}", values[spec.nonzero_sum[0]])
    if spec.random:
        if key is not None and "seed" in params:
            raise InputError(f"{method} got both seed and key; give one of them.")
        seed = values.pop("seed")
        values["key"] = key_data(seed if key is None else key)
    if spec.spread:
        _check_spread(method, *spec.spread, *(values[name] for name in spec.spread))
    return spec, values


def _unknown(method: str, name: str, spec: MergeMethod) -> str:
    known = ", ".join(spec.parameters) or "none"
    # A singular or a plural is closer than any other name, whatever its length.
    close = difflib.get_close_matches(name, list(spec.parameters), n=1, cutoff=0.8)
    hint = f" Did you mean {close[0]!r}?" if close else nearest(name, spec.parameters)
    return f"{method} has no parameter {name!r}.{hint} Its parameters: {known}."


def _count_problems(method: str, spec: MergeMethod, count: int, has_base: bool) -> list[str]:
    problems = []
    if count < spec.min_targets or (spec.max_targets is not None and count > spec.max_targets):
        most = "more" if spec.max_targets is None else spec.max_targets
        problems.append(f"{method} takes {spec.min_targets} to {most} targets, got {count}.")
    if spec.needs_base and not has_base:
        problems.append(f"{method} needs base params (what the targets were trained from), got None.")
    return problems


def _value(label: str, parameter: Parameter, value: Any, count: int) -> Any:
    if parameter.choices:
        if value not in parameter.choices:
            hint = nearest(str(value), parameter.choices)
            raise InputError(f"{label} must be one of {', '.join(parameter.choices)}, got {value!r}.{hint}")
        return value
    if isinstance(parameter.default, bool):
        if not isinstance(value, bool | np.bool_):
            raise InputError(f"{label} must be true or false, got {value!r}.")
        return bool(value)
    array = _number(label, parameter, value, count)
    if parameter.traced:
        return array
    if isinstance(parameter.default, int):
        if array != np.floor(array):
            raise InputError(f"{label} must be a whole number, got {value!r}.")
        return int(array)
    return tuple(array.tolist()) if parameter.per_target else float(array)


def _number(label: str, parameter: Parameter, value: Any, count: int) -> Array:
    """Checks a number, or one per target; a traced value can be checked for its shape only."""
    if isinstance(value, jax.Array) and not parameter.traced:
        raise InputError(f"{label} shapes the program: give a Python number, not a jax array.")
    try:
        array = value if isinstance(value, jax.Array) else _host_array(value)
    except (TypeError, ValueError):
        raise InputError(f"{label} must be a number{' per target' * parameter.per_target}, got {value!r}.") from None
    if array.shape not in ((), (count,) if parameter.per_target else ()):
        wanted = f"one number for each of the {count} targets" if parameter.per_target else "one number"
        raise InputError(f"{label} must be {wanted}, got an array of shape {tuple(array.shape)}.")
    if not isinstance(array, Tracer):
        host = np.asarray(array, np.float64)
        if not (np.isfinite(host).all() and (host >= parameter.low).all() and (host <= parameter.high).all()):
            bounded = f" in [{parameter.low:g}, {parameter.high:g}]" if math.isfinite(parameter.high) else ""
            interval = bounded or (f" and at least {parameter.low:g}" if math.isfinite(parameter.low) else "")
            raise InputError(f"{label} must be finite{interval}, got {host.tolist()}.")
    return array * np.ones(count) if parameter.per_target and not array.shape else array


def _host_array(value: Any) -> np.ndarray:
    if isinstance(value, bool | str):
        raise TypeError
    return np.asarray(value, np.float64)


def _check_sum(label: str, weights: Array) -> None:
    if isinstance(weights, Tracer):
        return
    host = np.asarray(weights, np.float64)
    if abs(host.sum()) <= 1e-12 * np.abs(host).sum():
        raise InputError(f"{label} sum to {host.sum():g}, so they cannot be normalised: got {host.tolist()}.")


def _check_spread(method: str, centre: str, width: str, centres: Array, widths: Array) -> None:
    if isinstance(centres, Tracer) or isinstance(widths, Tracer):
        return
    low, high = np.asarray(centres) - np.asarray(widths), np.asarray(centres) + np.asarray(widths)
    if (low < -1e-12).any() or (high > 1 + 1e-12).any():
        raise InputError(
            f"{method}: {centre} - {width} and {centre} + {width} must be in [0, 1], "
            f"got {low.tolist()} and {high.tolist()}; lower {width} or move {centre} away from the limit."
        )
