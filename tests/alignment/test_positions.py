"""Positions are paired by the byte at which they end."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusejax.alignment import align_positions
from fusejax.errors import InputError
from tests.alignment.tiny_tokenizers import LOSSLESS, LOSSY, TEXT, tiny_tokenizer

NAMES = [*LOSSLESS, *LOSSY]
ends = st.lists(st.integers(0, 12), max_size=14).map(sorted)


def naive(source_ends, target_ends):
    """Runs of equal ends: one by one when equally long, else last with last."""
    result = [-1] * len(target_ends)
    for end in set(target_ends):
        theirs = [i for i, e in enumerate(source_ends) if e == end]
        ours = [i for i, e in enumerate(target_ends) if e == end]
        if len(theirs) == len(ours):
            for i, j in zip(ours, theirs, strict=True):
                result[i] = j
        elif theirs:
            result[ours[-1]] = theirs[-1]
    return result


@given(ends, ends)
def test_against_the_naive_definition(source_ends, target_ends):
    assert align_positions(np.array(source_ends, int), np.array(target_ends, int)).tolist() == naive(
        source_ends, target_ends
    )


@given(ends, ends)
def test_pairs_rise_and_end_at_the_same_byte(source_ends, target_ends):
    source_ends, target_ends = np.array(source_ends, int), np.array(target_ends, int)
    index = align_positions(source_ends, target_ends)
    paired = index >= 0
    assert index.dtype == np.int32 and index.shape == target_ends.shape
    assert (source_ends[index[paired]] == target_ends[paired]).all()
    assert (np.diff(index[paired]) > 0).all()


@given(ends)
def test_the_same_tokenizer_gives_the_identity(row):
    assert align_positions(np.array(row, int), np.array(row, int)).tolist() == list(range(len(row)))


@pytest.mark.parametrize("name", NAMES)
def test_identity_on_real_encodings(name):
    document = tiny_tokenizer(name).encode(TEXT)
    index = align_positions(document.byte_ends, document.byte_ends)
    assert index.tolist() == list(range(len(index)))


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_a_start_token_on_one_side_changes_nothing_else(source, target):
    theirs, ours = tiny_tokenizer(source).encode(TEXT), tiny_tokenizer(target).encode(TEXT)
    bare = tiny_tokenizer(source).encode(TEXT, start=False)
    with_start = align_positions(theirs.byte_ends, ours.byte_ends)
    without = align_positions(bare.byte_ends, ours.byte_ends)
    read = ours.byte_ends > 0
    np.testing.assert_array_equal(with_start[read], np.where(without[read] >= 0, without[read] + 1, -1))


def test_the_last_of_a_run_predicts_the_continuation():
    # start token and dummy space end at byte 0; only the dummy space predicts the first byte
    assert align_positions(np.array([0, 0, 3]), np.array([0, 2, 3])).tolist() == [1, -1, 2]
    assert align_positions(np.array([0, 3]), np.array([0, 0, 3])).tolist() == [-1, 0, 1]
    assert align_positions(np.array([]), np.array([0, 1])).tolist() == [-1, -1]


def test_ends_that_decrease_are_refused():
    with pytest.raises(InputError, match="target_ends"):
        align_positions(np.array([0, 1]), np.array([2, 1]))
    with pytest.raises(InputError, match="source_ends"):
        align_positions(np.zeros((2, 2)), np.array([2]))
