"""Which source distribution each target position receives: the papers' rules for 1-1, 1-n and n-1 matches.

Given the source positions J beside target position i (whose own token is b):

* FuseLLM: one source token, accepted if its string, mapped, is b. Several: fallback. Of several target tokens that
  together spell one source token, the last has read what it says and receives its distribution; the program gives
  them all the fallback (`reference_bugs`).
* FuseChat 1: one, accepted if it contains b. Several: the piece that equals b, else one that contains it, else the
  mixture of the pieces that cover b from left to right.
* FuseChat 2, on decoded strings: one, accepted if either ends with the other. Several: the first such piece, else
  the last of the pieces that cover b. (The program has one more case, all pieces together end like b, which cannot
  occur: then the last piece does.)

Not accepted is a *fallback*: all mass on one token. Several target positions beside one source token (n-1) are
1-1 matches that seldom pass otherwise; FuseChat's tests on the ends of strings let the last one pass.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fusejax.alignment.parity.dtw import Warp
from fusejax.alignment.parity.spelling import Vocabulary, literal_ids
from fusejax.alignment.parity.statistics import PairCounts
from fusejax.types import Array

__all__ = ["FALLBACK", "Choice", "choose_exact", "choose_fusechat", "choose_fusechat_v1", "choose_fusellm"]

FALLBACK = -1


class Choice(NamedTuple):
    """What each target position receives."""

    source: Array  # [T] int32, a source position or FALLBACK
    mixed: dict[int, tuple[list[int], list[int]]]  # FuseChat 1: target position -> source positions, their counts


def choose_fusellm(
    warp: Warp, source_ids: Array, target_ids: Array, source: Vocabulary, target: Vocabulary, table: Array,
    *, literal: Array | None = None, text_start: int | None = None, reference_bugs: bool = False,
) -> Choice:  # fmt: skip
    """FuseLLM's rule; with `table = literal` it is exact match ("hard"), with `min_ed_map` the soft one.

    Args:
      warp: the alignment of `source_ids [n]` and `target_ids [T]`.
      source, target: the vocabularies; table: [V_s] int32, the vocabulary map.
      literal: [V_s] int32, `literal_ids` of the vocabularies, where it is known.
      text_start: target position of the text's first token, where the target writes a word start that the source
        leaves out; None: no such rule.
      reference_bugs: the last of several target tokens that spell a source token gets the fallback too.

    Returns:
      The choice; no position is empty or mixed.
    """
    same = literal_ids(source, target) if literal is None else literal
    source_ids, target_ids = np.asarray(source_ids), np.asarray(target_ids)
    read = source_ids[warp.first]
    accepted = (same[read] == target_ids) | (table[read] == target_ids)
    if text_start is not None and warp.first[text_start] == warp.last[text_start]:
        begun = _word_begun(source.pieces[read[text_start]] or "", target_ids[text_start], source, target, table)
        accepted[text_start] = accepted[text_start] if begun is None else begun
    if not reference_bugs:
        accepted = accepted | _spelling_last(warp, source_ids, target_ids, source, target)
    return Choice(np.where(accepted & (warp.first == warp.last), warp.first, FALLBACK).astype(np.int32), {})


def _spelling_last(warp: Warp, source_ids: Array, target_ids: Array, source: Vocabulary, target: Vocabulary) -> Array:
    """The last of several target positions beside one source token whose strings together are its string, [T] bool."""
    found = np.zeros(len(target_ids), bool)
    alone = warp.first == warp.last
    shared = alone[:-1] & alone[1:] & (warp.first[:-1] == warp.first[1:])  # with the next position
    starts = np.flatnonzero(shared & ~np.concatenate([[False], shared[:-1]])) if len(shared) else []
    for start in starts:
        stop = start + 1
        while stop < len(shared) and shared[stop]:
            stop += 1
        spelled = "".join(target.pieces[index] or "" for index in target_ids[start : stop + 1])
        wanted = (source.pieces[source_ids[warp.first[start]]] or "").replace(source.marker, "")
        found[stop] = bool(wanted) and spelled.replace(target.marker, "") == wanted
    return found


def choose_exact(
    warp: Warp, source_ids: Array, target_ids: Array, source: Vocabulary, target: Vocabulary
) -> Choice:  # fmt: skip
    """FuseChat 2's exact match: one source token that decodes to the same string (arguments as `choose_fusellm`)."""
    ours, theirs = _decoded(source, target)
    pairs = zip(np.asarray(source_ids)[warp.first].tolist(), np.asarray(target_ids).tolist(), strict=True)
    accepted = np.array([ours(u) == theirs(v) for u, v in pairs], bool)
    return Choice(np.where(accepted & (warp.first == warp.last), warp.first, FALLBACK).astype(np.int32), {})


