"""A merge in chunks equals the pure function on the whole matrix; selections are exact, ties by lowest flat index."""

import ml_dtypes
import numpy as np
import pytest

from fusejax.io.stream_read import ArrayTensor
from fusejax.merging import MERGE_METHODS, merge_leaf
from fusejax.merging.registry import resolve
from fusejax.stages import merge_chunks
from fusejax.stages.merge_chunks import Chunks, is_chunked, nonfinite, prepare

SHAPE = (61, 50)
DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32)
CASES = [
    ("linear", {"weights": [1.0, 2.0, 5.0]}),
    ("linear", {"weights": [0.1, -0.2, 0.3], "normalize": False}),
    ("task_arithmetic", {"weights": [0.3, 0.2, 1.0], "scale": 0.7}),
    ("varm", {}),
    *[("sce", {"select_topk": k, "variant": v}) for v in ("fuseai", "paper", "mergekit") for k in (1.0, 0.3, 0.0)],
    ("ties", {"density": 0.3}),
    ("ties", {"density": [0.3, 0.6, 1.0], "weights": [1.0, 2.0, 0.5], "normalize": False, "scale": 1.5}),
    ("ties", {}),
]


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


def in_chunks(method, arrays, params, *, out=None):
    spec, values = resolve(method, params, len(arrays) - 1, True)
    used = arrays if spec.uses_base else arrays[1:]
    chunks = Chunks([ArrayTensor(array, "memory") for array in used])
    out = out or chunks.dtype
    assert is_chunked(method, values, [chunks.dtype, out])
    prepared = prepare(method, chunks, values)
    pieces = [prepared(raw, start, count, out).copy() for start, count, raw in chunks]
    merged = np.concatenate(pieces).view(getattr(ml_dtypes, out, out)).reshape(SHAPE)
    return merged, prepared.coefficients


def assert_near(actual, expected):
    """Equal up to the rounding of float32 statistics: at most one step of the dtype, on few elements."""
    assert actual.dtype == expected.dtype
    steps = np.abs(actual.view(f"i{actual.itemsize}").astype(np.int64) - expected.view(f"i{actual.itemsize}"))
    if actual.itemsize == 2:
        assert steps.max() <= 1
        assert (steps > 0).mean() < 2e-3
    else:
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=2e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("method", "params"), CASES, ids=lambda x: x if isinstance(x, str) else None)
def test_chunks_equal_the_whole_matrix(method, params, dtype):
    arrays = family(dtype)
    merged, coefficients = in_chunks(method, arrays, params)
    wanted = MERGE_METHODS[method].coefficients is not None
    result = merge_leaf("w", arrays[0], arrays[1:], method=method, params=params, coefficients=wanted)
    expected, factors = result if wanted else (result, None)
    assert_near(merged, expected)
    if wanted:
        np.testing.assert_allclose(coefficients, factors, rtol=2e-6)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("method", ["slerp", "sce", "varm", "linear"])
def test_one_and_two_targets(method, count):
    arrays = family(np.float32, count)
    if method == "slerp":
        arrays[-1] = np.ascontiguousarray(arrays[-1][::-1])  # a wide angle
        if count == 2:
            _, values = resolve("slerp", {"t": 0.3}, 2, False)
            chunks = Chunks([ArrayTensor(array, "memory") for array in arrays[1:]])
            prepared = prepare("slerp", chunks, values)
            merged = np.concatenate([prepared(raw, s, n, "float32").copy() for s, n, raw in chunks]).reshape(SHAPE)
            assert_near(merged, merge_leaf("w", None, arrays[1:], method="slerp", params={"t": 0.3}))
            return
    params = {"t": 0.3} if method == "slerp" else {}
    assert_near(
        in_chunks(method, arrays, params)[0], merge_leaf("w", arrays[0], arrays[1:], method=method, params=params)
    )


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
    for method in ("linear", "sce", "varm", "task_arithmetic", "ties"):
        merged, _ = in_chunks(method, [array] * 4, {})
        np.testing.assert_array_equal(merged.view(np.uint16), array.view(np.uint16), err_msg=method)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_seen(dtype):
    name = np.dtype(dtype).name
    for bad in (np.nan, -np.nan, np.inf, -np.inf):
        values = np.array([1.0, -2.0, 0.0, bad], dtype)
        assert nonfinite(values.view(merge_chunks.RAW_DTYPES[name]), name)
    largest = np.array([ml_dtypes.finfo(dtype).max, ml_dtypes.finfo(dtype).min], dtype)
    assert not nonfinite(largest.view(merge_chunks.RAW_DTYPES[name]), name)
    arrays = family(dtype)
    arrays[2][60, 49] = -np.inf
    chunks = Chunks([ArrayTensor(array, "memory") for array in arrays])
    assert [start for start, _, _ in chunks][-1] < 61 * 50
    assert chunks.bad == [2]


def test_digests_are_of_the_bytes():
    import xxhash

    arrays = family(ml_dtypes.bfloat16)
    chunks = Chunks([ArrayTensor(array, "memory") for array in arrays])
    assert sum(count for _, count, _ in chunks) == arrays[0].size
    assert chunks.digests == [xxhash.xxh3_64(array.tobytes()).hexdigest() for array in arrays]


def test_what_is_left_to_whole_matrices():
    assert not is_chunked("ties", {"rescale": True}, ["bfloat16"])
    assert not is_chunked("varm", {"granularity": "parameter"}, ["bfloat16"])
    assert not is_chunked("linear", {}, ["float64"])
    assert not is_chunked("karcher", {}, ["bfloat16"])
