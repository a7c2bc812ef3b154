"""Documents of which only spans are trained: chat turns, or parts of a text.

Each side renders a conversation in its own way, so only the bytes of the trained spans are coordinates that both have.
A masked record counts those bytes alone (`byte_ends`) and says for every position to which span its label belongs
(`spans`, -1: none). What is not trained is left out, on both sides; what remains is a document like any other, once the
end of one span and the beginning of the next, which lie at the same byte, are told apart: byte ends are moved on by one
for each span before. Then the stop token of a span stands at its end, and pairs with the other side's.

The alignment of that document is put back into the target's positions; all others are empty, whatever their tokens and
distributions are.

A stop token is a special token that templates choose (`<|im_end|>`, `</s>`): the two sides' are paired as stops
(`pair_stops`), whatever their roles elsewhere.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from fusejax.alignment.document import AlignedDocument, Encoding, align_document
from fusejax.alignment.report import DROPPED, Span
from fusejax.errors import InputError
from fusejax.types import Array, VocabMap

__all__ = ["MaskedEncoding", "align_masked", "mask_target", "pair_stops", "stop_label", "trained_source"]

_SOURCE_ARRAYS = (
    "tokens",
    "labels",
    "byte_ends",
    "topk_ids",
    "topk_logprobs",
    "residual_logprob",
    "realised_logprob",
)


class MaskedEncoding(Encoding, Protocol):
    """A document whose positions say which trained span they predict."""

    @property
    def spans(self) -> Array | None: ...


class _Part(NamedTuple):
    """The trained positions of a document."""

    tokens: Array
    labels: Array
    byte_ends: Array
    n_bytes: int


def pair_stops(vocab_map: VocabMap, source_stop: int, target_stop: int) -> tuple[VocabMap, VocabMap]:
    """Adds the stop tokens of two chat templates to a vocabulary map.

    Args:
      vocab_map: of the two tokenizers.
      source_stop, target_stop: the ids that close an assistant's turn.

    Returns:
      The map for plain documents and that for conversations; they share `symbol_of_target`, in which the target's stop
      names itself.
    """
    of_source, of_target = np.array(vocab_map.symbol_of_source), np.array(vocab_map.symbol_of_target)
    if of_target[target_stop] != target_stop:
        of_target[target_stop] = target_stop
        of_source = np.where(of_source == target_stop, -1, of_source).astype(of_source.dtype)
    paired = of_source.copy()
    paired[source_stop] = target_stop
    return VocabMap(of_source, of_target), VocabMap(paired, of_target)


def stop_label(encoded: MaskedEncoding) -> int:
    """Returns the id that closes the last trained span of a conversation."""
    return int(encoded.labels[np.flatnonzero(np.asarray(encoded.spans) >= 0)[-1]])


def trained_source(source: Mapping[str, Array]) -> dict[str, Array]:
    """Returns the trained positions of a captured record; all of them where it is not masked."""
    if "spans" not in source:
        return dict(source)
    rows = np.flatnonzero(np.asarray(source["spans"]) >= 0)
    return {name: np.asarray(source[name])[rows] for name in _SOURCE_ARRAYS}


def align_masked(
    source: Mapping[str, Array],
    target: MaskedEncoding,
    vocab_map: VocabMap,
    *,
    doc_id: str = "",
    align: Callable[..., AlignedDocument] = align_document,
    **options: Any,
) -> AlignedDocument:
    """Carries one captured, masked document to the target's positions and symbols.

    Args:
      source: arrays of the captured record (A1) with `spans` [N_s].
      target: the same document encoded by the target, with `spans` [N].
      vocab_map: symbols of both vocabularies, stop tokens paired.
      doc_id: for messages and the report.
      align: `align_document`, or what takes the same arguments.
      options: of `align`.

    Returns:
      The aligned record of N positions, with `mask` [N]; its source arrays hold trained positions only.

    Raises:
      InputError: the two sides are not the same document, or not masked alike.
    """
    if target.spans is None or "spans" not in source:
        raise InputError(f"document {doc_id!r} has trained spans on one side only; capture the source again")
    ours, theirs = np.flatnonzero(target.spans >= 0), np.flatnonzero(source["spans"] >= 0)
    own, other = target.spans[ours], source["spans"][theirs]
    part = trained_source(source)
    part["byte_ends"] = part["byte_ends"] + other
    ends = target.byte_ends[ours] + own
    encoding = _Part(target.tokens[ours], target.labels[ours], ends, target.n_bytes)
    begins = ends[np.flatnonzero(np.diff(own, prepend=-1))]
    aligned = align(part, encoding, vocab_map, doc_id=doc_id, begins=begins, **options)
    arrays = _spread(aligned.arrays, target, ours)
    if "chain_logprob" in arrays:
        arrays["chain_logprob"][~_contiguous(target.spans, source["spans"], ours, theirs, ends, part)] = -np.inf
    arrays["source_byte_ends"] = np.asarray(source["byte_ends"])[theirs].astype(np.int32)
    worst = tuple(_unmoved(span, ends, own) for span in aligned.report.worst)
    return aligned._replace(arrays=arrays, report=aligned.report._replace(worst=worst))


def _spread(arrays: Mapping[str, Array], target: MaskedEncoding, rows: Array) -> dict[str, Array]:
    """Arrays of the trained positions put into all; the others are empty."""
    count = len(target.tokens)
    whole: dict[str, Array] = {
        "tokens": np.asarray(target.tokens, np.int32),
        "labels": np.asarray(target.labels, np.int32),
        "byte_ends": np.asarray(target.byte_ends, np.int32),
    }
    empty = {"ids": -1, "logprobs": -np.inf, "residual_logprob": 0, "status": DROPPED, "chain_logprob": -np.inf}
    for name, array in arrays.items():
        if name in empty:
            whole[name] = np.full((count, *array.shape[1:]), empty[name], array.dtype)
            whole[name][rows] = array
    mask = np.zeros(count, np.int8)
    mask[rows] = 1
    return whole | {name: array for name, array in arrays.items() if name not in whole} | {"mask": mask}


def _contiguous(own: Array, other: Array, ours: Array, theirs: Array, ends: Array, part: Mapping[str, Array]) -> Array:
    """Positions [N] whose label, on both sides, leads to the next trained position without leaving one out."""
    good = np.zeros(len(own), bool)
    follows = np.append(np.diff(ours) == 1, False)
    gaps = np.concatenate([[0], np.cumsum(np.diff(theirs) != 1)])  # gaps before each trained source position
    at = np.searchsorted(part["byte_ends"], ends, side="right") - 1
    unbroken = np.append(gaps[at[1:]] == gaps[at[:-1]], False) if len(at) else np.zeros(0, bool)
    good[ours] = follows & unbroken
    return good


def _unmoved(span: Span, ends: Array, own: Array) -> Span:
    """A worst span with its bytes counted as the document counts them."""
    last = len(ends) - 1
    start, stop = (
        int(byte - own[np.clip(np.searchsorted(ends, byte, side="right") - 1, 0, last)])
        for byte in (span.start, span.stop)
    )
    return span._replace(start=start, stop=max(start, stop))


def mask_target(arrays: dict[str, Array], target: MaskedEncoding, source: Mapping[str, Array]) -> dict[str, Array]:
    """Empties what is not trained of an aligned record that was made of whole sequences (the papers' alignment).

    Args:
      arrays: the aligned record (A3), N positions; `ids`, `logprobs`, `residual_logprob` and `status` are replaced.
      target: its encoding.
      source: the captured record (A1).
    """
    rows = np.flatnonzero(np.asarray(target.spans) >= 0)
    part = {name: array[rows] if len(array) == len(target.tokens) else array for name, array in arrays.items()}
    theirs = trained_source(source)
    part |= {"source_byte_ends": theirs["byte_ends"], "source_realised": theirs["realised_logprob"]}
    return _spread(part, target, rows)
