"""Vocabulary maps, the rules of the three generations, and what the mended mode does otherwise."""

from typing import NamedTuple

import numpy as np
import pytest

from fusejax.alignment.parity import (
    PairCounter,
    PairCounts,
    StringAligner,
    Vocabulary,
    Warp,
    aligned_logits,
    aligned_topk,
    choose_exact,
    choose_fusechat,
    choose_fusechat_v1,
    choose_fusellm,
    literal_ids,
    min_ed_map,
    neighbour_counts,
    statistics_map,
    vocabulary_of_bytes,
)
from fusejax.alignment.parity.choose import FALLBACK, Choice
from fusejax.alignment.parity.transform import ONE_HOT
from fusejax.alignment.report import ALIGNED, DROPPED
from fusejax.io.maps import kept_map
from fusejax.types import TopK, VocabMap

SOURCE = Vocabulary(["Ġcat", "Ġca", "t", "Ġdogs", "x"], "Ġ")
TARGET = Vocabulary(["▁cat", "▁dog", "t", "s", "▁"], "▁")


def beside(*ranges: tuple[int, int]) -> Warp:
    first, last = np.array(ranges, np.int32).T
    return Warp(first, last, 0)


def sparse(rows: list[list[tuple[int, float]]], entries: int) -> TopK:
    ids, logprobs = np.full((len(rows), entries), -1, np.int32), np.full((len(rows), entries), -np.inf, np.float32)
    residual = np.zeros(len(rows), np.float32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = [token for token, _ in row]
        logprobs[i, : len(row)] = np.log([p for _, p in row])
        residual[i] = np.log(1 - sum(p for _, p in row))
    return TopK(ids, logprobs, residual)


def test_min_ed_takes_equal_strings_then_the_nearest_and_the_first_of_ties():
    assert literal_ids(SOURCE, TARGET).tolist() == [0, -1, 2, -1, -1]
    assert min_ed_map(SOURCE, TARGET, workers=1).tolist() == [0, 0, 2, 1, 2]


def test_company_breaks_ties():
    source = Vocabulary(["▁bat", "▁sea", "▁cave"], "▁")
    target = Vocabulary(["▁cat", "▁hat", "▁sea", "▁cave"], "▁")
    common = literal_ids(source, target)
    ours = neighbour_counts([np.array([2, 0, 2, 0])], common)
    theirs = neighbour_counts([np.array([0, 2, 0, 2]), np.array([1, 3, 1])], np.array([-1, -1, 2, 3], np.int32))
    assert min_ed_map(source, target, workers=1).tolist() == [0, 2, 3]
    assert min_ed_map(source, target, neighbours=(ours, theirs), workers=1).tolist() == [1, 2, 3]


def test_neighbours_are_counted_within_five_places():
    counts = neighbour_counts([np.arange(8)], np.array([0, -1, -1, -1, -1, -1, -1, 7], np.int32))
    rows = [dict(zip(counts.columns[a:b], counts.counts[a:b], strict=True)) for a, b in
            zip(counts.offsets, counts.offsets[1:], strict=False)]  # fmt: skip
    assert rows == [{}, {0: 1}, {0: 1, 7: 1}, {0: 1, 7: 1}, {0: 1, 7: 1}, {0: 1, 7: 1}, {7: 1}, {}]


def test_frequent_pairs_win_and_the_programs_sign_makes_them_lose():
    source = Vocabulary(["▁ab", "▁zz"], "▁", None, {})
    target = Vocabulary(["▁ax", "▁ay", "▁unk"], "▁", None, {"unk": 2})
    counts = PairCounts(np.array([0, 1]), np.array([0, 0]), np.array([1, 9]))
    assert statistics_map(counts, source, target).tolist() == [1, -1]
    assert statistics_map(counts, source, target, reference_bugs=True).tolist() == [0, 2]
    counts = PairCounts(np.array([0, 1]), np.array([0, 0]), np.array([900, 1000]))
    assert statistics_map(counts, source, target).tolist() == [1, -1]


def test_pairs_are_counted_once_per_position():
    counter = PairCounter(5)
    counter.add(beside((0, 1), (2, 2), (2, 3)), np.array([4, 4, 1, 2]), np.array([7, 7, 8]))
    counter.add(beside((0, 0)), np.array([4]), np.array([7]))
    counts = counter.counts()
    assert list(zip(counts.target, counts.source, counts.count, strict=True)) == [
        (7, 1, 1), (7, 4, 2), (8, 1, 1), (8, 2, 1)
    ]  # fmt: skip
    assert counts.of(8, np.array([1, 2, 3])).tolist() == [1, 1, 0]
    assert counts.of(9, np.array([1])).tolist() == [0]


def test_fusellm_accepts_one_to_one_matches():
    table = min_ed_map(SOURCE, TARGET, workers=1)
    source_ids, target_ids = np.array([0, 1, 2, 3, 3]), np.array([0, 0, 1, 3])
    found = beside((0, 0), (1, 2), (3, 3), (4, 4))
    soft = choose_fusellm(found, source_ids, target_ids, SOURCE, TARGET, table)
    assert soft.source.tolist() == [0, FALLBACK, 3, FALLBACK]
    hard = choose_fusellm(found, source_ids, target_ids, SOURCE, TARGET, literal_ids(SOURCE, TARGET))
    assert hard.source.tolist() == [0, FALLBACK, FALLBACK, FALLBACK]


def test_a_text_may_begin_without_its_word_start():
    source = Vocabulary(["cat", "Ġcat"], "Ġ")
    found = beside((0, 0))
    args = (found, np.array([0]), np.array([0]), source, TARGET, np.array([2, 0], np.int32))
    assert choose_fusellm(*args).source.tolist() == [FALLBACK]
    assert choose_fusellm(*args, text_start=0).source.tolist() == [0]


def test_fusechat_rules():
    source = Vocabulary(["Ġca", "t", "Ġun", "der", "q"], "Ġ", [" ca", "t", " un", "der", "q"])
    target = Vocabulary(["▁cat", "▁under", "▁zebra"], "▁", ["cat", "under", "zebra"])
    ids, wanted = np.array([0, 1, 2, 3, 4, 4]), np.array([0, 1, 2])
    choice = choose_fusechat(beside((0, 1), (2, 3), (4, 5)), ids, wanted, source, target)
    assert choice.source.tolist() == [1, 3, FALLBACK]
    one = choose_fusechat(beside((1, 1)), ids, np.array([0]), source, target)
    assert one.source.tolist() == [1]
    exact = choose_exact(beside((1, 1), (0, 0)), ids, np.array([0, 0]), source, target)
    assert exact.source.tolist() == [FALLBACK, FALLBACK]


def test_fusechat_v1_mixes_the_pieces_that_cover_a_token():
    source = Vocabulary(["Ġun", "der", "q"], "Ġ")
    target = Vocabulary(["▁under", "▁un", "der", "q"], "▁")
    counts = PairCounts(np.array([0, 0]), np.array([0, 1]), np.array([1, 3]))
    choice = choose_fusechat_v1(beside((0, 1), (2, 2)), np.array([0, 1, 2]), np.array([0, 3]), source, target, counts)
    assert choice.mixed == {0: ([0, 1], [1, 3])}
    table = np.array([1, 2, 3], np.int32)
    dist = sparse([[(0, 0.5), (1, 0.25)], [(1, 0.5), (2, 0.25)], [(2, 1 - 1e-6)]], 2)
    moved, status = aligned_topk(dist, choice, table, np.array([3, 3]), max_entries=2)
    found = dict(zip(moved.ids[0].tolist(), np.exp(moved.logprobs[0]).tolist(), strict=True))
    assert found == pytest.approx({2: 0.25 * 0.25 + 0.75 * 0.5, 3: 0.75 * 0.25})
    assert np.exp(moved.logprobs[0]).sum() + np.exp(moved.residual_logprob[0]) == pytest.approx(1)
    assert status.tolist() == [ALIGNED, ALIGNED]
    logits = np.array([[2.0, 1.0], [4.0, 0.0], [1.0, 0.5]])
    ids, values = aligned_logits(np.array([[0, 1], [1, 2], [2, 0]]), logits, choice, table, np.array([0, 3]),
                                 generation="fusechat_v1")  # fmt: skip
    low, high = np.exp([1.0, 3.0]) / np.exp([1.0, 3.0]).sum()
    assert dict(zip(ids[0], values[0], strict=True)) == pytest.approx({1: 2 * low, 2: 4 * high, 3: 0.0})
    assert (ids[1], values[1]) == ([3, 1], [1.0, 0.5])


def test_mended_distributions_sum_and_supervise_the_next_token():
    table, labels = np.array([0, 0, 2, -1], np.int32), np.array([5, 6, 7])
    dist = sparse([[(0, 0.4), (1, 0.3), (3, 0.1), (2, 0.1)], [(3, 0.9)]], 4)
    choice = choose_fusellm(
        beside((0, 0), (0, 1), (1, 1)), np.array([0, 3]), np.array([0, 0, 1]),
        Vocabulary(["a", "b", "c", "d"], "▁"), Vocabulary(["a", "d", "c"], "▁"), table, literal=table,
    )  # fmt: skip
    assert choice.source.tolist() == [0, FALLBACK, FALLBACK]
    choice.source[2] = 1
    moved, status = aligned_topk(dist, choice, table, labels)
    assert moved.ids.tolist() == [[0, 2, -1, -1], [6, -1, -1, -1], [-1] * 4]
    np.testing.assert_allclose(np.exp(moved.logprobs[0, :2]), [0.7, 0.1], rtol=1e-6)
    np.testing.assert_allclose(np.exp(moved.residual_logprob), [0.2, 0.0, 1.0], atol=1e-6)
    assert status.tolist() == [ALIGNED, ONE_HOT, DROPPED]
    ids, logits = aligned_logits(dist.ids, np.array([[4.0, 3, 2, 1], [1.0, 0, 0, 0]]), choice, table,
                                 np.array([0, 1, 1]), generation="fusellm")  # fmt: skip
    assert ids[:2] == [[0, 2], [1]] and logits[:2] == [[4.0, 1.0], [1.0]]


def test_bytes_spell_every_tokenizer_alike():
    byte_level = vocabulary_of_bytes([b" the", b"\xe2\x80", b"\n", None], {"eos": 3})
    pieces = vocabulary_of_bytes([None, None, b"\n", b"A", b" the", b"A"], {"bos": 0, "eos": 1})
    assert byte_level.pieces[0] == pieces.pieces[4] == "▁the"
    assert byte_level.pieces[3] == pieces.pieces[0] == "<bos>"
    assert pieces.pieces[3] is None and pieces.pieces[5] == "A"
    assert literal_ids(byte_level, pieces).tolist() == [4, -1, 2, 0]
    assert StringAligner(byte_level, pieces)(np.array([3, 0, 2]), np.array([0, 4, 2])).cost == 0


class Named(NamedTuple):
    fingerprint: str
    special_roles: dict
    token_bytes: tuple = ()

    def encode_continuation(self, fragments, /):
        raise NotImplementedError


def test_maps_are_kept_by_tokenizers(tmp_path):
    made = []

    def make() -> VocabMap:
        made.append(1)
        return VocabMap(np.array([0, -1], np.int32), np.array([0], np.int32))

    def kept(a, b, directory="maps", **options):
        options = {"worth_seconds": 0.0} | options
        return kept_map("min_ed", a, b, make, directory=tmp_path / directory, **options)

    a, b = Named("a", {}), Named("b", {})
    assert kept(a, b, worth_seconds=60.0).symbol_of_source.tolist() == [0, -1]
    assert not (tmp_path / "maps").exists()
    first, again = kept(a, b), kept(a, b)
    assert len(made) == 2 and again.symbol_of_source.tolist() == first.symbol_of_source.tolist() == [0, -1]
    (file,) = (tmp_path / "maps").iterdir()
    file.write_bytes(file.read_bytes()[:50])
    kept(a, b), kept(b, a), kept(a, b._replace(special_roles={"eos": 1}))
    assert len(made) == 5
    (tmp_path / "file").write_text("")
    kept(a, b, "file/maps")
    assert len(made) == 6


def test_the_last_of_several_target_tokens_has_the_source_tokens_distribution():
    source, target = Vocabulary(["▁hello", "!"], "▁"), Vocabulary(["▁hel", "lo", "!", "la"], "▁")
    table = literal_ids(source, target)
    for last, expected in ((1, 0), (3, FALLBACK)):
        found = beside((0, 0), (0, 0), (1, 1))
        args = found, np.array([0, 1]), np.array([0, last, 2]), source, target, table
        assert choose_fusellm(*args).source.tolist() == [FALLBACK, expected, 1]
        assert choose_fusellm(*args, reference_bugs=True).source.tolist() == [FALLBACK, FALLBACK, 1]


def test_the_released_programs_keep_the_first_of_entries_that_meet():
    table = np.array([0, 0, 2], np.int32)
    dist = sparse([[(0, 0.4), (1, 0.3), (2, 0.1)]], 3)
    choice = Choice(np.array([0], np.int32), {})
    moved, _ = aligned_topk(dist, choice, table, np.array([5]), reference_bugs=True)
    assert moved.ids.tolist() == [[0, 2, -1]]
    np.testing.assert_allclose(np.exp(moved.logprobs[0, :2]), [0.4, 0.1], rtol=1e-6)
    np.testing.assert_allclose(np.exp(moved.residual_logprob), [0.5], rtol=1e-5)
