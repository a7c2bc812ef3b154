"""The table of merge methods: one row per method, and the checks that the rows imply.

A method is one pure function on one matrix, `(base [...], targets [J, ...], *, parameters) -> merged [...]`,
in float32; it knows neither trees nor layers nor files. To add a method, write the function and its row here.
Parameters are checked against the row before any work: a misspelt, unused or out-of-range one is an error.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.core import Tracer

from fusejax.errors import InputError, nearest
from fusejax.merging.average import linear, linear_coefficients
from fusejax.merging.sce import SCE_VARIANTS, sce, sce_coefficients
from fusejax.merging.spherical import slerp
from fusejax.merging.task_vectors import task_arithmetic, ties
from fusejax.merging.varm import GRANULARITIES, varm, varm_coefficients, varm_energy, varm_unit
from fusejax.types import Array

__all__ = ["MERGE_METHODS", "MergeMethod", "Parameter", "resolve"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its default, what it may be, and what it means.

    A `str` has `choices`; a `bool` is known by its default; anything else is a number in [low, high]. With
    `per_target` it is one number per target (one number stands for all). With `traced` it is an array, also one of
    jax that is being differentiated; other parameters shape the program and are Python values.
    """

    description: str
    default: Any
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()
    per_target: bool = False
    traced: bool = False


@dataclass(frozen=True)
class MergeMethod:
    """One merge method: its function, what it needs, and where it is published."""

    function: Callable[..., Array]
    parameters: Mapping[str, Parameter]
    description: str
    paper: str
    needs_base: bool = True
    min_targets: int = 1
    max_targets: int | None = None
    coefficients: Callable[..., Array] | None = None  # same arguments -> [J], one factor per target
    # Methods that weigh units wider than a matrix: `unit(path, **choices)` names the leaf's unit and says whether
    # stacked layers are units of their own (None: the matrix); `energy` is summed over it, [J], and passed back.
    unit: Callable[..., tuple[str, bool] | None] | None = None
    energy: Callable[..., Array] | None = None
    nonzero_sum: tuple[str, str] | None = None  # (weights, switch): weights must not sum to 0 if the switch is on


_WEIGHTS = Parameter("weight of every target", 1.0, per_target=True, traced=True)
_SCALE = Parameter("factor of the merged task vector (lambda)", 1.0, traced=True)

MERGE_METHODS: Mapping[str, MergeMethod] = {
    "linear": MergeMethod(
        function=linear,
        coefficients=linear_coefficients,
        parameters={
            "weights": _WEIGHTS,
            "normalize": Parameter("divide by the sum of the weights", True),
        },
        description="weighted average of the targets",
        paper="https://arxiv.org/abs/2203.05482",
        needs_base=False,
        nonzero_sum=("weights", "normalize"),
    ),
    "sce": MergeMethod(
        function=sce,
        coefficients=sce_coefficients,
        parameters={
            "select_topk": Parameter("share of the varying elements that is selected", 1.0, low=0.0, high=1.0),
            "variant": Parameter("released code, equations, or mergekit's rule", "fuseai", choices=SCE_VARIANTS),
        },
        description="select by variance, weigh by squared change, erase the minority direction",
        paper="https://arxiv.org/abs/2408.07990",
    ),
    "varm": MergeMethod(
        function=varm,
        coefficients=varm_coefficients,
        unit=varm_unit,
        energy=varm_energy,
        parameters={"granularity": Parameter("unit that gets one weight", "matrix", choices=GRANULARITIES)},
        description="average weighted by squared change from the pivot",
        paper="https://arxiv.org/abs/2402.16107",
    ),
    "task_arithmetic": MergeMethod(
        function=task_arithmetic,
        parameters={
            "weights": _WEIGHTS,
            "normalize": Parameter("divide by the sum of the weights", False),
            "scale": _SCALE,
        },
        description="sum of task vectors",
        paper="https://arxiv.org/abs/2212.04089",
        nonzero_sum=("weights", "normalize"),
    ),
    "ties": MergeMethod(
        function=ties,
        parameters={
            "weights": _WEIGHTS,
            "density": Parameter("share of each task vector that is kept", 1.0, low=0.0, high=1.0, per_target=True),
            "normalize": Parameter("divide by the weights of the kept elements", True),
            "rescale": Parameter("keep the L1 norm of each trimmed task vector", False),
            "scale": _SCALE,
        },
        description="trimmed task vectors, merged where they agree with the elected sign",
        paper="https://arxiv.org/abs/2306.01708",
        nonzero_sum=("weights", "normalize"),
    ),
    "slerp": MergeMethod(
        function=slerp,
        parameters={"t": Parameter("0 is the start, 1 the end", 0.5, low=0.0, high=1.0, traced=True)},
        description="arc from the first target (or the base, if there is one target) to the last",
        paper="https://doi.org/10.1145/325334.325242",
        needs_base=False,
        max_targets=2,
    ),
}


def resolve(method: str, params: Mapping[str, Any], count: int, has_base: bool) -> tuple[MergeMethod, dict[str, Any]]:
    """Looks a method up and completes its parameters.

    Args:
      method: a name in `MERGE_METHODS`.
      params: parameters by name; defaults fill the rest.
      count: number of targets.
      has_base: whether base params are given.

    Returns:
      The method, and every parameter: traced ones as arrays, [count] if per target.

    Raises:
      InputError: unknown method or parameter (the nearest is named), a value of the wrong kind or out of
        range, weights that sum to 0, the wrong number of targets, or no base where one is needed.
    """
    if method not in MERGE_METHODS:
        known = ", ".join(sorted(MERGE_METHODS))
        raise InputError(f"unknown merge method {method!r}.{nearest(str(method), MERGE_METHODS)} Known: {known}.")
    spec = MERGE_METHODS[method]
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
            interval = f" in [{parameter.low:g}, {parameter.high:g}]" if math.isfinite(parameter.high) else ""
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
