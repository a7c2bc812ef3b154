"""A closer look at an alignment: how coarse its symbols are in use, and which tokens contradict each other.

`report` holds sums that add up over documents and processes; what is here needs all documents of a comparison at
once and is meant for people: group sizes as a histogram, the heaviest groups, the most frequent disagreements.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from fusejax.alignment.report import true_symbols
from fusejax.alignment.vocabulary import ByteVocabulary
from fusejax.types import Array, VocabMap

__all__ = ["SIZES", "alignment_details"]

SIZES = (1, 4, 16, 64, 256)  # upper ends of the classes of group sizes; one more class above the last
SHOWN = 20


class _Encoded(Protocol):
    @property
    def labels(self) -> Array: ...

    @property
    def byte_ends(self) -> Array: ...


def alignment_details(
    sources: Sequence[_Encoded],
    targets: Sequence[_Encoded],
    indices: Sequence[Array],
    openings: Sequence[Sequence[tuple[int, Array]]],
    vocab_map: VocabMap,
    source: ByteVocabulary,
    target: ByteVocabulary,
) -> dict[str, Any]:
    """Counts group sizes and disagreements over documents.

    Args:
      sources, targets: the encoded documents.
      indices: [T] int32 per document, the aligned source positions, -1: none.
      openings: per document, from `Opening`.
      vocab_map: the symbols.
      source, target: the vocabularies, for the bytes of tokens.

    Returns:
      JSON values: `group_sizes` ({class: share of agreed positions whose true symbol has that many target tokens}),
      `larger_than_last` (that share for groups over SIZES[-1]), `mean_log2_members`, `largest_groups`,
      `disagreements` (the most frequent pairs of true tokens with different symbols).
    """
    of_target = np.asarray(vocab_map.symbol_of_target, np.int64)
    members = np.bincount(of_target[of_target >= 0], minlength=of_target.size)
    uses = np.zeros(of_target.size, np.int64)
    wrong: Counter[tuple[int, int]] = Counter()
    for theirs, ours, index, first in zip(sources, targets, indices, openings, strict=True):
        paired = np.flatnonzero(np.asarray(index) >= 0)
        said = true_symbols(theirs.labels, index, vocab_map, opening=first)[paired]
        labels = np.asarray(ours.labels)[paired]
        own = of_target[labels]
        agreed = (said == own) & (own >= 0)
        uses += np.bincount(own[agreed], minlength=uses.size)
        pairs = zip(np.asarray(theirs.labels)[index[paired[~agreed]]].tolist(), labels[~agreed].tolist(), strict=True)
        wrong.update(pairs)
    total = max(int(uses.sum()), 1)
    names = [
        *(f"{low + 1}-{high}" if low + 1 < high else f"{high}" for low, high in zip((0, *SIZES), SIZES, strict=False))
    ]
    names.append(f"over {SIZES[-1]}")
    classes = np.searchsorted(SIZES, np.maximum(members, 1), side="left")
    shares = np.bincount(classes, weights=uses, minlength=len(names)) / total
    heaviest = np.argsort(-members, kind="stable")[:SHOWN]
    return {
        "group_sizes": dict(zip(names, shares.tolist(), strict=True)),
        "larger_than_last": float(shares[-1]),
        "mean_log2_members": float((uses * np.log2(np.maximum(members, 1))).sum() / total),
        "largest_groups": [
            {"symbol": _shown(target, i), "members": int(members[i]), "share": uses[i] / total}
            for i in heaviest.tolist()
        ],
        "disagreements": [
            {
                "source": _shown(source, u),
                "target": _shown(target, v),
                "source_symbol": _shown(target, int(vocab_map.symbol_of_source[u])),
                "target_symbol": _shown(target, int(of_target[v])),
                "count": count,
            }
            for (u, v), count in wrong.most_common(SHOWN)
        ],
    }


def _shown(vocabulary: ByteVocabulary, index: int) -> str | None:
    """The bytes of a token as text that can be read; None: no symbol."""
    if index < 0:
        return None
    surface = vocabulary.token_bytes[index]
    if surface is None:
        return next((f"<{role}>" for role, i in vocabulary.special_roles.items() if i == index), f"<{index}>")
    return surface.decode("utf-8", "backslashreplace")
