"""Surfaces: which bytes a token stands for, and at which byte of the text every position ends.

Bytes are the only coordinate that two tokenizers share. The functions here are pure: they know how the three
families of vocabularies spell bytes (byte-level letters, sentencepiece's `▁` and `<0xNN>`, WordPiece's `##`),
but no tokenizer object. A document is *exact* when the bytes of its tokens, joined, are the text (perhaps after
one dummy space in front); then the ends are a cumulative sum and every byte-fallback or partial UTF-8 token has
its own end. Where a normaliser changed the text, no such sum exists and the ends come from the character
offsets that the tokenizer reports; positions inside one character then share the end of that character.

Not done here: repairing offsets inside a normalised character. Such positions are simply not comparable, and
`positions.align_positions` never pairs them with a position of another length of run.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from fusejax.types import Array

__all__ = [
    "byte_level_bytes",
    "byte_level_letters",
    "character_ends",
    "joined_ends",
    "offset_ends",
    "sentencepiece_bytes",
    "token_lengths",
    "wordpiece_bytes",
]


@functools.cache
def byte_level_letters() -> tuple[str, ...]:
    """Returns the printable letter by which byte-level BPE writes each of the 256 bytes (GPT-2's alphabet)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


@functools.cache
def _letter_to_byte() -> dict[str, int]:
    return {letter: byte for byte, letter in enumerate(byte_level_letters())}


def byte_level_bytes(piece: str) -> bytes:
    """Returns the bytes of a byte-level BPE piece; a piece with foreign letters stands for its own UTF-8."""
    table = _letter_to_byte()
    try:
        return bytes([table[letter] for letter in piece])
    except KeyError:
        return piece.encode()


def sentencepiece_bytes(piece: str, *, space: str | None = "▁", byte_fallback: bool = False) -> bytes:
    """Returns the bytes of a sentencepiece-style piece: `space` is a blank, `<0xNN>` one byte."""
    if byte_fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return (piece.replace(space, " ") if space else piece).encode()


def wordpiece_bytes(piece: str, *, prefix: str = "##") -> bytes:
    """Returns the bytes of a WordPiece piece: a word's start carries the blank before it, `##x` is `x`.

    WordPiece forgets white space, so this is a convention: a piece that starts with a letter or digit begins a
    word, punctuation stands close to what precedes it.
    """
    if prefix and piece.startswith(prefix) and len(piece) > len(prefix):
        return piece[len(prefix) :].encode()
    return (" " + piece if piece[:1].isalnum() else piece).encode()


def token_lengths(token_bytes: Sequence[bytes | None]) -> Array:
    """Returns the number of bytes of every id, [V] int32; 0 for special tokens (None)."""
    return np.fromiter((len(b) if b else 0 for b in token_bytes), np.int32, len(token_bytes))


def joined_ends(ids: Array, lengths: Array, joined: bytes, text: bytes) -> Array | None:
    """Returns the byte end of every token of an exact document, or None where the bytes are not the text.

    Args:
      ids: [N] int, the token ids without special tokens.
      lengths: [V] int32, bytes of every id.
      joined: the bytes of the tokens, joined.
      text: the UTF-8 bytes of the document.

    Returns:
      [N] int32, bytes of `text` covered after each token. A dummy space that the tokenizer put in front covers
      none, so the first end may be one less than the first token's length.
    """
    dummy = len(joined) - len(text)
    if dummy not in (0, 1) or not joined.endswith(text) or (dummy and joined[:1] != b" "):
        return None
    ends = np.cumsum(lengths[ids], dtype=np.int32)
    return ends - np.int32(1) if dummy else ends


def character_ends(text: str) -> Array:
    """Returns the byte at which each character begins, and the length of the text: [characters + 1] int32."""
    points = _points(text)
    widths = 1 + (points >= 0x80).astype(np.int32) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([np.zeros(1, np.int32), np.cumsum(widths, dtype=np.int32)])


def offset_ends(text: str, offsets: Sequence[tuple[int, int]], *, dummy_first: bool = False) -> Array:
    """Returns the byte end of every token from the tokenizer's character offsets into the original text.

    A token whose span overlaps the next token's start ends inside a character (or was inserted by the
    normaliser); it gets the end of the last token of that overlap. Of the characters that the normaliser dropped
    between two tokens, a combining mark belongs to the first, white space and what follows it to the second; at
    the end of the text all belong to the last token, so the ends always close at the text's length.

    Args:
      text: the document.
      offsets: [N] pairs of character positions (start, end).
      dummy_first: the first token is only the dummy space, which covers no byte.

    Returns:
      [N] int32, not decreasing.
    """
    if not offsets:
        return np.zeros(0, np.int32)
    begins = character_ends(text)
    spans = np.fromiter(itertools.chain.from_iterable(offsets), np.int64, 2 * len(offsets)).reshape(-1, 2)
    count = len(spans)
    inside = np.zeros(count, bool)
    inside[:-1] = spans[1:, 0] < spans[:-1, 1]
    closing = np.where(inside, count, np.arange(count))
    closing = np.minimum.accumulate(closing[::-1])[::-1]
    stops = spans[:, 1].copy()
    stops[:-1] = np.maximum(stops[:-1], np.minimum(_next_blank(text)[stops[:-1]], spans[1:, 0]))
    ends = begins[stops[closing]]
    ends[-1] = begins[-1]
    if dummy_first and count > 1:
        ends[0] = 0
    return np.maximum.accumulate(ends)


def _points(text: str) -> Array:
    """The code points, [characters] uint32."""
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


@functools.cache
def _white_space() -> Array:
    """Whether each code point below U+3001 is white space; none above is."""
    return np.array([chr(point).isspace() for point in range(0x3001)] + [False])


def _next_blank(text: str) -> Array:
    """The next white-space character at or after each character, [characters + 1]."""
    count = len(text)
    blank = np.flatnonzero(_white_space()[np.minimum(_points(text), 0x3001)])
    where = np.full(count + 1, count, np.int64)
    where[blank] = blank
    return np.minimum.accumulate(where[::-1])[::-1]
