"""Where every output tensor comes from: names and layers of the input models, without shapes or parameters.

Names alone decide what a layer is (`<stack>.<number>.<rest>`) and which tensors have a row per token; no table of
architectures is needed. A model whose head is tied has no tensor for it: its embeddings stand in where another model
of the merge has a head of its own.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fusejax.merging.plan import TensorSpec
from fusejax.merging.recipe import Slice, Source

__all__ = ["Place", "extra_tensors", "find_places", "is_embedding", "is_vocabulary", "layer_count"]

_LAYER = re.compile(r"^((?:.*\.)?(?:layers|h|blocks|layer))\.(\d+)\.(.+)$")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|tok_embeddings|embed_in)\.weight$")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")

Models = Mapping[str, Mapping[str, TensorSpec]]


class Place(NamedTuple):
    """Where one output tensor comes from."""

    output: str
    piece: Slice
    names: Mapping[str, str]  # model -> the tensor's name in it
    position: float  # of its layer in the slice, 0 to 1


def is_embedding(name: str) -> bool:
    """Returns whether a tensor is the table of input embeddings."""
    return _EMBEDDING.search(name) is not None


def is_vocabulary(name: str) -> bool:
    """Returns whether the first axis of a tensor runs over tokens."""
    return is_embedding(name) or _HEAD.search(name) is not None


def layer_count(piece: Slice, models: Models) -> int:
    """Returns the number of layers that a slice adds to the output."""
    start, end = _range(piece.sources[0], models)
    return end - start


def find_places(pieces: Sequence[Slice], models: Models, problems: list[str]) -> list[Place]:
    """Lists the output's tensors: embeddings, layers in order, and what follows them.

    Args:
      pieces: the slices of the output, in order, with all their sources.
      models: the tensors of every model.
      problems: what is wrong is appended to it.

    Returns:
      A place for every tensor that the first model of a slice, or any head, names.
    """
    before, inside, after, offset = [], [], [], 0
    first, last = pieces[0], pieces[-1]
    heads = [name for source in last.sources for name in models[source.model] if _HEAD.search(name)]
    outside = [name for name in models[first.sources[0].model] if not _LAYER.match(name)]
    for name in dict.fromkeys([*outside, *heads]):
        piece = first if is_embedding(name) else last
        place = Place(name, piece, {source.model: name for source in piece.sources}, 0.0)
        (before if is_embedding(name) else after).append(_tied(place, models))
    for piece in pieces:
        if wrong := _range_problems(piece, models):
            problems += wrong
            continue
        inside += _layers(piece, models, offset)
        offset += layer_count(piece, models)
    return before + [place for _, place in sorted(inside, key=lambda item: item[0])] + after


def extra_tensors(piece: Slice, models: Models) -> list[str]:
    """Names what a model has and its slice's first model lacks: it would vanish, so it is a problem."""
    kinds = {}
    for source in piece.sources:
        start, end = _range(source, models)
        kinds[source.model] = {_relative(name, start, end): name for name in models[source.model]}
    (first, ours), *others = kinds.items()
    return [
        f"{model} has {name}, which {first} lacks"
        for model, theirs in others
        for kind, name in theirs.items()
        if kind not in ours and not _HEAD.search(name)
    ]


def _relative(name: str, start: int, end: int) -> tuple[str, int, str]:
    """A tensor's name with its layer counted from the start of the slice; all other layers are alike."""
    match = _LAYER.match(name)
    if match is None:
        return "", 0, name
    return (match[1], int(match[2]) - start, match[3]) if start <= int(match[2]) < end else ("", -1, "")


def _stacks(tensors: Mapping[str, TensorSpec]) -> dict[str, int]:
    """The number of layers of every stack of a model."""
    found: dict[str, int] = {}
    for name in tensors:
        if match := _LAYER.match(name):
            found[match[1]] = max(found.get(match[1], 0), int(match[2]) + 1)
    return found


def _range(source: Source, models: Models) -> tuple[int, int]:
    return source.layers or (0, max(_stacks(models[source.model]).values(), default=0))


def _range_problems(piece: Slice, models: Models) -> list[str]:
    problems, ranges = [], {source.model: _range(source, models) for source in piece.sources}
    for model, (start, end) in ranges.items():
        stacks = _stacks(models[model])
        if end > (layers := max(stacks.values(), default=0)):
            problems.append(f"{model} has {layers} layers, but the recipe takes {start} to {end - 1}")
        if len(stacks) > 1 and piece.sources[0].layers:
            problems.append(f"{model} has several stacks of layers, {', '.join(stacks)}; slices need one")
    lengths = {model: end - start for model, (start, end) in ranges.items()}
    if len(set(lengths.values())) > 1:
        problems.append(f"the numbers of layers differ: {lengths}")
    return problems


def _layers(piece: Slice, models: Models, offset: int) -> Iterator[tuple[int, Place]]:
    """The layers of one slice, each with its number in the output."""
    source = piece.sources[0]
    (start, end), stacks = _range(source, models), _stacks(models[source.model])
    for name in models[source.model]:
        match = _LAYER.match(name)
        if match is None or not start <= int(match[2]) < end:
            continue
        stack, i, rest = match[1], int(match[2]) - start, match[3]
        n = end - start if source.layers else stacks[stack]
        names = {s.model: f"{stack}.{_range(s, models)[0] + i}.{rest}" for s in piece.sources}
        yield offset + i, Place(f"{stack}.{offset + i}.{rest}", piece, names, i / (n - 1) if n > 1 else 1.0)


def _tied(place: Place, models: Models) -> Place:
    """Where a head is missing because it is tied, the embeddings take its place."""
    if not _HEAD.search(place.output):
        return place
    names = {}
    for model, name in place.names.items():
        embeddings = [other for other in models[model] if is_embedding(other)]
        names[model] = embeddings[0] if name not in models[model] and len(embeddings) == 1 else name
    return place._replace(names=names)
