"""From a recipe and the headers of its models to a `MergePlan`, or to one error that names every problem.

Parameters of a tensor: its source's settings, then the slice's, then the shared ones, then the method's default; a
list of filters without a match falls through to the next. A gradient is interpolated at t = i / (n - 1) for layer i
of the slice's n layers (1 if n = 1); tensors outside layers take t = 0, its first entry, also the head. They come
from the first slice if they are embeddings and from the last if not, as mergekit has it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fusejax.errors import InputError
from fusejax.merging.methods import MERGE_METHODS
from fusejax.merging.places import Place, extra_tensors, find_places, is_embedding, is_vocabulary, layer_count
from fusejax.merging.plan import MergePlan, ModelFacts, TensorMerge, TensorRef, TensorSpec
from fusejax.merging.recipe import Recipe, Slice, Source
from fusejax.merging.registry import resolve
from fusejax.merging.vocabulary import Vocabulary, merge_vocabularies

__all__ = ["plan_merge"]

_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")
_FLOATS = ("float16", "bfloat16", "float32", "float64")
_SHOWN = 20


def plan_merge(recipe: Recipe, models: Mapping[str, ModelFacts]) -> MergePlan:
    """Decides what is done for every output tensor.

    Args:
      recipe: a parsed recipe.
      models: what the headers of every model named in it say.

    Returns:
      The plan, its tensors in the order of the output's layers.

    Raises:
      InputError: with all problems at once: missing or extra tensors, shapes or vocabularies that differ, layers
        that do not exist, parameters out of range or unused.
    """
    names = _models(recipe)
    if absent := [name for name in names if name not in models]:
        raise InputError(f"the recipe names {', '.join(absent)}, which was not opened.")
    problems, notes = _base_problems(recipe), list(recipe.notes)
    pieces, used = _pieces(recipe, problems), {name: _tensors(models[name], notes, name) for name in names}
    _raise(problems)
    places = find_places(pieces, used, problems)
    problems += [problem for piece in pieces for problem in extra_tensors(piece, used)]
    _raise(problems)
    vocabulary = _vocabulary(recipe, models, used, names, problems)
    tensors, checked = [], set()
    for place in places:
        step, wrong = _step(recipe, place, used, vocabulary, checked)
        problems += wrong
        if step is not None:
            tensors.append(step)
    _raise(problems)
    sliced = any(source.layers for piece in pieces for source in piece.sources)
    layers = sum(layer_count(piece, used) for piece in pieces) if sliced else None
    if recipe.base and not any(ref and ref.model == recipe.base for t in tensors for ref in (t.base, *t.targets)):
        notes.append(f"{recipe.method} does not use the base's parameters; its configuration and tokenizer are copied")
    rows, tokens = ({}, ()) if vocabulary is None else (vocabulary.rows, vocabulary.tokens)
    return MergePlan(tuple(tensors), names, names[0], layers, rows, tokens, recipe.base, tuple(dict.fromkeys(notes)))


def _models(recipe: Recipe) -> tuple[str, ...]:
    listed = [source.model for piece in recipe.slices for source in piece.sources]
    chosen = [recipe.tokenizer] if recipe.tokenizer not in (None, "base", "union", "truncate") else []
    return tuple(dict.fromkeys([*([recipe.base] if recipe.base else []), *listed, *chosen]))


def _base_problems(recipe: Recipe) -> list[str]:
    spec = MERGE_METHODS[recipe.method]
    problems = []
    if spec.needs_base and recipe.base is None:
        problems.append(f"{recipe.method} needs a base (`base`, mergekit: `base_model`)")
    for piece in recipe.slices:
        for source in piece.sources:
            if spec.uses_base and source.model == recipe.base and source.parameters:
                given = ", ".join(source.parameters)
                problems.append(f"the base {source.model} is given {given}, which {recipe.method} does not use")
    return problems


def _pieces(recipe: Recipe, problems: list[str]) -> list[Slice]:
    """The slices, with the base as a source of each slice whose method uses it."""
    if recipe.base is None or not MERGE_METHODS[recipe.method].uses_base:
        return list(recipe.slices)
    pieces = []
    for piece in recipe.slices:
        ranges = {source.layers for source in piece.sources}
        if any(source.model == recipe.base for source in piece.sources):
            pieces.append(piece)
        elif len(ranges) > 1:
            problems.append(
                f"a slice of layers {sorted(map(str, ranges))} must name its base layers: add {recipe.base} to it"
            )
        else:
            pieces.append(piece._replace(sources=(Source(recipe.base, ranges.pop(), {}), *piece.sources)))
    return pieces


def _tensors(facts: ModelFacts, notes: list[str], name: str) -> dict[str, TensorSpec]:
    kept = {tensor: spec for tensor, spec in facts.tensors.items() if not _BUFFER.search(tensor)}
    if len(kept) < len(facts.tensors):
        notes.append(f"the rotary buffers of {name} are left out; they are computed")
    return kept


def _vocabulary(
    recipe: Recipe, models: Mapping[str, ModelFacts], used: Mapping[str, Mapping[str, TensorSpec]],
    names: Sequence[str], problems: list[str],
) -> Vocabulary | None:  # fmt: skip
    """The output's vocabulary, or None where the embeddings are merged as they are."""
    sizes = {}
    for name in names:
        rows = {spec.shape[0] for tensor, spec in used[name].items() if is_embedding(tensor)}
        if len(rows) == 1:
            sizes[name] = rows.pop()
    tokens = {name: models[name].tokens for name in sizes}
    known = {name: dict(ids) for name, ids in tokens.items() if ids is not None}
    alike = len(set(sizes.values())) <= 1 and all(ids == next(iter(known.values())) for ids in known.values())
    if recipe.tokenizer is None:
        if not alike:
            problems.append(_vocabulary_problem(sizes, known))
        return None
    if len(sizes) < len(names):
        problems.append(f"tokenizer: {recipe.tokenizer} is asked for, but not every model has embeddings by name")
        return None
    if alike and len(known) in (0, len(names)) and recipe.pad_to_multiple_of is None:
        return None
    if recipe.tokenizer == "truncate":
        if len(set(sizes.values())) <= 1:
            return None
        return _truncated(names[0], sizes, known, problems)
    if lacking := [name for name in names if name not in known]:
        problems.append(f"tokenizer: {recipe.tokenizer} needs the tokenizers of all models; {lacking} have none")
        return None
    chosen = recipe.tokenizer not in ("base", "union")
    return merge_vocabularies(
        known, sizes=sizes, reference=recipe.tokenizer if chosen else names[0], union=recipe.tokenizer == "union",
        pad_to_multiple_of=recipe.pad_to_multiple_of,
    )  # fmt: skip


