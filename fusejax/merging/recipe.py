"""Merge recipes: a mapping read from YAML becomes a `Recipe`, checked as far as it can be without the models.

Two forms are read, told apart by how they name the method. Ours: `method`, `base`, `targets`, `parameters`.
mergekit's: `merge_method`, `base_model`, `models` or `slices`. Both may have `dtype`, `out_dtype`, `tokenizer`
(or `tokenizer_source`) and `seed`. Differences between them:

* A list under `parameters` runs over the targets in our form, if the parameter is one per target; in mergekit's it
  is always a gradient over the layers.
* Methods with a `variant` follow mergekit's rule in mergekit's form, and the published one in ours.

Parameters keep the names of either form (`weight` or `weights`, `lambda` or `scale`). A setting is one value, a
gradient, or an ordered list of `{filter: part of a tensor's name, value: setting}` of which the first match counts.
Unknown keys are refused; what mergekit's users set and a merge here does not need is ignored and noted.

Not done, and refused by name: `modules`, LoRA references, per-token settings, chat templates other than a copy.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fusejax.errors import InputError, nearest
from fusejax.merging.methods import MERGE_METHODS

__all__ = ["Recipe", "Slice", "Source", "parse_recipe"]

_OURS = ("method", "base", "targets")
_MERGEKIT = ("merge_method", "base_model", "models")
_COMMON = ("slices", "parameters", "dtype", "out_dtype", "tokenizer", "tokenizer_source", "seed", "name")
_REFUSED = {"modules": "merge each module's model alone", "chat_template": "only the base's template is copied"}
_DTYPES = ("float64", "float32", "bfloat16", "float16")
_RENAMED = {"weight": "weights", "lambda": "scale", "nuslerp_flatten": "flatten", "nuslerp_row_wise": "row_wise"}
_IGNORED = {"int8_mask": "masks take no memory here", "eps": "no constant is needed for stability"}
_METHODS = {"ramplus_tl": ("ram", {"variant": "ramplus_tl"})}  # methods that are a parameter here


class Source(NamedTuple):
    """One input model of a slice, with the settings that are its own."""

    model: str
    layers: tuple[int, int] | None  # first and one past the last; None: all
    parameters: Mapping[str, Any]


class Slice(NamedTuple):
    """Consecutive layers of the output, and what they are made of."""

    sources: tuple[Source, ...]
    parameters: Mapping[str, Any]


class Recipe(NamedTuple):
    """A checked recipe; the settings of its parameters are by the names of `MERGE_METHODS`."""

    method: str
    base: str | None
    slices: tuple[Slice, ...]
    parameters: Mapping[str, Any]
    dtype: str | None  # of the output; None: that of the inputs
    tokenizer: str | None  # "base", "union", "truncate", the name of a model, or None: vocabularies must agree
    pad_to_multiple_of: int | None
    notes: tuple[str, ...]


def parse_recipe(read: Any) -> Recipe:
    """Reads a recipe.

    Args:
      read: what YAML's safe_load gives: nested dicts and lists of plain values.

    Returns:
      The recipe, with names of models as written.

    Raises:
      InputError: an unknown or unsupported key, a value of the wrong kind, an unknown method.
    """
    if not isinstance(read, Mapping):
        raise InputError(f"a recipe is a mapping with the keys {', '.join(_OURS)}; got {type(read).__name__}.")
    if "method" in read and "merge_method" in read:
        raise InputError("the recipe has both `method` (our form) and `merge_method` (mergekit's); keep one.")
    mergekit = "merge_method" in read
    method_key, base_key, models_key = _MERGEKIT if mergekit else _OURS
    _check_keys(read, (method_key, base_key, models_key, *_COMMON), "the recipe")
    given = read.get(method_key)
    method, implied = _METHODS.get(given, (given, {})) if isinstance(given, str) else (given, {})
    if not isinstance(method, str) or method not in MERGE_METHODS:
        known = ", ".join(sorted(MERGE_METHODS))
        raise InputError(f"recipe: unknown {method_key} {given!r}.{nearest(str(given), MERGE_METHODS)} Known: {known}.")
    notes: list[str] = []
    shared = implied | _settings(read.get("parameters"), method, "parameters", notes)
    slices = _slices(read, models_key, method, notes)
    if not mergekit:
        shared, slices = _over_targets(method, shared, slices)
    variant = MERGE_METHODS[method].parameters.get("variant")
    if mergekit and variant and "mergekit" in variant.choices and "variant" not in shared:
        shared["variant"] = "mergekit"
        notes.append(f"{method}: mergekit's rule, as the recipe is in its form; `variant` chooses another")
    if "seed" in read:
        if not MERGE_METHODS[method].random:
            raise InputError(f"recipe: `seed` is given, but {method} draws nothing; remove it.")
        shared["seed"] = read["seed"]
    base = _model(read[base_key], base_key) if read.get(base_key) is not None else None
    tokenizer, multiple = _tokenizer(read)
    dtype = _dtype(read, "out_dtype") or _dtype(read, "dtype")
    return Recipe(method, base, slices, shared, dtype, tokenizer, multiple, tuple(dict.fromkeys(notes)))


def _check_keys(read: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in read:
        if key == "chat_template" and read[key] in (None, "auto"):
            continue
        if key in _REFUSED:
            raise InputError(f"{where}: `{key}` is not supported: {_REFUSED[key]}.")
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}.{nearest(str(key), known)} Known: {', '.join(known)}.")


def _settings(read: Any, method: str, where: str, notes: list[str]) -> dict[str, Any]:
    """Parameters under our names; the ignored ones are left out and noted."""
    if read is None:
        return {}
    if not isinstance(read, Mapping):
        raise InputError(f"recipe: `{where}` must be a mapping of parameters, got {read!r}.")
    known, settings = MERGE_METHODS[method].parameters, {}
    for key, value in read.items():
        name = key if key in known else _RENAMED.get(key, key)
        if name not in known and key in _IGNORED:
            notes.append(f"{key} is ignored: {_IGNORED[key]}")
            continue
        if name not in known:
            listed = ", ".join(known) or "none"
            raise InputError(
                f"recipe: {method} has no parameter {key!r}.{nearest(str(key), known)} Its parameters: {listed}."
            )
        _check_setting(value, f"{where}: {key}")
        settings[name] = value
    return settings


def _check_setting(value: Any, where: str) -> None:
    if isinstance(value, bool | int | float | str):
        return
    if isinstance(value, Sequence) and value and all(isinstance(entry, Mapping) for entry in value):
        for entry in value:
            _check_keys(entry, ("filter", "value"), f"recipe: {where}")
            if "value" not in entry or not isinstance(entry.get("filter", ""), str | None):
                raise InputError(f"recipe: {where}: an entry needs a `value` and may have a `filter`, got {entry!r}.")
            _check_setting(entry["value"], where)
        return
    if isinstance(value, Sequence) and value and all(_is_number(entry) or isinstance(entry, list) for entry in value):
        for entry in value:
            _check_setting(entry, where)
        return
    raise InputError(
        f"recipe: {where} must be a value, a list of numbers, or a list of filter and value; got {value!r}."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _slices(read: Mapping[str, Any], models_key: str, method: str, notes: list[str]) -> tuple[Slice, ...]:
    if ("slices" in read) == (models_key in read):
        raise InputError(f"recipe: give either `{models_key}` or `slices`.")
    if models_key in read:
        return (Slice(_sources(read[models_key], models_key, method, notes, sliced=False), {}),)
    pieces = []
    for piece in _list(read["slices"], "slices"):
        if not isinstance(piece, Mapping):
            raise InputError(f"recipe: every entry of `slices` is a mapping with `sources`, got {piece!r}.")
        _check_keys(piece, ("sources", "parameters"), "recipe: slices")
        settings = _settings(piece.get("parameters"), method, "slices: parameters", notes)
        pieces.append(Slice(_sources(piece.get("sources"), "sources", method, notes, sliced=True), settings))
    return tuple(pieces)


def _sources(read: Any, where: str, method: str, notes: list[str], *, sliced: bool) -> tuple[Source, ...]:
    sources = []
    for entry in _list(read, where):
        if isinstance(entry, str) and not sliced:
            sources.append(Source(_model(entry, where), None, {}))
            continue
        if not isinstance(entry, Mapping):
            raise InputError(f"recipe: an entry of `{where}` is a mapping with `model`, got {entry!r}.")
        _check_keys(entry, ("model", "parameters", *(["layer_range"] if sliced else [])), f"recipe: {where}")
        layers = _layer_range(entry.get("layer_range")) if sliced else None
        settings = _settings(entry.get("parameters"), method, f"{where}: parameters", notes)
        sources.append(Source(_model(entry.get("model"), where), layers, settings))
    names = [source.model for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"recipe: {', '.join(twice)} is given twice in `{where}`; give it once, with a weight.")
    return tuple(sources)


def _list(read: Any, where: str) -> list[Any]:
    if not isinstance(read, list) or not read:
        raise InputError(f"recipe: `{where}` must be a list with at least one entry, got {read!r}.")
    return read


def _model(name: Any, where: str) -> str:
    if not isinstance(name, str) or not name:
        raise InputError(f"recipe: `{where}` names a model by its directory or hub name, got {name!r}.")
    return name


def _layer_range(value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value) and 0 <= value[0] < value[1]:
        return value[0], value[1]
    raise InputError(f"recipe: layer_range must be [first, end] with 0 <= first < end, got {value!r}.")


def _over_targets(method: str, shared: dict[str, Any], slices: tuple[Slice, ...]) -> tuple[dict, tuple[Slice, ...]]:
    """Our form: moves lists over the targets from the shared parameters to the sources."""
    rows = {
        name: value
        for name, value in shared.items()
        if MERGE_METHODS[method].parameters[name].per_target
        and isinstance(value, list)
        and not isinstance(value[0], Mapping)
    }
    if not rows:
        return shared, slices
    spread = []
    for piece in slices:
        for name, value in rows.items():
            if len(value) != len(piece.sources):
                raise InputError(
                    f"recipe: {name} must have one value for each of the {len(piece.sources)} targets, got {value!r}."
                )
        sources = tuple(
            source._replace(parameters={name: value[j] for name, value in rows.items()} | dict(source.parameters))
            for j, source in enumerate(piece.sources)
        )
        spread.append(piece._replace(sources=sources))
    return {name: value for name, value in shared.items() if name not in rows}, tuple(spread)


def _tokenizer(read: Mapping[str, Any]) -> tuple[str | None, int | None]:
    if "tokenizer" in read and "tokenizer_source" in read:
        raise InputError("recipe: give either `tokenizer` or `tokenizer_source`.")
    value = read.get("tokenizer", read.get("tokenizer_source"))
    if value is None or isinstance(value, str):
        return value, None
    if not isinstance(value, Mapping):
        raise InputError(f"recipe: tokenizer must be base, union, truncate or the name of a model, got {value!r}.")
    _check_keys(value, ("source", "pad_to_multiple_of"), "recipe: tokenizer")
    multiple = value.get("pad_to_multiple_of")
    if multiple is not None and (type(multiple) is not int or multiple < 1):
        raise InputError(f"recipe: pad_to_multiple_of must be a whole number of at least 1, got {multiple!r}.")
    source = value.get("source", "base")
    return _model(source, "tokenizer: source"), multiple


def _dtype(read: Mapping[str, Any], key: str) -> str | None:
    value = read.get(key)
    if value is None or value in _DTYPES:
        return value
    raise InputError(f"recipe: {key} must be one of {', '.join(_DTYPES)}, got {value!r}.{nearest(str(value), _DTYPES)}")
