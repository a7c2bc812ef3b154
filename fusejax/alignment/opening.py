"""The opening of a document, where one side has a dummy space in front of the text and the other has not.

Sentencepiece puts a blank before the first word, byte-level BPE does not: at byte 0 one side's next token is
" The", the other's "The". Both predict the same text, but the symbols of the two tokens differ, at the first
position of every document; a chat template does the same at the start of a turn (`: Yes` or a line end). There the
source's tokens are named by what they say about the text: without the blank
that the target does not have, or behind the blank that the target has in front of it.

Which side has one is read off each document (a text that begins with a space may get none): the next token of the
last position at that byte is one byte longer than what it covers.

Not done here: vocabulary maps other than the coarse alphabet.
"""

from collections.abc import Sequence

import numpy as np

from fusejax.alignment.vocabulary import ByteVocabulary, symbols_of_bytes
from fusejax.types import Array, VocabMap

__all__ = ["Opening"]


class Opening:
    """Names the source's tokens at a document's first aligned position; one per pair of tokenizers.

    Args:
      source: the tokenizer whose distributions are moved, V_s ids.
      target: the tokenizer that receives them.
      vocab_map: their coarse alphabet.
    """

    def __init__(self, source: ByteVocabulary, target: ByteVocabulary, vocab_map: VocabMap) -> None:
        self._source, self._target, self._map = source, target, vocab_map
        self._tables: dict[bool, Array] = {}

    def __call__(
        self,
        source_labels: Array,
        source_ends: Array,
        target_labels: Array,
        target_ends: Array,
        source_index: Array,
        *,
        begins: Sequence[int] = (0,),
    ) -> list[tuple[int, Array]]:
        """Finds the positions of one document whose symbols differ from the map.

        Args:
          source_labels, source_ends: [T_s] true next tokens and byte ends of the source.
          target_labels, target_ends: [T] likewise of the target.
          source_index: [T] int32, the aligned source positions, -1: none.
          begins: the byte ends at which text begins.

        Returns:
          (target position, symbol_of_source [V_s] int32 to use there) of each.
        """
        found = []
        for row in (np.searchsorted(target_ends, begins, side="right") - 1).tolist():
            if row < 0 or source_index[row] < 0:
                continue
            ours = _dummy(self._target.token_bytes, target_labels, target_ends, row)
            theirs = _dummy(self._source.token_bytes, source_labels, source_ends, int(source_index[row]))
            if ours is theirs:
                continue
            if theirs not in self._tables:
                self._tables[theirs] = self._table(strip=theirs)
            found.append((row, self._tables[theirs]))
        return found

    def _table(self, *, strip: bool) -> Array:
        """Symbols [V_s] of the source's tokens without their blank (of those that have one), or behind a blank."""
        renamed = [_renamed(surface, strip=strip) for surface in self._source.token_bytes]
        used = [index for index, surface in enumerate(renamed) if surface]
        table = np.full(len(renamed), -1, np.int32)
        table[used] = symbols_of_bytes([renamed[i] or b"" for i in used], self._source, self._target, self._map)
        special = [index for index, surface in enumerate(self._source.token_bytes) if surface is None]
        table[special] = self._map.symbol_of_source[special]
        return table


def _renamed(surface: bytes | None, *, strip: bool) -> bytes | None:
    if not surface or not strip:
        return b" " + surface if surface else None
    return surface[1:] if surface.startswith(b" ") else None


def _dummy(token_bytes: Sequence[bytes | None], labels: Array, ends: Array, row: int) -> bool:
    """Whether the token that follows position `row` begins with a blank that covers no byte."""
    surface = token_bytes[labels[row]]
    if not surface or row + 1 >= len(ends) or not surface.startswith(b" "):
        return False
    return len(surface) - int(ends[row + 1] - ends[row]) == 1
