"""A merge in chunks equals the pure function on the whole matrix; selections are exact, ties by lowest flat index."""

import ml_dtypes
import numpy as np
import pytest

from fusejax.io.stream_read import ArrayTensor
from fusejax.merging import MERGE_METHODS, merge_leaf
from fusejax.merging.keys import matrix_keys
from fusejax.merging.registry import resolve
from fusejax.stages import merge_chunks
from fusejax.stages.merge_chunks import Chunks, nonfinite
from fusejax.stages.merge_statistics import is_chunked, prepare, row_length

SHAPE = (61, 50)
DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)
W = {"weights": [1.0, 2.0, 0.5]}
CASES = [
    ("linear", {"weights": [1.0, 2.0, 5.0]}),
    ("linear", {"weights": [0.1, -0.2, 0.3], "normalize": False}),
    ("task_arithmetic", {"weights": [0.3, 0.2, 1.0], "scale": 0.7}),
    ("varm", {}),
    ("varm", {"granularity": "parameter"}),
    *[("sce", {"select_topk": k, "variant": v}) for v in ("fuseai", "paper", "mergekit") for k in (1.0, 0.3, 0.0)],
    ("ties", {"density": 0.3}),
    ("ties", {"density": [0.3, 0.6, 1.0], "normalize": False, "scale": 1.5, "rescale": True, **W}),
    ("ties", {}),
    ("dare_linear", {"density": 0.4, **W}),
    ("dare_ties", {"density": [0.2, 0.5, 1.0], "variant": "mergekit", "scale": 0.8}),
    ("della", {"density": 0.6, "epsilon": 0.2}),
    ("della_linear", {"density": 0.6, "variant": "mergekit", **W}),
    ("breadcrumbs", {"density": 0.5, "gamma": [0.1, 0.0, 0.2], "normalize": True}),
    ("breadcrumbs_ties", {"density": [0.9, 0.5, 0.3], "gamma": 0.3, **W}),
    ("model_stock", {}),
    ("model_stock", {"filter_wise": True}),
    ("multislerp", {}),
    ("multislerp", {"normalize_weights": False, **W}),
    ("karcher", {}),
    ("ram", {}),
    ("ram", {"variant": "ramplus_tl", "epsilon": 1e-3, "r": 0.5}),
    ("nuslerp", {"weights": [0.3, 0.7]}),
    ("nuslerp", {"flatten": False}),
    ("nuslerp", {"flatten": False, "row_wise": True}),
    ("slerp", {"t": 0.3}),
    ("nearswap", {"t": 1e-3}),
    ("arcee_fusion", {}),
    ("passthrough", {"scale": 0.5}),
]
COUNT = {"nuslerp": 2, "slerp": 1, "nearswap": 1, "arcee_fusion": 1, "passthrough": 1}


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    """Several chunks, the last one short, without large arrays."""
    monkeypatch.setattr(merge_chunks, "CHUNK", 1024)


