"""Rendered text: special tokens that a chat template spells, plain text in between, and which tokens are trained.

A rendering is a string in which `<|im_start|>` is a token where the template wrote it and four plain words where a
user did. So special tokens are looked for in the whole string, those inside a message's content are left as text, and
the stretches between the others are encoded one by one, which gives the ids that the tokenizer itself gives to the
whole (tests compare them) and the byte end of every token.

*Coordinates.* Two models render one conversation differently; what they share are the bytes of the trained spans, one
after another. Byte ends of a masked document count those bytes alone, so scaffolding and prompts have no width. A label
is trained when it lies within a span, one blank in front of it (`: Yes` is `:` and ` Yes`) or the end of a multi-byte
character included, and so is a special token that the template itself writes there (`[TOOL_CALLS]`). Where the token
after a span's end, blanks aside, is a special one, that is the stop token of the span: it is trained, without bytes.

Deliberately not done: tokens that reach further out of a span. They would teach bytes that are not to be trained.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fusejax.errors import InputError
from fusejax.io.tokenizers import EncodedDocument, Tokenizer
from fusejax.types import Array

__all__ = ["NothingTrained", "encode_rendered", "mask_encoded"]

Ranges = Sequence[tuple[int, int]]


class NothingTrained(InputError):
    """No token lies within the spans."""


class _Whole(NamedTuple):
    """All tokens of a text."""

    ids: Array  # [N + 1] int32
    ends: Array  # [N + 1] int32, byte ends in the text
    special: Array  # [N + 1] bool, special tokens that are spelt or were added (an unknown token is none)
    data: bytes  # the text
    exact: bool


def encode_rendered(
    tokenizer: Tokenizer, text: str, *, contents: Ranges, spans: Ranges, where: str = "", needs_stop: bool = True
) -> EncodedDocument:
    """Encodes a rendered conversation.

    Args:
      tokenizer: the model's own.
      text: the rendering; nothing is added to it, not even a start token.
      contents: characters [start, stop) of every message's content, in which special tokens are plain text.
      spans: characters [start, stop) that are trained, in order.
      where: the document, for messages.
      needs_stop: whether a span without a stop token is an error.

    Returns:
      The document; `byte_ends` and `n_bytes` count bytes of the spans, `spans` says which are trained.

    Raises:
      InputError: a span that no stop token closes, or nothing to train.
    """
    scaffold = [
        (index, start, stop)
        for index, start, stop in tokenizer.find_special(text)
        if not any(start < b and a < stop for a, b in contents)
    ]
    ids, ends, special = [], [], []
    exact, at, byte = True, 0, 0
    for index, start, stop in [*scaffold, (-1, len(text), len(text))]:
        if start > at:
            part_ids, part_ends, part_exact = tokenizer.encode_part(text[at:start], first=at == 0)
            ids.append(part_ids)
            special.append(np.zeros(len(part_ids), bool))
            ends.append(part_ends + np.int32(byte))
            byte, exact = byte + len(text[at:start].encode()), exact and part_exact
        if index >= 0:
            byte += len(text[start:stop].encode())
            ids.append(np.array([index], np.int32))
            ends.append(np.array([byte], np.int32))
            special.append(np.ones(1, bool))
        at = stop
    data = text.encode()
    in_bytes = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]
    whole = _Whole(np.concatenate(ids), np.concatenate(ends), np.concatenate(special), data, exact)
    return _masked(whole, in_bytes, where, needs_stop=needs_stop)


def mask_encoded(
    tokenizer: Tokenizer, encoded: EncodedDocument, text: str, spans: Ranges, *, where: str = ""
) -> EncodedDocument:
    """Masks a document that was encoded whole, its end token included.

    Args:
      tokenizer: what it was encoded with.
      encoded: the document.
      text: its text.
      spans: bytes [start, stop) of the text that are trained, in order.
      where: the document, for messages.
    """
    data = text.encode()
    ids = np.append(encoded.tokens, encoded.labels[-1:])
    ends = np.append(encoded.byte_ends, np.full(len(encoded.labels[-1:]), len(data), np.int32))
    special = np.zeros(len(ids), bool)
    special[:1], special[-1:] = tokenizer.start_id is not None, tokenizer.eos_id is not None
    return _masked(_Whole(ids, ends, special, data, encoded.exact), spans, where, needs_stop=False)


def _masked(whole: _Whole, spans: Ranges, where: str, *, needs_stop: bool) -> EncodedDocument:
    """The document of whole tokens, trained in its spans (bytes of the text)."""
    ids, ends, special, data, exact = whole
    starts = np.append(np.zeros(1, ends.dtype), ends[:-1])
    trained = np.full(len(ids), -1, np.int32)
    covered = np.zeros(len(ids), np.int64)  # trained bytes up to the end of each token
    for number, (begin, end) in enumerate(spans):
        first, last = begin - data[:begin].endswith(b" "), end
        if not exact:  # a normaliser may fold white space into the token beside it
            first, last = len(data[:begin].rstrip()), len(data) - len(data[end:].lstrip())
        trained[(starts >= first) & (ends > begin) & (starts < end) & (ends <= last)] = number
        covered += np.clip(ends - begin, 0, end - begin)
        stop = _stop(starts, ends, special, data, end)
        if stop is not None:
            after = np.arange(min(int(np.searchsorted(starts, end)), stop), stop + 1)
            trained[after[trained[after] < 0]] = number
        elif needs_stop:
            said = data[end : end + 20].decode(errors="replace")
            raise InputError(
                f"{where}: no special token closes the assistant's turn (after it stands {said!r}), so a model would "
                "not learn to stop. Give a `chat_template` that ends turns with a token of this tokenizer"
            )
    if (trained[1:] < 0).all():
        raise NothingTrained(f"{where}: no token lies within the spans {list(spans)[:3]}: there is nothing to train")
    n_bytes = sum(end - begin for begin, end in spans)
    return EncodedDocument(ids[:-1], ids[1:], covered[:-1].astype(np.int32), n_bytes, exact, trained[1:])


def _stop(starts: Array, ends: Array, special: Array, data: bytes, end: int) -> int | None:
    """The special token that follows byte `end`, with nothing but blanks between."""
    found = np.flatnonzero(special & (starts >= end))
    if not found.size or data[end : int(starts[found[0]])].strip(b" "):
        return None
    index = int(found[0])
    # An end token that was added to the text covers nothing; a spelt one begins right there.
    return index if ends[index] > starts[index] or starts[index] == len(data) else None
