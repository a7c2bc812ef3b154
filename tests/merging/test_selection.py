"""The exact selection of the k largest elements."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.merging.selection import count_of_fraction, largest_mask
from tests.merging.oracle import select

masks = jax.jit(largest_mask)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1e-40, 1e-30, 0.5, 1.0, 1.0000001, 3.0, 1e30]), min_size=24, max_size=24),
    st.integers(0, 30),
)
def test_equals_a_stable_sort(values, count):
    values = np.asarray(values, np.float32).reshape(2, 3, 4)
    mask = np.asarray(masks(values, count))
    assert mask.sum() == min(count, 24)
    np.testing.assert_array_equal(mask, select(np.abs(values), min(count, 24)))


def test_ties_are_won_by_the_lowest_flat_index():
    mask = masks(jnp.ones((3, 4)), 5)
    np.testing.assert_array_equal(mask.ravel(), np.arange(12) < 5)


def test_works_under_vmap_with_a_count_per_row():
    values = np.random.default_rng(0).integers(0, 9, (5, 7, 3)).astype(np.float32)
    counts = np.array([0, 1, 10, 20, 21], np.int32)
    mask = jax.jit(jax.vmap(largest_mask))(values, counts)
    for row in range(5):
        np.testing.assert_array_equal(mask[row], select(values[row], counts[row]))


@pytest.mark.parametrize(
    ("fraction", "total", "expected"),
    [(0.1, 30, 3), (0.3, 10, 3), (0.29, 100, 29), (1.0, 7, 7), (0.0, 9, 0), (0.1, 2**31 - 1, 214748364), (1 / 3, 9, 3)],
)
def test_counts_are_exact(fraction, total, expected):
    assert int(jax.jit(lambda n: count_of_fraction(fraction, n))(jnp.int32(total))) == expected