def family(dtype, count=3, *, seed=0):
    """A base and targets; some elements are unchanged, and rounding makes many differences equal."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.02, SHAPE).astype(np.float32)
    moved = [base + rng.normal(0, 1e-3 * (j + 1), SHAPE) * (rng.random(SHAPE) < 0.9) for j in range(count)]
    return [x.astype(dtype) for x in (base, *moved)]


def in_chunks(method, arrays, params, *, out=None, has_base=None):
    has_base = MERGE_METHODS[method].uses_base if has_base is None else has_base
    used = arrays if has_base else arrays[1:]
    spec, values = resolve(method, params, len(arrays) - 1, has_base)
    if spec.random:
        values = {**values, "key": matrix_keys(values["key"], "w", None)}
    chunks = Chunks([ArrayTensor(array, "memory") for array in used], row=row_length(method, values, SHAPE))
    out = out or chunks.dtype
    assert is_chunked([chunks.dtype, out])
    prepared = prepare(method, chunks, values, has_base=has_base)
    pieces = [prepared(raw, start, count, out).copy() for start, count, raw in chunks]
    assert len(pieces) > 2
    merged = np.concatenate(pieces).view(getattr(ml_dtypes, out, out)).reshape(SHAPE)
    return merged, prepared.coefficients


def assert_near(actual, expected):
    """Equal up to the rounding of float32 statistics: at most one step of the dtype, on few elements."""
    assert actual.dtype == expected.dtype
    steps = np.abs(actual.view(f"i{actual.itemsize}").astype(np.int64) - expected.view(f"i{actual.itemsize}"))
    steps = np.where(actual == expected, 0, steps)  # the two zeros
    if actual.itemsize == 2:
        assert steps.max() <= 1
        assert (steps > 0).mean() < 2e-3
    else:
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize(("method", "params"), CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_chunks_equal_the_whole_matrix(method, params):
    dtype = DTYPES[[name for name, _ in CASES].index(method) % 3]
    arrays = family(dtype, COUNT.get(method, 3))
    if method == "arcee_fusion":
        arrays = family(np.float32, 1)  # in narrow dtypes many elements lie at the threshold
    merged, coefficients = in_chunks(method, arrays, params)
    wanted = MERGE_METHODS[method].coefficients is not None
    base = arrays[0] if MERGE_METHODS[method].uses_base else None
    result = merge_leaf("w", base, arrays[1:], method=method, params=params, coefficients=wanted)
    expected, factors = result if wanted else (result, None)
    assert_near(merged, expected)
    if wanted:
        np.testing.assert_allclose(coefficients, factors, rtol=2e-6)


def test_every_method_is_among_the_cases():
    assert {method for method, _ in CASES} == set(MERGE_METHODS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["sce", "linear", "ties"])
def test_dtypes(method, dtype):
    arrays = family(dtype)
    params = {"select_topk": 0.3} if method == "sce" else {}
    base = arrays[0] if MERGE_METHODS[method].uses_base else None
    expected = merge_leaf("w", base, arrays[1:], method=method, params=params)
    assert_near(in_chunks(method, arrays, params)[0], expected)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "multislerp", "karcher"])
def test_wide_angles_without_a_base(method):
    arrays = family(np.float32, 2)
    arrays[-1] = np.ascontiguousarray(arrays[-1][::-1])
    merged, _ = in_chunks(method, arrays, {}, has_base=False)
    assert_near(merged, merge_leaf("w", None, arrays[1:], method=method, params={}))


@pytest.mark.parametrize("method", ["sce", "varm", "linear"])
def test_one_target(method):
    arrays = family(np.float32, 1)
    np.testing.assert_array_equal(in_chunks(method, arrays, {})[0], arrays[1])


def test_the_output_may_have_another_dtype():
    arrays = family(ml_dtypes.bfloat16)
    merged, _ = in_chunks("sce", arrays, {}, out="float32")
    assert_near(merged, merge_leaf("w", arrays[0], arrays[1:], method="sce", params={}, dtype=np.float32))


def test_equal_changes_are_cut_at_the_lowest_flat_index():
    base = np.zeros(SHAPE, np.float32)
    changed = np.full(SHAPE, 2.0**-10, np.float32)
    changed.reshape(-1)[2000] = 1.0  # one that is larger, in a later chunk
    merged, _ = in_chunks("ties", [base, changed], {"density": 0.5})
    kept = np.flatnonzero(merged)
    count = SHAPE[0] * SHAPE[1] // 2
    np.testing.assert_array_equal(kept, [*range(count - 1), 2000])


def test_a_threshold_may_fall_on_any_chunk():
    rng = np.random.default_rng(1)
    base = np.zeros(SHAPE, np.float32)
    changed = rng.integers(0, 4, SHAPE).astype(np.float32)  # three sizes and many zeros
    for density in (0.001, 0.2, 0.25, 0.5, 0.75, 0.9, 0.999):
        merged, _ = in_chunks("ties", [base, changed], {"density": density})
        expected = merge_leaf("w", base, [changed], method="ties", params={"density": density})
        np.testing.assert_array_equal(merged, expected, err_msg=str(density))


def test_a_model_merged_with_itself_is_itself():
    (array,) = family(ml_dtypes.bfloat16, 0)
    for method in MERGE_METHODS:
        merged, _ = in_chunks(method, [array] * (COUNT.get(method, 3) + 1), {})
        np.testing.assert_array_equal(merged.view(np.uint16), array.view(np.uint16), err_msg=method)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_seen(dtype):
    name = np.dtype(dtype).name
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        values = np.array([1.0, -2.0, 0.0, bad], dtype)
        assert nonfinite(values.view(merge_chunks.RAW_DTYPES[name]), name)
    largest = np.array([ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min], dtype)
    assert not nonfinite(largest.view(merge_chunks.RAW_DTYPES[name]), name)


def test_float64_and_integers_are_left_to_whole_matrices():
    assert is_chunked(["bfloat16", "float32"])
    assert not is_chunked(["float64"])
    assert not is_chunked(["int32"])
