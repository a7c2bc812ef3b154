"""Every method against the float64 oracle, on one device and on eight, stacked and numbered; and its refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fusejax.errors import InputError
from fusejax.merging import MERGE_METHODS, merge_leaf, merge_trees
from tests.merging.oracle_methods import ORACLES

PATH = "layers.mlp.kernel"
W2, W3 = {"weights": [0.6, 0.4]}, {"weights": [0.5, 0.2, 0.4]}
RUNS = [  # method, number of targets, parameters
    ("nuslerp", 2, W2),
    ("nuslerp", 2, W2 | {"flatten": False, "row_wise": True}),
    ("multislerp", 3, W3),
    ("multislerp", 3, W3 | {"normalize_weights": False}),
    ("karcher", 3, {}),
    ("model_stock", 3, {}),
    ("model_stock", 2, {"filter_wise": True}),
    ("breadcrumbs", 3, W3 | {"density": [0.8, 0.5, 1.0], "gamma": [0.1, 0.2, 0.3]}),
    ("breadcrumbs_ties", 3, W3 | {"density": [0.8, 0.5, 0.6], "gamma": [0.1, 0.0, 0.3], "scale": 0.5}),
    ("dare_linear", 3, W3 | {"density": [1.0] * 3, "normalize": True}),
    ("dare_ties", 3, W3 | {"density": [1.0] * 3, "scale": 1.5}),
    ("nearswap", 1, {"t": 0.004}),
    ("arcee_fusion", 1, {}),
    ("ram", 3, {"epsilon": 0.005}),
    ("ram", 3, {"epsilon": 0.005, "variant": "ramplus_tl", "r": 0.3, "alpha": 0.9}),
    ("passthrough", 1, {"scale": 0.5}),
]
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
ON_MESHES = [
    *[(method, 2, W2 | {"density": 0.6, "seed": 3}) for method in RANDOM],
    *[run for run in RUNS if run[0] in ("karcher", "model_stock", "breadcrumbs_ties", "arcee_fusion", "ram")],
    *[("varm", 3, {}), ("task_arithmetic", 3, W3), ("ties", 3, W3 | {"density": [0.6, 0.8, 1.0]})],
    *[("slerp", 2, {"t": 0.3}), ("nuslerp", 2, W2), ("multislerp", 3, W3), ("nearswap", 1, {"t": 0.004})],
    *[("breadcrumbs", 3, W3 | {"density": 0.8, "gamma": 0.1}), ("passthrough", 1, {"scale": 0.5})],
]


def leaves(count, shape=(3, 8, 8)):
    rng = np.random.default_rng(7)
    base = rng.standard_normal(shape).astype(np.float32)
    ramp = np.arange(1, shape[0] + 1, dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1))
    return base, [base + 0.004 * (j + 1) * ramp * rng.standard_normal(shape).astype(np.float32) for j in range(count)]


@pytest.mark.parametrize(("method", "count", "params"), RUNS)
def test_equals_the_float64_oracle(method, count, params):
    base, targets = leaves(count)
    exact = np.stack([ORACLES[method](base[i], [x[i] for x in targets], **params) for i in range(len(base))])
    # Those that also run on a mesh are compared with numpy there: a compiled program less.
    for kind in (np.asarray,) if method in {run[0] for run in ON_MESHES} else (np.asarray, jnp.asarray):
        merged = merge_leaf(PATH, kind(base), targets, method=method, params=params)
        assert merged.dtype == np.float32
        assert isinstance(merged, np.ndarray) == (kind is np.asarray)
        np.testing.assert_allclose(merged, exact, rtol=0, atol=1e-6 * np.abs(exact).max())


@pytest.mark.parametrize("method", ["nuslerp", "multislerp"])
def test_without_a_base_the_models_themselves_are_merged(method):
    _, targets = leaves(2, (8, 8))
    merged = merge_leaf("a", None, targets, method=method, params=W2)
    np.testing.assert_allclose(merged, ORACLES[method](None, targets, **W2), rtol=0, atol=1e-5)


def test_opposite_and_zero_matrices_give_finite_averages():
    x = np.ones((2, 4), np.float32)
    for method, params in (("nuslerp", {}), ("multislerp", {}), ("karcher", {}), ("slerp", {})):
        np.testing.assert_allclose(merge_leaf("a", None, [x, -x], method=method, params=params), 0, atol=1e-6)
        merged = merge_leaf("a", None, [x, np.zeros_like(x)], method=method, params=params)
        assert np.isfinite(merged).all(), method


@pytest.mark.parametrize(("number", "run"), list(enumerate(ON_MESHES)))
def test_jit_on_eight_devices_equals_one(number, run):
    method, count, params = run
    # Both kinds of mesh, in turn: a compiled program for each would take long.
    kind = AxisType.Explicit if number % 2 else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind, kind))
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    base, targets = leaves(count)
    plain = merge_leaf(PATH, base, targets, method=method, params=params)
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, sharding) for x in (base, *targets)]
        merge = jax.jit(lambda b, xs: merge_leaf(PATH, b, xs, method=method, params=params), out_shardings=sharding)
        merged = merge(placed[0], placed[1:])
    assert len(merged.sharding.device_set) == 8
    np.testing.assert_allclose(merged, plain, rtol=0, atol=2e-6)
    if method in RANDOM:
        np.testing.assert_array_equal(np.asarray(merged) == base, np.asarray(plain) == base)


SYMMETRIC = [m for m in sorted(MERGE_METHODS) if MERGE_METHODS[m].max_targets != 1 and m not in (*RANDOM, "slerp")]


@pytest.mark.parametrize("method", SYMMETRIC)
def test_the_order_of_targets_does_not_matter(method):
    spec = MERGE_METHODS[method]
    count = spec.max_targets or 3
    base, targets = leaves(count, (8, 8))
    order = [1, 2, 0][:count] if count > 2 else [1, 0]
    each = {"weights": [0.5, 0.2, 0.4], "density": [0.6, 0.8, 0.9], "gamma": [0.1, 0.05, 0.0]}
    params = {name: np.array(values[:count]) for name, values in each.items() if name in spec.parameters}
    merged = [
        merge_leaf("a", base, [targets[j] for j in js], method=method, params={n: v[js] for n, v in params.items()})
        for js in (list(range(count)), order)
    ]
    np.testing.assert_allclose(*merged, rtol=0, atol=2e-6)
    assert not np.allclose(merged[0], base, rtol=0, atol=1e-4)


def test_karcher_differs_as_its_gradient_says():
    _, targets = leaves(3, (8, 8))
    rng = np.random.default_rng(1)
    targets = [rng.standard_normal((8, 8)).astype(np.float32) for _ in targets]  # wide angles
    towards, weigh = (jnp.asarray(rng.standard_normal((8, 8)), jnp.float32) for _ in range(2))

    def value(step):
        moved = [jnp.asarray(targets[0]) + step * towards, *targets[1:]]
        return jnp.sum(weigh * merge_leaf("a", None, moved, method="karcher", params={}))

    step = 1e-2
    difference = (value(jnp.float32(step)) - value(jnp.float32(-step))) / (2 * step)
    np.testing.assert_allclose(jax.grad(value)(jnp.float32(0)), difference, rtol=2e-3)


@pytest.mark.parametrize("method", ["nuslerp", "multislerp", "model_stock", "nearswap", "ram", "dare_linear", "della"])
def test_has_finite_gradients(method):
    spec = MERGE_METHODS[method]
    base, targets = leaves(min(2, spec.max_targets or 2), (8, 8))

    def total(first):
        return jnp.sum(jnp.square(merge_leaf("a", jnp.asarray(base), [first, *targets[1:]], method=method, params={})))

    for point in (targets[0], base):
        assert np.isfinite(jax.grad(total)(jnp.asarray(point))).all()


def test_inputs_of_several_dtypes_give_the_dtype_that_is_asked_for():
    base, (target,) = leaves(1, (8, 8))
    merged = merge_leaf("a", base, [target.astype(jnp.bfloat16)], method="nearswap", params={}, dtype="float16")
    assert merged.dtype == np.float16
    wide = merge_leaf("a", base.astype(np.float64), [target], method="task_arithmetic", params={}, dtype="float64")
    assert wide.dtype == np.float64
    with pytest.raises(InputError, match="is bfloat16, base is float32"):
        merge_leaf("a", base, [target.astype(jnp.bfloat16)], method="nearswap", params={})


@pytest.mark.parametrize(
    ("method", "count", "params", "message"),
    [
        ("nearswap", 2, {}, "nearswap takes 1 to 1 targets, got 2"),
        ("nuslerp", 3, {}, "nuslerp takes 2 to 2 targets, got 3"),
        ("model_stock", 1, {}, "model_stock takes 2 to more targets, got 1"),
        ("della", 2, {"density": 0.9, "epsilon": 0.2}, r"density \+ epsilon must be in \[0, 1\]"),
        ("dare_ties", 2, {"density": 1.2}, r"density must be finite in \[0, 1\]"),
        ("dare_ties", 2, {"seed": -1}, "seed must be finite in"),
        ("dare_ties", 2, {"seed": 1.5}, "seed must be a whole number"),
        ("dare_ties", 2, {"seed": 1, "key": 2}, "both seed and key"),
        ("dare_ties", 2, {"key": "a"}, "key must be a whole number"),
        ("ties", 2, {"key": 1}, "ties has no parameter 'key'"),
        ("nearswap", 1, {"t": -1.0}, "t must be finite and at least 0"),
        ("karcher", 2, {"max_iter": 0}, "max_iter must be finite in"),
        ("multislerp", 2, {"weights": [1, -1]}, "weights sum to 0"),
        ("ram", 2, {"variant": "ramplus"}, "Did you mean 'ramplus_tl'"),
    ],
)
def test_bad_parameters_are_refused(method, count, params, message):
    base, targets = leaves(count, (2, 2))
    with pytest.raises(InputError, match=message):
        merge_leaf("a", base, targets, method=method, params=params)


def test_trees_take_the_new_methods():
    base, targets = leaves(2)
    merged = merge_trees({"layers": {"w": base}}, [{"layers": {"w": x}} for x in targets], method="model_stock")
    exact = np.stack([ORACLES["model_stock"](base[i], [x[i] for x in targets]) for i in range(3)])
    np.testing.assert_allclose(merged["layers"]["w"], exact, rtol=0, atol=1e-5)
