"""What the table of merge methods says about a method: its parameters, its inputs, its paper.

Parameters are checked against it before any work: a misspelt, unused or out-of-range one is an error.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fusejax.types import Array

__all__ = ["MergeMethod", "Parameter"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method: its default, what it may be, and what it means.

    A `str` has `choices`; `bool` and `int` are known by their default; anything else is a number in [low, high].
    With `per_target` it is one number per target (one number stands for all). With `traced` it is an array, also
    one of jax that is being differentiated; other parameters shape the program and are Python values.
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
    uses_base: bool = True  # a base that is given enters the result
    spread: tuple[str, str] | None = None  # (centre, width): centre - width and centre + width must be in [0, 1]
    random: bool = False  # the function takes `key`, made from the parameter `seed`, the path and the layer
