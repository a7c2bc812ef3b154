"""The block-wise dynamic program finds the plain one's path, ties included."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.alignment.parity import StringAligner, Vocabulary, warp
from fusejax.alignment.parity import costs as costs_module
from fusejax.alignment.parity.costs import PairCosts, distances, token_costs
from fusejax.alignment.parity.spelling import GENERATIONS
from fusejax.errors import InputError
from tests.alignment.parity import reference

TEXTS = st.text(alphabet="ab▁Ġé", max_size=4)


def ranges(found) -> list[list[int]]:
    return [list(range(a, b + 1)) for a, b in zip(found.first.tolist(), found.last.tolist(), strict=True)]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 4), st.booleans(), st.integers(0, 2**31))
def test_path_is_the_plain_programs(n, m, largest, source_step_first, seed):
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, largest + 1, (7, 5)).astype(np.uint8)
    rows, columns = rng.integers(0, 7, n), rng.integers(0, 5, m)
    found = warp(costs, rows, columns, source_step_first=source_step_first)
    beside, cost = reference.align(costs[rows][:, columns].tolist(), source_step_first=source_step_first)
    assert ranges(found) == beside
    assert found.cost == cost
    cells = found.path()
    assert cells[0] == (0, 0) and cells[-1] == (n - 1, m - 1)
    steps = {(c - a, d - b) for (a, b), (c, d) in pairwise(cells)}
    assert steps <= {(0, 1), (1, 0), (1, 1)}


def test_an_empty_side_is_refused():
    with pytest.raises(InputError, match="at least one"):
        warp(np.zeros((1, 1), np.uint8), np.zeros(0, int), np.zeros(3, int), source_step_first=True)


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


@settings(deadline=None, max_examples=40)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(TEXTS, min_size=1, max_size=4))
def test_costs_of_the_generations(source, target):
    for name, generation in GENERATIONS.items():
        found = token_costs(source, target, source_marker="Ġ", target_marker="▁", generation=generation)
        for i, s in enumerate(source):
            for j, t in enumerate(target):
                a, b = s.replace("Ġ", ""), t.replace("▁", "")
                if name == "fusechat_v2" and not (a and b):
                    a, b = s.replace("Ġ", "▁"), t
                wanted = levenshtein(a, b)
                if name == "fusechat_v1":
                    wanted *= 1 if a in b or b in a else 10
                assert found[i, j] == wanted, (name, s, t)


def test_long_strings_do_not_wrap():
    assert distances(["a" * 300], ["b" * 300])[0, 0] == 300


@pytest.mark.parametrize("kept", [6, 4096])
def test_costs_are_kept_and_made_anew(kept, monkeypatch):
    monkeypatch.setattr(costs_module, "KEPT", kept)
    rng = np.random.default_rng(0)
    names = [f"t{i}" * (i % 3 + 1) for i in range(20)]
    pair = PairCosts(Vocabulary(names, "▁"), Vocabulary(names[::-1], "▁"), generation=GENERATIONS["fusellm"])
    for _ in range(8):
        ids = rng.integers(0, 20, 5), rng.integers(0, 20, 6)
        costs, rows, columns = pair(*ids)
        wanted = distances([names[i] for i in ids[0]], [names[19 - j] for j in ids[1]])
        np.testing.assert_array_equal(costs[rows][:, columns], wanted)


def test_identical_sequences_align_one_to_one():
    vocabulary = Vocabulary(["▁one", "▁two", "three", "<0x0A>"], "▁")
    ids = np.array([0, 1, 2, 3, 3, 0, 2])
    for generation in GENERATIONS:
        found = StringAligner(vocabulary, vocabulary, generation=generation)(ids, ids)
        assert found.cost == 0
        assert ranges(found) == [[i] for i in range(len(ids))]


def test_unknown_generation():
    with pytest.raises(InputError, match="fusechat_v2"):
        StringAligner(Vocabulary(["a"], "▁"), Vocabulary(["a"], "▁"), generation="fusechat_v3")
