"""Vocabularies that differ: which tokens, which rows, and what stands in for a missing one."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.merging.vocabulary import align_rows, merge_vocabularies

VOCABULARIES = {
    "base": {"a": 0, "b": 1, "c": 2},
    "one": {"b": 0, "a": 1, "c": 2, "x": 3},
    "two": {"a": 0, "c": 1, "y": 2, "x": 3},
}
SIZES = {"base": 3, "one": 4, "two": 4}


def merged(**options):
    given = {"sizes": SIZES, "reference": "base"} | options
    return merge_vocabularies(VOCABULARIES, **given)


def test_base_keeps_the_reference():
    tokens, rows = merged()
    assert tokens == ("a", "b", "c")
    assert {name: row.tolist() for name, row in rows.items()} == {
        "base": [0, 1, 2], "one": [1, 0, 2], "two": [0, -1, 1]
    }  # fmt: skip


def test_union_adds_the_others_in_the_order_of_models_and_ids():
    tokens, rows = merged(union=True)
    assert tokens == ("a", "b", "c", "x", "y")
    assert rows["base"].tolist() == [0, 1, 2, -1, -1]
    assert rows["two"].tolist() == [0, -1, 1, 3, 2]


def test_padding_stays_or_follows_the_multiple():
    tokens, rows = merged(sizes=SIZES | {"base": 6})
    assert tokens == ("a", "b", "c", None, None, None)
    assert rows["base"].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows["one"].tolist() == [1, 0, 2, -1, -1, -1]
    tokens, rows = merged(sizes=SIZES | {"base": 6}, union=True)  # new tokens take padding rows first
    assert tokens == ("a", "b", "c", "x", "y", None)
    assert rows["base"].tolist() == [0, 1, 2, -1, -1, 5]
    assert len(merged(pad_to_multiple_of=8).tokens) == 8
    assert len(merged(sizes=SIZES | {"base": 6}, pad_to_multiple_of=1).tokens) == 3


def test_rows_that_are_missing():
    _, rows = merged(union=True, pad_to_multiple_of=8)
    matrices = {name: np.arange(2.0 * size, dtype=np.float32).reshape(size, 2) + 100 * j
                for j, (name, size) in enumerate(SIZES.items())}  # fmt: skip
    for kind in (np.asarray, jnp.asarray):
        given = {name: kind(x) for name, x in matrices.items()}
        by_base = align_rows(given, rows, default="base")
        assert isinstance(by_base["base"], np.ndarray) == (kind is np.asarray)
        np.testing.assert_array_equal(by_base["one"][:3], matrices["one"][[1, 0, 2]])
        np.testing.assert_array_equal(by_base["two"][1], matrices["base"][1])  # the default's, though "one" has it too
        x = (matrices["one"][3] + matrices["two"][3]) / 2
        np.testing.assert_array_equal(by_base["base"][3], x)  # the default lacks it: the owners' mean
        np.testing.assert_array_equal(by_base["one"][4], matrices["two"][2])  # the only owner's
        np.testing.assert_array_equal(by_base["two"][5:], 0)
        free = align_rows(given, rows)
        np.testing.assert_array_equal(free["two"][1], (matrices["base"][1] + matrices["one"][0]) / 2)


def test_dtype_and_sign_of_zero_stay():
    matrix = np.array([[-0.0], [1.0]], ml_dtypes.bfloat16)
    _, rows = merge_vocabularies({"m": {"a": 1, "b": 0}, "n": {"a": 0}}, sizes={"m": 2, "n": 1}, reference="m")
    found = align_rows({"m": matrix, "n": matrix[1:]}, rows, default="m")
    assert found["m"].dtype == found["n"].dtype == ml_dtypes.bfloat16
    assert found["m"].tobytes() == matrix.tobytes() and np.signbit(found["n"][0, 0])


def test_refusals():
    with pytest.raises(InputError, match="one has the id 3, but its embeddings have 2 rows"):
        merged(sizes=SIZES | {"one": 2})
    with pytest.raises(InputError, match="gives one id to two tokens"):
        merge_vocabularies({"m": {"a": 0, "b": 0}}, sizes={"m": 1}, reference="m")