def _vocabulary_problem(sizes: Mapping[str, int], known: Mapping[str, Mapping[str, int]]) -> str:
    what = f"embeddings have {dict(sizes)} rows" if len(set(sizes.values())) > 1 else "token ids mean different tokens"
    return (
        f"the vocabularies differ: {what}. Choose `tokenizer: base` (the base's tokens, rows found by token), `union` "
        "(all tokens) or `truncate` (the first rows, by id)"
    )


def _truncated(
    reference: str, sizes: Mapping[str, int], known: Mapping[str, Mapping[str, int]], problems: list[str]
) -> Vocabulary | None:
    size = sizes[reference]
    if short := {name: rows for name, rows in sizes.items() if rows < size}:
        problems.append(f"tokenizer: truncate cuts to the {size} rows of {reference}, but there are fewer in {short}")
        return None
    by_id = {i: token for token, i in known.get(reference, {}).items()}
    rows = {name: np.arange(size, dtype=np.int32) for name in sizes}
    return Vocabulary(tuple(by_id.get(i) for i in range(size)), rows)


def _step(
    recipe: Recipe, place: Place, used: Mapping[str, Mapping[str, TensorSpec]], vocabulary: Vocabulary | None,
    checked: set[str],
) -> tuple[TensorMerge | None, list[str]]:  # fmt: skip
    """One output tensor, and what is wrong with it."""
    spec = MERGE_METHODS[recipe.method]
    missing = [f"{model} lacks {name}" for model, name in place.names.items() if name not in used[model]]
    if missing:
        return None, missing
    tensors = {model: used[model][name] for model, name in place.names.items()}
    tokens = is_vocabulary(place.output)
    problems = _shape_problems(place, tensors, vocabulary.rows if vocabulary and tokens else {})
    sources = [s for s in place.piece.sources if not (spec.uses_base and s.model == recipe.base)]
    base = TensorRef(recipe.base, place.names[recipe.base]) if recipe.base and spec.uses_base else None
    if recipe.method == "slerp" and base and len(sources) > 1:
        problems.append("slerp goes from the base to one other model; leave the base out or give one model less")
    try:
        parameters = _parameters(recipe, place, sources)
        state = repr((parameters, len(sources), base is None))
        if state not in checked and not problems:
            checked.add(state)
            resolve(recipe.method, parameters, len(sources), base is not None)
    except InputError as error:
        return None, [*problems, f"{place.output}: {error}"]
    dtype = _dtype(recipe.dtype, [spec.dtype for spec in tensors.values()])
    targets = tuple(TensorRef(source.model, place.names[source.model]) for source in sources)
    return TensorMerge(place.output, recipe.method, base, targets, parameters, dtype, tokens), problems


