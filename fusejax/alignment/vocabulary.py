"""Vocabularies: the symbols that two tokenizers have in common.

At an aligned position the source's next token and the target's next token are prefixes of the same unknown
continuation. *Exact match* keeps what both spell identically. The *coarse alphabet* lets both speak in symbols:

    first_X(b) = the first token that tokenizer X gives to the bytes b, encoded as a continuation
    c(b)       = fixed point of  b -> first_T(first_S(b))

`first_X(b)` is a prefix of b, so lengths never grow and the iteration ends at a byte string that is a token of
both, at worst one byte. Since the first step lands in a token, c is a map of target ids into target ids,
`step = first_T o first_S`, and the fixed point is reached by composing that table with itself: three batches of
short encodings and a few gathers, whatever the size of the vocabularies.

*Space rule*: tokenizers cut runs of blanks at different places, so a token that begins with two or more spaces,
or is nothing but spaces, has the symbol " ".

Special tokens have no bytes. They are paired by role (eos with eos, then bos, pad, unk), never by spelling; a
special without a partner has no symbol (-1), and its probability stays in the residual. The same holds for an
encoding that does not begin with the bytes it was given (an unknown token, a lossy normaliser).

A tokenizer with itself (equal fingerprints) needs no common alphabet: every id is its own symbol.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from fusejax.errors import InputError
from fusejax.types import Array, EventGroups, VocabMap

__all__ = [
    "ByteVocabulary",
    "coarse_map",
    "event_groups",
    "exact_map",
    "first_tokens",
    "padded_map",
    "symbols_of_bytes",
]

ROLES = ("eos", "bos", "pad", "unk")


class ByteVocabulary(Protocol):
    """What the maps ask of a tokenizer; `fusejax.io.tokenizers.Tokenizer` is one."""

    @property
    def token_bytes(self) -> Sequence[bytes | None]: ...

    @property
    def special_roles(self) -> Mapping[str, int]: ...

    @property
    def fingerprint(self) -> str: ...

    def encode_continuation(self, fragments: Sequence[bytes], /) -> list[list[int]]: ...


def exact_map(source: ByteVocabulary, target: ByteVocabulary) -> VocabMap:
    """Maps every source token to the target token with the same bytes (FuseLLM's exact match, by bytes).

    Args:
      source: the tokenizer whose distributions are moved, V_s ids.
      target: the tokenizer that receives them, V ids.

    Returns:
      VocabMap: `symbol_of_source [V_s]`, `symbol_of_target [V]` int32; the identity on shared tokens, -1
      elsewhere. Ids of one vocabulary with the same bytes share one symbol.
    """
    if source.fingerprint == target.fingerprint:
        return _identity(target)
    names = _canonical_ids(target)
    of_source = np.array([names.get(b, -1) if b else -1 for b in source.token_bytes], np.int32)
    shared = np.zeros(len(target.token_bytes), bool)
    shared[of_source[of_source >= 0]] = True
    of_target = np.array([names.get(b, -1) if b else -1 for b in target.token_bytes], np.int32)
    of_target[of_target >= 0] = np.where(shared[of_target[of_target >= 0]], of_target[of_target >= 0], -1)
    return _pair_roles(VocabMap(of_source, of_target), source, target)


def coarse_map(source: ByteVocabulary, target: ByteVocabulary) -> VocabMap:
    """Maps both vocabularies to their common coarse alphabet (byte-exact alignment, section 3).

    Args:
      source: the tokenizer whose distributions are moved, V_s ids.
      target: the tokenizer that receives them, V ids.

    Returns:
      VocabMap: `symbol_of_source [V_s]`, `symbol_of_target [V]` int32, target ids that name the symbols;
      idempotent (`s[s[v]] == s[v]` where defined); -1 for tokens that belong to no symbol.
    """
    if source.fingerprint == target.fingerprint:
        return _identity(target)
    source_bytes, target_bytes = source.token_bytes, target.token_bytes
    target_of_source = first_tokens(target, source_bytes)  # first_T(bytes of u)     [V_s]
    source_of_target = first_tokens(source, target_bytes)  # first_S(bytes of v)     [V]
    source_of_source = first_tokens(source, source_bytes)  # first_S(bytes of u)     [V_s]
    blank = first_tokens(target, [b" "])[0]
    step = _compose(target_of_source, source_of_target)
    step[_blank_run(target_bytes)] = blank
    symbol_of_target = _fixed_point(step)
    start = _compose(target_of_source, source_of_source)
    start[_blank_run(source_bytes)] = blank
    return _pair_roles(VocabMap(_compose(symbol_of_target, start), symbol_of_target), source, target)


def symbols_of_bytes(
    fragments: Sequence[bytes], source: ByteVocabulary, target: ByteVocabulary, vocab_map: VocabMap
) -> Array:
    """Returns the symbol [n] int32 of byte strings that need not be tokens, as `coarse_map` would name them."""
    of_source = first_tokens(source, fragments)
    first = first_tokens(target, [source.token_bytes[i] if i >= 0 else None for i in of_source])
    symbols = _compose(np.asarray(vocab_map.symbol_of_target, np.int32), first)
    symbols[_blank_run(fragments)] = _compose(vocab_map.symbol_of_target, first_tokens(target, [b" "]))[0]
    return symbols


def padded_map(vocab_map: VocabMap, *, source_size: int, target_size: int) -> VocabMap:
    """Extends a map to models whose vocabularies are padded; padded ids have no symbol.

    Args:
      vocab_map: `symbol_of_source [V_s]`, `symbol_of_target [V]`.
      source_size: rows of the source model's head, at least V_s.
      target_size: rows of the target model's head, at least V.

    Returns:
      VocabMap of [source_size] and [target_size].
    """
    sizes = (source_size - len(vocab_map.symbol_of_source), target_size - len(vocab_map.symbol_of_target))
    if min(sizes) < 0:
        raise InputError(f"the models have {-min(sizes)} rows less than their tokenizers have ids.")
    source, target = (
        np.concatenate([ids, np.full(extra, -1, np.int32)]) for ids, extra in zip(vocab_map, sizes, strict=True)
    )
    return VocabMap(source, target)


def event_groups(symbol_of_target: Array) -> EventGroups:
    """Lists the members of every symbol in compressed rows.

    Args:
      symbol_of_target: [V] int32, the symbol of each target token, or -1.

    Returns:
      EventGroups: `offsets [V + 1]`, `members [V]` int32; members ascend within a symbol, the unused tail is -1.

    Raises:
      InputError: a symbol outside the vocabulary, or a map that is not idempotent.
    """
    symbols = np.asarray(symbol_of_target, np.int64)
    size, used = symbols.size, symbols >= 0
    if symbols.max(initial=-1) >= size or (symbols[symbols[used]] != symbols[used]).any():
        raise InputError("symbol_of_target must name symbols by ids of its own vocabulary and be idempotent.")
    offsets = np.zeros(size + 1, np.int32)
    offsets[1:] = np.cumsum(np.bincount(symbols[used], minlength=size))
    members = np.full(size, -1, np.int32)
    ids = np.flatnonzero(used)
    members[: ids.size] = ids[np.argsort(symbols[used], kind="stable")]
    return EventGroups(offsets, members)


def _identity(vocabulary: ByteVocabulary) -> VocabMap:
    ids = np.arange(len(vocabulary.token_bytes), dtype=np.int32)
    return VocabMap(ids, ids.copy())


def _canonical_ids(vocabulary: ByteVocabulary) -> dict[bytes, int]:
    """The id that names each byte string: of several, the one that the tokenizer itself produces."""
    names: dict[bytes, int] = {}
    doubles = set()
    for index, surface in enumerate(vocabulary.token_bytes):
        if surface:
            if surface in names:
                doubles.add(surface)
            names[surface] = index
    ordered = sorted(doubles)
    for surface, ids in zip(ordered, vocabulary.encode_continuation(ordered), strict=True):
        if len(ids) == 1 and vocabulary.token_bytes[ids[0]] == surface:
            names[surface] = ids[0]
    return names


def first_tokens(vocabulary: ByteVocabulary, surfaces: Sequence[bytes | None]) -> Array:
    """first_X of every byte string, [n] int32; -1 where there are no bytes or the token is not their prefix."""
    token_bytes = vocabulary.token_bytes
    present = [(index, surface) for index, surface in enumerate(surfaces) if surface]
    first = np.full(len(surfaces), -1, np.int32)
    encoded = vocabulary.encode_continuation([surface for _, surface in present])
    for (index, surface), ids in zip(present, encoded, strict=True):
        piece = token_bytes[ids[0]] if ids else None
        if piece and surface.startswith(piece):
            first[index] = ids[0]
    return first


def _blank_run(surfaces: Sequence[bytes | None]) -> Array:
    """Where the space rule applies, [n] bool."""
    return np.array([bool(b) and (b.startswith(b"  ") or b == b" ") for b in surfaces], bool)  # type: ignore[union-attr]


def _compose(outer: Array, inner: Array) -> Array:
    """outer[inner], -1 staying -1."""
    return np.where(inner >= 0, outer[np.maximum(inner, 0)], np.int32(-1))


def _fixed_point(step: Array) -> Array:
    """Composes a map with itself until nothing changes; a token that falls off (-1) on the way stays off."""
    for _ in range(64):
        following = _compose(step, step)
        if np.array_equal(following, step):
            return step
        step = following
    raise InputError("the coarse alphabet has no fixed point: a tokenizer's continuation encoding is not stable.")


def _pair_roles(vocab_map: VocabMap, source: ByteVocabulary, target: ByteVocabulary) -> VocabMap:
    of_source, of_target = (np.array(ids, np.int32) for ids in vocab_map)
    source_taken: set[int] = set()
    target_taken: set[int] = set()
    for role in ROLES:
        ours, theirs = source.special_roles.get(role), target.special_roles.get(role)
        if ours is None or theirs is None or ours in source_taken or theirs in target_taken:
            continue
        source_taken.add(ours)
        target_taken.add(theirs)
        of_source[ours] = of_target[theirs] = theirs
    return VocabMap(of_source, of_target)
