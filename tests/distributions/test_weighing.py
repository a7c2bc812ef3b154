"""Scores of sources: bits per byte over windows against a per-byte oracle."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusejax.distributions.weighing import (
    choose_min,
    softmin_weights,
    window_bits_per_byte,
    window_of_bytes,
)


def _oracle(ends, realised, n_bytes, window):
    """Spreads each token's bits over its bytes, one byte at a time."""
    width = n_bytes if window is None else window
    count = -(-n_bytes // width)
    bits, size = np.zeros(count), np.zeros(count)
    for byte in range(n_bytes):
        size[byte // width] += 1
    stops = [*ends[1:], n_bytes]
    for start, stop, logprob in zip(ends, stops, realised, strict=True):
        if stop == start:
            bits[min(start // width, count - 1)] -= logprob / np.log(2)
        for byte in range(start, stop):
            bits[byte // width] -= logprob / np.log(2) / (stop - start)
    return bits / size


@st.composite
def _documents(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(lambda x: sum(x) > 0))
    ends = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    realised = -np.array(draw(st.lists(st.floats(0, 20), min_size=len(ends), max_size=len(ends))))
    return ends, realised, int(sum(lengths))


@given(_documents(), st.one_of(st.none(), st.integers(1, 40)))
def test_windows_equal_the_oracle(document, window):
    ends, realised, n_bytes = document
    got = window_bits_per_byte(ends, realised, n_bytes, window_bytes=window)
    np.testing.assert_allclose(got, _oracle(ends, realised, n_bytes, window), atol=1e-9)


def test_a_document_without_start_token_leaves_its_first_bytes_out():
    got = window_bits_per_byte(np.array([4, 6]), np.log([0.5, 0.25]), 8, window_bytes=4)
    np.testing.assert_allclose(got, [0.0, 3 / 4])


def test_windows_of_positions():
    assert window_of_bytes(np.array([0, 3, 4, 8, 10]), 10, window_bytes=4).tolist() == [0, 0, 1, 2, 2]
    assert window_of_bytes(np.array([0, 3]), 10, window_bytes=None).tolist() == [0, 0]
    assert window_of_bytes(np.array([0]), 0, window_bytes=4).tolist() == [0]


def test_nan_never_wins_and_ties_go_to_the_first():
    scores = np.array([[np.nan, 1.0, 2.0], [5.0, 1.0, 1.0]])
    assert choose_min(scores).tolist() == [1, 0, 1]


def test_softmin_weights():
    weights = softmin_weights(np.array([[1.0, np.nan, np.nan], [1.0, 3.0, np.nan]]), temperature=0.5)
    np.testing.assert_allclose(weights, [[0.5, 0, 0], [0.5, 1, 0]])
    cold = softmin_weights(np.array([[1.0], [2.0]]), temperature=0.1)
    assert cold[0, 0] == pytest.approx(1 / (1 + np.exp(-10)))