def _shape_problems(place: Place, tensors: Mapping[str, TensorSpec], rows: Mapping[str, np.ndarray]) -> list[str]:
    """Shapes must agree, but for the first axis where rows are looked up by token."""
    problems, (first, *others) = [], tensors
    skip = 1 if rows else 0
    for model in others:
        ours, theirs = tensors[first].shape, tensors[model].shape
        if ours[skip:] != theirs[skip:]:
            problems.append(f"{place.names[model]} of {model} has shape {theirs}, that of {first} {ours}")
    for model, tensor in tensors.items() if rows else ():
        if tensor.shape[0] <= rows[model].max(initial=-1):
            problems.append(f"{place.names[model]} of {model} has {tensor.shape[0]} rows, fewer than its embeddings")
    return problems


def _parameters(recipe: Recipe, place: Place, sources: Sequence[Source]) -> dict[str, Any]:
    """The values of all parameters that are set for one tensor."""
    values: dict[str, Any] = {}
    shared = (place.piece.parameters, recipe.parameters)
    for name, parameter in MERGE_METHODS[recipe.method].parameters.items():
        per_source = [_first(name, place, (source.parameters, *shared)) for source in sources]
        if parameter.per_target:
            if name == "weights" and None in per_source and any(value is not None for value in per_source):
                without = sources[per_source.index(None)].model
                raise InputError(f"{recipe.method}: {name} is set for other models, but not for {without}.")
            if any(value is not None for value in per_source):
                values[name] = tuple(parameter.default if value is None else value for value in per_source)
        elif any(name in source.parameters for source in sources) and len(sources) > 1:
            raise InputError(
                f"{recipe.method}: {name} is one value for all models; move it to the recipe's parameters."
            )
        elif per_source and per_source[0] is not None:
            values[name] = per_source[0]
    return values


def _first(name: str, place: Place, levels: Sequence[Mapping[str, Any]]) -> Any:
    found = (_evaluated(level[name], place) for level in levels if name in level)
    return next((value for value in found if value is not None), None)


def _evaluated(setting: Any, place: Place) -> Any:
    """The value of a setting for one tensor; None if no filter matches."""
    if not isinstance(setting, list):
        return setting
    if isinstance(setting[0], Mapping):
        for entry in setting:
            if entry.get("filter") in (None, "*") or entry["filter"] in place.output:
                return _evaluated(entry["value"], place)
        return None
    return (
        float(np.interp(place.position, np.linspace(0, 1, len(setting)), setting)) if len(setting) > 1 else setting[0]
    )


def _dtype(wanted: str | None, names: Sequence[str]) -> str:
    """The output's dtype: what is wanted, or one that holds all inputs; other than floating point stays as it is."""
    if any(name not in _FLOATS for name in names):
        return names[0]
    if wanted is not None:
        return wanted
    return "float32" if set(names) == {"float16", "bfloat16"} else max(names, key=_FLOATS.index)


def _raise(problems: list[str]) -> None:
    if problems:
        unique = list(dict.fromkeys(problems))
        more = [f"and {len(unique) - _SHOWN} more"] if len(unique) > _SHOWN else []
        raise InputError("the models cannot be merged:\n  " + "\n  ".join(unique[:_SHOWN] + more))
