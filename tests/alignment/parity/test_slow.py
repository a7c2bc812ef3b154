"""FuseChat 1 and the tie-break by company on real tokenizers, against plain programs written from their description."""

import numpy as np
import pytest

from fusejax.alignment.parity import (
    PairCounter,
    StringAligner,
    Vocabulary,
    choose_fusechat_v1,
    literal_ids,
    min_ed_map,
)
from fusejax.alignment.parity.choose import FALLBACK
from fusejax.alignment.parity.min_ed import neighbour_counts
from fusejax.io.tokenizers import load_tokenizer
from tests.alignment.parity import slow
from tests.paths import DATA, needs_data

TEXTS = [
    "The unforgettable Benjamin Franklin (1706-1790) wrote: three may keep a secret.",
    "def evaluate(xs):\n    return [x ** 2 for x in xs if x % 3 == 0]\n",
    "Tokenization differs: preprocessing, antidisestablishmentarianism, naïve café.",
]
MARKER = "▁"


def _spelled(name: str) -> tuple[Vocabulary, list[np.ndarray]]:
    """The strings of a real tokenizer, blanks as markers, and the ids of the texts."""
    tokenizer = load_tokenizer(DATA / "tokenizers" / name)
    pieces = [None if b is None else b.decode("latin1").replace(" ", MARKER) for b in tokenizer.token_bytes]
    encoded = tokenizer.encode_batch(TEXTS, start=False, end=False)
    return Vocabulary(pieces, MARKER), [np.append(e.tokens, e.labels[-1:]) for e in encoded]


@needs_data
@pytest.mark.parametrize(("source", "target"), [("tinystories-spm-2048", "gpt2"), ("gpt2", "tinystories-spm-4096")])
def test_fusechat_1_aligns_and_chooses_as_described(source, target):
    (ours, sources), (theirs, targets) = _spelled(source), _spelled(target)
    aligner, counter = StringAligner(ours, theirs, generation="fusechat_v1"), PairCounter(len(ours.pieces))
    kinds, wanted_counts = set(), {}
    warps = [aligner(s, t) for s, t in zip(sources, targets, strict=True)]
    for found, s, t in zip(warps, sources, targets, strict=True):
        counter.add(found, s, t)
    counts = counter.counts()
    for found, s, t in zip(warps, sources, targets, strict=True):
        strings = [[v.pieces[i] or "" for i in ids] for v, ids in ((ours, s), (theirs, t))]
        beside = slow.fusechat_v1_path(*strings, MARKER)
        assert [list(range(a, b + 1)) for a, b in zip(found.first, found.last, strict=True)] == beside
        for own, positions in zip(t.tolist(), beside, strict=True):
            for other in {int(s[j]) for j in positions}:
                wanted_counts[own, other] = wanted_counts.get((own, other), 0) + 1
        choice = choose_fusechat_v1(found, s, t, ours, theirs, counts)
        for index, wanted in enumerate(slow.fusechat_v1_choice(beside, *strings)):
            kinds.add(wanted[0])
            if wanted[0] == "mix":
                assert choice.mixed[index][0] == wanted[1]
            else:
                assert index not in choice.mixed
                assert choice.source[index] == (wanted[1] if wanted[0] == "one" else FALLBACK)
    triples = zip(counts.target.tolist(), counts.source.tolist(), counts.count.tolist(), strict=True)
    assert {(a, b): n for a, b, n in triples} == wanted_counts
    assert {"one", "fallback"} <= kinds


@needs_data
def test_ties_go_to_the_candidate_in_like_company():
    (ours, sources), (theirs, targets) = _spelled("tinystories-spm-2048"), _spelled("gpt2")
    keep = sorted({int(i) for ids in targets for i in ids} | set(range(300, 1500)))
    theirs = theirs._replace(pieces=[p if i in set(keep) else None for i, p in enumerate(theirs.pieces)])
    used = sorted({int(i) for ids in sources for i in ids})
    ours = ours._replace(pieces=[p if i in set(used) else None for i, p in enumerate(ours.pieces)])
    shared = literal_ids(ours, theirs)
    named = np.full(len(theirs.pieces), -1, np.int32)
    named[shared[shared >= 0]] = shared[shared >= 0]
    table = min_ed_map(ours, theirs, neighbours=(neighbour_counts(sources, shared), neighbour_counts(targets, named)))
    strings = [theirs.pieces[i] for i in np.unique(shared[shared >= 0])]
    texts = [[[v.pieces[i] for i in ids] for ids in rows] for v, rows in ((ours, sources), (theirs, targets))]
    mine, others = (slow.company(rows, set(strings)) for rows in texts)
    decided = 0
    for index in used:
        key = ours.pieces[index]
        if shared[index] >= 0 or key is None:
            continue
        distance = {i: slow.levenshtein(key, theirs.pieces[i]) for i in keep if theirs.pieces[i] is not None}
        least = min(distance.values())
        tied = [theirs.pieces[i] for i in sorted(distance) if distance[i] == least]
        assert theirs.pieces[table[index]] == slow.best_company(key, tied, mine, others)
        decided += len(tied) > 1
    assert decided > 3
