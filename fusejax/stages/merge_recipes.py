"""What `fusejax merge` was asked for, as recipes: from flags, from a file of one or several stages, from a merge.

Several stages are several YAML documents in one file; all but the last have a `name`, by which later ones refer to
their results. A merge that keeps what its weights were (`linear`, `task_arithmetic`) takes one more target without
its other inputs: `extended` writes the recipe that has the old merge as one input. The old merge was rounded once, so
the result is within one rounding of the merge of all.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from fusejax.errors import InputError
from fusejax.stages.merge_files import RECORD

__all__ = ["extended", "flags_to_parameters", "read_recipes"]

_NUMBER = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_SETTINGS = ("parameters", "models", "slices")


def read_recipes(path: Path) -> list[dict[str, Any]]:
    """Reads a recipe file.

    Returns:
        Its documents; all but the last have a `name`.

    Raises:
        InputError: no file, broken YAML, a stage without a name or with one that is taken.
    """
    if not path.is_file():
        raise InputError(f"no recipe at {path}")
    try:
        documents = [read for read in yaml.safe_load_all(path.read_text(encoding="utf-8")) if read is not None]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no valid YAML: {error}") from error
    if not documents or not all(isinstance(read, dict) for read in documents):
        raise InputError(f"{path} holds no mapping; expected a recipe with method, base and targets")
    names = [read.get("name") for read in documents[:-1]]
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
            raise InputError(f"{path}: stage {number} of {len(documents)} needs a `name` that later stages refer to")
        if names.count(name) > 1:
            raise InputError(f"{path}: two stages are named {name!r}")
    return [{key: _numeric(value) if key in _SETTINGS else value for key, value in read.items()} for read in documents]


def _numeric(value: Any) -> Any:
    """Reads numbers such as 1e-5, which YAML 1.1 takes for text, wherever they stand in settings."""
    if isinstance(value, dict):
        return {key: inner if key in ("model", "filter") else _numeric(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numeric(inner) for inner in value]
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value


def flags_to_parameters(words: list[str]) -> dict[str, Any]:
    """`--select-topk 0.5 --weights 1 2` -> {"select_topk": 0.5, "weights": [1, 2]}."""
    found: dict[str, list[Any]] = {}
    current: str | None = None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            current = name.replace("-", "_")
            found[current] = [_value(value, current)] if value else []
        elif current is None:
            raise InputError(f"do not know what {word!r} belongs to; parameters are given as --name value")
        else:
            found[current].append(_value(word, current))
    if empty := [name for name, values in found.items() if not values]:
        raise InputError(f"the parameters {empty} have no value")
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def _value(word: str, name: str) -> Any:
    try:
        return _numeric(yaml.safe_load(word))
    except yaml.YAMLError as error:
        raise InputError(f"--{name.replace('_', '-')}: {word!r} is neither a number nor a word") from error


def extended(merge: Path, targets: Sequence[str], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the recipe that adds targets to a finished merge.

    Args:
        merge: a directory that `fusejax merge` wrote.
        targets: models to add.
        parameters: `weights` of the added targets.

    Raises:
        InputError: not such a directory, or a method whose result depends on all targets at once.
    """
    path = merge / RECORD
    if not path.is_file():
        raise InputError(f"{merge} has no {RECORD}; --into takes a directory that fusejax merge wrote")
    old = json.loads(path.read_text(encoding="utf-8"))["recipe"]
    method, given = old.get("method"), dict(old.get("parameters") or {})
    if method not in ("linear", "task_arithmetic"):
        raise InputError(
            f"{merge} was merged by {method or old.get('merge_method')}, whose weights depend on all targets at once; "
            "only linear and task_arithmetic merges take one more target. Merge all of them again"
        )
    if extra := set(parameters) - {"weights"}:
        raise InputError(f"--into keeps the settings of the merge; it takes --weights only, got {sorted(extra)}")
    weights = _numbers(given.get("weights", 1.0), len(old["targets"]))
    added = _numbers(parameters.get("weights", 1.0), len(targets))
    if weights is None or added is None or not isinstance(given.get("scale", 1.0), int | float):
        raise InputError("weights that differ between tensors cannot be added to; merge all targets again")
    normalize = given.get("normalize", method == "linear")
    if method == "linear":
        total = sum(weights) if normalize else 1.0  # not normalised: the sum is already in the merge
        given["weights"] = [total, *added]
        return old | {"targets": [str(merge), *targets], "parameters": given}
    if normalize:
        raise InputError("a task_arithmetic merge with `normalize` cannot be added to; merge all targets again")
    given["weights"] = [1 / given.get("scale", 1.0), *added]
    return old | {"targets": [str(merge), *targets], "parameters": given}


def _numbers(value: Any, count: int) -> list[float] | None:
    values = value if isinstance(value, list) else [value] * count
    fine = len(values) == count and all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return [float(v) for v in values] if fine else None
