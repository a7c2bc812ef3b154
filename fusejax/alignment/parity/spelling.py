"""Token strings as the papers' programs compare them, and the differences between their three generations.

FuseLLM and FuseChat align *strings*: vocabulary pieces with a word-start marker (`▁` or `Ġ`), of which every
occurrence is removed before two of them are compared. FuseChat 2 compares what a single token decodes to instead.
A `Vocabulary` holds both forms, in id order, so that everything else here works on arrays of ids.

`vocabulary_of_bytes` makes one from token bytes: blanks are `▁`, bytes are their own text, whatever the tokenizer.
It has none of the reference's troubles with spelling (a table of tokenizer classes; `Ċ` against `<0x0A>`; partial
characters that all decode to U+FFFD), because no letters of a byte alphabet are left; bytes of an unfinished
character stay different from each other, as the lone surrogates of `surrogateescape`. Of several ids with the same
bytes only the last has a string: the byte pieces that come first in a vocabulary are there for bytes without another.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fusejax.errors import InputError, nearest
from fusejax.types import Array

__all__ = ["GENERATIONS", "Generation", "Vocabulary", "generation_of", "literal_ids", "vocabulary_of_bytes"]

MARKER = "▁"


class Generation(NamedTuple):
    """What differs between the three published programs."""

    decoded: bool  # compares what tokens decode to, not the pieces
    containment: bool  # a string inside the other costs a tenth
    refill: bool  # compares unstripped strings where one is nothing but markers
    source_step_first: bool  # the order of ties after the diagonal
    next_token: bool  # fallbacks name the next token; the others name the current one (a defect)


GENERATIONS = {
    "fusellm": Generation(decoded=False, containment=False, refill=False, source_step_first=True, next_token=False),
    "fusechat_v1": Generation(decoded=False, containment=True, refill=False, source_step_first=True, next_token=False),
    "fusechat_v2": Generation(decoded=True, containment=False, refill=True, source_step_first=False, next_token=True),
}


class Vocabulary(NamedTuple):
    """The strings of one tokenizer, in id order."""

    pieces: Sequence[str | None]  # as the vocabulary spells them; None: no such id
    marker: str  # the character that begins a word
    decoded: Sequence[str | None] | None = None  # what each id decodes to alone; None: the same as `pieces`
    roles: Mapping[str, int] = {}  # ids of bos, eos, unk

    def strings(self, generation: Generation) -> Sequence[str | None]:
        """The strings that this generation's dynamic program compares."""
        return self.pieces if self.decoded is None or not generation.decoded else self.decoded


def generation_of(name: str) -> Generation:
    """Returns the entry of `GENERATIONS`; raises InputError for an unknown name."""
    if name not in GENERATIONS:
        raise InputError(f"unknown generation {name!r}.{nearest(name, GENERATIONS)} Known: {', '.join(GENERATIONS)}.")
    return GENERATIONS[name]


def vocabulary_of_bytes(token_bytes: Sequence[bytes | None], roles: Mapping[str, int]) -> Vocabulary:
    """Spells a vocabulary by the bytes of its tokens, the same way for every tokenizer.

    Args:
      token_bytes: the bytes of each id; None for special tokens.
      roles: ids of the special tokens by role; a document begins with bos, else with eos.

    Returns:
      The vocabulary; special tokens are spelled by their role, so that those of two tokenizers are equal strings,
      and the token that begins a document is "<bos>". Other tokens without bytes have no string.
    """
    pieces: list[str | None] = [
        None if surface is None else surface.decode("utf-8", "surrogateescape").replace(" ", MARKER)
        for surface in token_bytes
    ]
    last = {piece: index for index, piece in enumerate(pieces)}
    pieces = [piece if last[piece] == index else None for index, piece in enumerate(pieces)]
    for role in ("pad", "unk", "eos", "bos"):
        if role in roles:
            pieces[roles[role]] = f"<{role}>"
    if "bos" not in roles and "eos" in roles:
        pieces[roles["eos"]] = "<bos>"
    return Vocabulary(pieces, MARKER, None, dict(roles))


def literal_ids(source: Vocabulary, target: Vocabulary) -> Array:
    """The target token that is spelled like each source token, its marker replaced.

    Returns:
      [V_s] int32 target ids, -1 where the target has no such string.
    """
    ids: dict[str | None, int] = {}
    for index, piece in enumerate(target.pieces):
        ids.setdefault(piece, index)
    ids[None] = -1
    return np.array(
        [ids.get(piece and piece.replace(source.marker, target.marker), -1) for piece in source.pieces], np.int32
    )