def choose_fusechat(
    warp: Warp, source_ids: Array, target_ids: Array, source: Vocabulary, target: Vocabulary
) -> Choice:  # fmt: skip
    """FuseChat 2's rule (arguments as `choose_fusellm`)."""
    ours, theirs = _decoded(source, target)
    source_list, target_list = np.asarray(source_ids).tolist(), np.asarray(target_ids).tolist()

    @lru_cache(maxsize=1 << 16)
    def several(pieces: tuple[int, ...], own: int) -> int:
        strings = [ours(piece).replace(target.marker, "") for piece in pieces]
        wanted = theirs(own).replace(target.marker, "")
        return _one_of_several(strings, wanted)

    @lru_cache(maxsize=1 << 16)
    def one(piece: int, own: int) -> bool:
        return _suffix(ours(piece), theirs(own))

    chosen = []
    for own, first, last in zip(target_list, warp.first.tolist(), warp.last.tolist(), strict=True):
        if first == last:
            chosen.append(first if one(source_list[first], own) else FALLBACK)
        else:
            found = several(tuple(source_list[first : last + 1]), own)
            chosen.append(first + found if found >= 0 else found)
    return Choice(np.array(chosen, np.int32), {})


def choose_fusechat_v1(
    warp: Warp, source_ids: Array, target_ids: Array, source: Vocabulary, target: Vocabulary, counts: PairCounts
) -> Choice:
    """FuseChat 1's rule (arguments as `choose_fusellm`; `counts` weigh the pieces of a mixture)."""
    source_list, target_list = np.asarray(source_ids).tolist(), np.asarray(target_ids).tolist()
    chosen, mixed = [], {}
    for index, (own, first, last) in enumerate(zip(target_list, warp.first.tolist(), warp.last.tolist(), strict=True)):
        wanted = target.pieces[own] or ""
        beside = source_list[first : last + 1]
        strings = [(source.pieces[piece] or "").replace(source.marker, target.marker) for piece in beside]
        several = first != last
        equal = [k for k, text in enumerate(strings) if several and text == wanted]
        found = next(iter(equal + [k for k, text in enumerate(strings) if wanted in text]), FALLBACK)
        covered = _cover(strings, wanted) if found < 0 and several else []
        if covered:
            numbers = counts.of(own, np.array([beside[k] for k in covered]))
            mixed[index] = ([first + k for k in covered], numbers.tolist())
            found = covered[-1]
        chosen.append(first + found if found >= 0 else FALLBACK)
    return Choice(np.array(chosen, np.int32), mixed)


def _word_begun(piece: str, own: int, source: Vocabulary, target: Vocabulary, table: Array) -> bool | None:
    """Whether the source's first token matches once its missing word start is written; None: it has one."""
    string, wanted = piece.replace(source.marker, target.marker), target.pieces[own] or ""
    if not wanted.startswith(target.marker) or string.startswith(target.marker):
        return None
    string = target.marker + string
    if string == wanted:
        return True
    spelled = source.marker + piece
    return any(table[index] == own for index, other in enumerate(source.pieces) if other == spelled)


def _decoded(source: Vocabulary, target: Vocabulary) -> tuple[Callable[[int], str], Callable[[int], str]]:
    """What ids decode to, the source's with the target's marker; made as they are asked for."""
    ours = source.pieces if source.decoded is None else source.decoded
    theirs = target.pieces if target.decoded is None else target.decoded
    return lambda piece: (ours[piece] or "").replace(source.marker, target.marker), lambda own: theirs[own] or ""


def _suffix(a: str, b: str) -> bool:
    return a.endswith(b) or b.endswith(a)


def _one_of_several(strings: Sequence[str], wanted: str) -> int:
    found = next((index for index, text in enumerate(strings) if _suffix(text, wanted)), None)
    if found is not None:
        return found
    covered = _cover(strings, wanted)
    return covered[-1] if covered else FALLBACK


def _cover(strings: Sequence[str], wanted: str) -> list[int]:
    """The pieces that, taken from left to right where they fit, spell `wanted`; empty if they do not."""
    rest, covered = wanted, []
    for index, text in enumerate(strings):
        if rest.startswith(text):
            rest = rest[len(text) :]
            covered.append(index)
    return covered if not rest else []
