"""Merging of whole trees: against the float64 oracle, invariances, transformations, and refusals."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from fusejax.errors import InputError
from fusejax.merging import MERGE_METHODS, merge_leaf, merge_trees
from tests.merging import oracle

SHAPES = {"embed.embedding": (24, 8), "layers.attention.q.kernel": (4, 8, 2, 4), "layers.norm.scale": (4, 8),
          "final_norm.scale": (8,)}  # fmt: skip
RUNS = [
    ("linear", {"weights": [0.5, 0.3, 0.4]}),
    ("linear", {"weights": [0.5, -0.3, 0.4], "normalize": False}),
    ("task_arithmetic", {"weights": [0.5, -0.3, 0.4], "scale": 0.7}),
    ("task_arithmetic", {"weights": [0.5, 0.3, 0.4], "normalize": True}),
    ("ties", {"weights": [0.5, 0.3, 0.4], "density": [0.5, 0.25, 1.0]}),
    ("ties", {"weights": [1, 1, 2], "density": [0.5, 0.25, 0.25], "rescale": True, "normalize": False, "scale": 0.5}),
    *[("sce", {"select_topk": 1.0, "variant": v}) for v in ("fuseai", "paper", "mergekit")],
    *[
        pytest.param("sce", {"select_topk": 0.25, "variant": v}, marks=pytest.mark.optimized)
        for v in ("fuseai", "paper", "mergekit")
    ],
]


def nest(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def flat(tree, prefix=""):
    leaves = {}
    for name, value in tree.items():
        leaves |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return leaves


def assert_same_bits(one, other):
    one, other = flat(one), flat(other)
    assert set(one) == set(other)
    for path, leaf in one.items():
        assert leaf.dtype == other[path].dtype and leaf.tobytes() == other[path].tobytes(), path


def model(seed, dtype=np.float32, base=None, scale=1.0):
    rng = np.random.default_rng(seed)
    noise = {path: (scale * rng.standard_normal(shape)).astype(np.float32) for path, shape in SHAPES.items()}
    if base is not None:
        # Every layer changes by another amount, so that weighing a whole stack at once would be seen.
        origin = flat(base)
        for path, x in noise.items():
            ramp = np.arange(1, x.shape[0] + 1, dtype=np.float32).reshape((-1,) + (1,) * (x.ndim - 1))
            noise[path] = origin[path].astype(np.float32) + x * (ramp if path.startswith("layers.") else 1)
    return nest({path: x.astype(dtype) for path, x in noise.items()})


def models(dtype=np.float32, count=3):
    base = model(0, dtype)
    return base, [model(j + 1, dtype, base, 0.01 * (j + 1)) for j in range(count)]


def expected(method, base, targets, params):
    """The oracle, layer by layer for stacked leaves."""
    function = oracle.ORACLES[method]
    targets = [flat(t) for t in targets]
    merged = {}
    for path, origin in flat(base).items():
        xs = [t[path] for t in targets]
        if path.startswith("layers."):
            rows = [function(origin[i], [x[i] for x in xs], **params) for i in range(len(origin))]
            merged[path] = np.stack(rows)
        else:
            merged[path] = function(origin, xs, **params)
    return merged


@pytest.mark.parametrize(("method", "params"), RUNS)
def test_equals_the_float64_oracle(method, params):
    base, targets = models()
    reference = expected(method, base, targets, params)
    for kind in (np.asarray, jnp.asarray):
        merged = merge_trees(
            jax.tree.map(kind, base), [jax.tree.map(kind, t) for t in targets], method=method, **params
        )
        assert jax.tree.structure(merged) == jax.tree.structure(base)
        for path, leaf in flat(merged).items():
            assert isinstance(leaf, np.ndarray) == (kind is np.asarray)
            np.testing.assert_allclose(leaf, reference[path], rtol=0, atol=1e-6 * np.abs(reference[path]).max())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_dtypes_are_rounded_once(dtype):
    base, targets = models(dtype)
    reference = expected("sce", base, targets, {"select_topk": 0.25})
    for path, leaf in flat(merge_trees(base, targets, method="sce", select_topk=0.25)).items():
        assert leaf.dtype == dtype
        rounded = reference[path].astype(dtype).astype(np.float64)
        actual = leaf.astype(np.float64)
        error = np.abs(actual - reference[path])
        # Equal to the rounded exact result, but for values that lie half-way between two.
        assert (error <= 1.01 * np.abs(rounded - reference[path]) + 1e-7).all(), path


def test_float64_stays_float64():
    base, targets = models(np.float64)
    merged = flat(merge_trees(base, targets, method="sce"))
    for path, leaf in merged.items():
        assert leaf.dtype == np.float64
        np.testing.assert_allclose(leaf, expected("sce", base, targets, {})[path], rtol=0, atol=1e-14)


def test_coefficients_per_layer_matrix():
    base, targets = models()
    _, factors = merge_trees(base, targets, method="sce", select_topk=0.5, coefficients=True)
    assert set(factors) == set(SHAPES)
    for path, factor in factors.items():
        xs = [flat(t)[path] for t in targets]
        if path.startswith("layers."):
            assert factor.shape == (4, 3)
            for i in range(4):
                weights = oracle.sce_weights(flat(base)[path][i], [x[i] for x in xs], select_topk=0.5)
                np.testing.assert_allclose(factor[i], weights, rtol=1e-5)
        else:
            np.testing.assert_allclose(factor, oracle.sce_weights(flat(base)[path], xs, select_topk=0.5), rtol=1e-5)


@pytest.mark.parametrize("method", sorted(MERGE_METHODS))
def test_a_model_merged_with_itself_is_itself(method):
    base = model(3)
    count = min(max(2, MERGE_METHODS[method].min_targets), MERGE_METHODS[method].max_targets or 2)
    copies = [jax.tree.map(np.copy, base) for _ in range(count)]
    for targets in (copies, [base] * len(copies)):
        merged = merge_trees(base, targets, method=method)
        assert_same_bits(merged, base)


@pytest.mark.parametrize("method", ["linear", "sce", "varm"])
def test_one_target_is_copied_bit_by_bit(method):
    base, (target,) = models(count=1)
    merged = merge_trees(base, [target], method=method)
    assert_same_bits(merged, target)


@pytest.mark.parametrize(("method", "params"), [("linear", {}), ("sce", {"select_topk": 0.3})])
def test_the_order_of_targets_does_not_matter(method, params):
    base, targets = models(ml_dtypes.bfloat16)
    one, other = (flat(merge_trees(base, ts, method=method, **params)) for ts in (targets, targets[::-1]))
    for path, leaf in one.items():
        np.testing.assert_allclose(leaf.astype(np.float32), other[path].astype(np.float32), rtol=2**-7)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize(("method", "params"), [("linear", {}), ("sce", {"select_topk": 0.3})])
def test_jit_on_eight_devices_equals_one(method, params, explicit):
    kind = AxisType.Explicit if explicit else AxisType.Auto
    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(kind, kind))
    specs = {
        "embed.embedding": ("tensor", "fsdp"), "layers.attention.q.kernel": (None, "fsdp", None, "tensor"),
        "layers.norm.scale": (None, "fsdp"), "final_norm.scale": (),
    }  # fmt: skip
    shardings = nest({path: NamedSharding(mesh, PartitionSpec(*spec)) for path, spec in specs.items()})
    base, targets = models()
    plain = flat(merge_trees(base, targets, method=method, **params))
    with jax.set_mesh(mesh):
        placed = [jax.device_put(tree, shardings) for tree in (base, *targets)]
        merge = jax.jit(lambda b, ts: merge_trees(b, ts, method=method, **params), out_shardings=shardings)
        merged = flat(merge(placed[0], placed[1:]))
    for path, leaf in merged.items():
        assert leaf.sharding.is_equivalent_to(flat(shardings)[path], leaf.ndim)
        np.testing.assert_allclose(leaf, plain[path], rtol=0, atol=1e-6)


def test_weights_can_be_searched_by_gradient():
    base, targets = models()
    goal = merge_trees(base, targets, method="linear", weights=[0.2, 0.3, 0.5])

    def loss(weights):
        merged = merge_trees(base, targets, method="linear", weights=weights)
        return sum(jnp.sum((leaf - flat(goal)[path]) ** 2) for path, leaf in flat(merged).items())

    gradient = jax.jit(jax.grad(loss))
    assert np.abs(gradient(jnp.array([0.2, 0.3, 0.5]))).max() < 1e-5
    assert np.abs(gradient(jnp.array([0.6, 0.2, 0.2]))).max() > 1e-3


@pytest.mark.parametrize("variant", ["fuseai", "paper", "mergekit"])
def test_sce_is_differentiable_in_the_trees(variant):
    base, targets = models()
    path = "embed.embedding"
    xs = [flat(t)[path] for t in targets]

    origin, *others = (jnp.asarray(x) for x in (flat(base)[path], *xs[1:]))
    params = {"select_topk": 0.5, "variant": variant}

    def total(x):
        return jnp.sum(jnp.square(merge_leaf(path, origin, [x, *others], method="sce", params=params)))

    gradient = jax.jit(jax.grad(total))(jnp.asarray(xs[0]))
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0


def units(path, granularity):
    """The unit of one unstacked path, by the paper's words."""
    parts = path.split(".")
    if granularity == "model":
        return ""
    depth = {"layer": 2, "module": 3}.get(granularity, len(parts)) if parts[0] == "layers" else len(parts)
    return ".".join(parts[:depth])


@pytest.mark.parametrize("granularity", ["model", "layer", "module", "matrix"])
@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_varm_by_equation_7(granularity, kind):
    base, targets = models()
    trees = [jax.tree.map(kind, tree) for tree in (base, *targets)]
    options = {"method": "varm", "granularity": granularity, "coefficients": True}
    merged, factors = merge_trees(trees[0], trees[1:], **options)

    def unstacked(tree):
        rows = {}
        for path, leaf in flat(tree).items():
            name = path.removeprefix("layers.")
            rows |= {path: leaf} if name == path else {f"layers.{i}.{name}": row for i, row in enumerate(leaf)}
        return rows

    origin, *changed = (unstacked(tree) for tree in (base, *targets))
    deltas = {path: np.stack([t[path] - x for t in changed]).astype(np.float64) for path, x in origin.items()}
    energy = {}
    for path, delta in deltas.items():
        squares = (delta**2).reshape(3, -1).sum(1)
        energy[units(path, granularity)] = energy.get(units(path, granularity), 0) + squares
    found, found_factors = unstacked(merged), {}
    for path, factor in factors.items():
        name = path.removeprefix("layers.")
        found_factors |= {path: factor} if name == path else {f"layers.{i}.{name}": row for i, row in enumerate(factor)}
    assert set(found_factors) == set(origin)
    for path, delta in deltas.items():
        weights = energy[units(path, granularity)] / energy[units(path, granularity)].sum()
        np.testing.assert_allclose(found_factors[path], weights, rtol=1e-5)
        np.testing.assert_allclose(found[path], origin[path] + np.tensordot(weights, delta, 1), rtol=0, atol=3e-6)
    flat_merge = merge_trees(origin, changed, **options)[0]  # numbered layers are the same units
    for path, leaf in flat_merge.items():
        np.testing.assert_allclose(leaf, found[path], rtol=0, atol=1e-6)


def test_varm_per_parameter():
    base, targets = models()
    merged = flat(merge_trees(base, targets, method="varm", granularity="parameter"))
    for path, origin in flat(base).items():
        deltas = np.stack([flat(t)[path] - origin for t in targets]).astype(np.float64)
        np.testing.assert_allclose(merged[path], origin + (deltas**3).sum(0) / (deltas**2).sum(0), rtol=0, atol=1e-6)
    unchanged = merge_leaf("a", base["embed"]["embedding"], [base["embed"]["embedding"]] * 2, method="varm",
                           params={"granularity": "parameter"})  # fmt: skip
    np.testing.assert_array_equal(unchanged, base["embed"]["embedding"])  # the released code gives zeros here


def test_wide_units_cannot_be_streamed_by_leaf():
    base, targets = models()
    leaves = [flat(tree)["embed.embedding"] for tree in (base, *targets)]
    with pytest.raises(InputError, match="use merge_trees"):
        merge_leaf("embed.embedding", leaves[0], leaves[1:], method="varm", params={"granularity": "layer"})


def test_slerp():
    base, targets = models(count=2)
    merged = flat(merge_trees(None, targets, method="slerp", t=0.3))
    reference = expected("slerp", targets[0], targets, {"t": 0.3})
    for path, leaf in merged.items():
        np.testing.assert_allclose(leaf, reference[path], rtol=0, atol=3e-6)
    assert_same_bits(merge_trees(base, targets[:1], method="slerp", t=0.0), base)
    a, b = np.array([2.0, 0.0], np.float32), np.array([0.0, 4.0], np.float32)
    middle = merge_leaf("a", None, [a, b], method="slerp", params={})
    np.testing.assert_allclose(middle, [2 * 0.5**0.5, 4 * 0.5**0.5], rtol=1e-6)
    gradient = jax.grad(lambda t: merge_leaf("a", None, [a, a], method="slerp", params={"t": t}).sum())(0.5)
    assert np.isfinite(gradient)
    with pytest.raises(InputError, match="slerp needs two targets"):
        merge_leaf("a", None, [a], method="slerp", params={})


def test_integer_leaves_are_copied_if_equal_and_refused_if_not():
    base, targets = models()
    for tree in (base, *targets):
        tree["steps"] = np.arange(3)
    assert (merge_trees(base, targets, method="sce")["steps"] == np.arange(3)).all()
    targets[1]["steps"] = np.arange(1, 4)
    with pytest.raises(InputError, match="steps is int64 and differs between target 1 and base"):
        merge_trees(base, targets, method="sce")


@pytest.mark.parametrize(
    ("method", "params", "message"),
    [
        ("scee", {}, "unknown merge method 'scee'. Did you mean 'sce'"),
        ("sce", {"selct_topk": 0.1}, "no parameter 'selct_topk'. Did you mean 'select_topk'"),
        ("sce", {"weights": [1, 1, 1]}, "sce has no parameter 'weights'"),
        ("linear", {"weight": 1.0}, "Did you mean 'weights'"),
        ("sce", {"select_topk": 10}, r"select_topk must be finite in \[0, 1\], got 10"),
        ("sce", {"select_topk": -0.5}, r"select_topk must be finite in \[0, 1\]"),
        ("sce", {"select_topk": float("nan")}, "select_topk must be finite"),
        ("sce", {"select_topk": "0.1"}, "select_topk must be a number"),
        ("sce", {"variant": "fuseia"}, "Did you mean 'fuseai'"),
        ("linear", {"weights": [1, -1, 0]}, "weights sum to 0"),
        ("linear", {"weights": [1, 2]}, "one number for each of the 3 targets"),
        ("linear", {"normalize": 1}, "normalize must be true or false"),
        ("linear", {"weights": [1, float("inf"), 0]}, "weights must be finite"),
        ("ties", {"density": [0.5, 0.5, 1.5]}, r"density must be finite in \[0, 1\]"),
        ("ties", {"weights": [1, -2, 1]}, "weights sum to 0"),
        ("varm", {"granularity": "layers"}, "Did you mean 'layer'"),
        ("slerp", {}, "slerp takes 1 to 2 targets, got 3"),
    ],
)
def test_bad_parameters_are_refused(method, params, message):
    base, targets = models()
    with pytest.raises(InputError, match=message):
        merge_trees(base, targets, method=method, **params)


def test_all_problems_of_the_trees_are_named_at_once():
    base, targets = models()
    del targets[0]["final_norm"]
    targets[1]["extra"] = np.zeros(3, np.float32)
    targets[1]["embed"]["embedding"] = np.zeros((25, 8), np.float32)
    targets[2]["layers"]["norm"]["scale"] = targets[2]["layers"]["norm"]["scale"].astype(np.float16)
    targets[2]["embed"]["embedding"][3, 2] = np.nan
    with pytest.raises(InputError) as caught:
        merge_trees(base, targets, method="sce")
    text = str(caught.value)
    for part in (
        "target 0 lacks final_norm.scale", "target 1 has extra, which base lacks",
        "embed.embedding of target 1 has shape (25, 8), base has (24, 8)",
        "layers.norm.scale of target 2 is float16, base is float32",
        "embed.embedding of target 2 has 1 values that are NaN or infinite",
    ):  # fmt: skip
        assert part in text


def test_other_refusals():
    base, targets = models()
    with pytest.raises(InputError, match="target 2 is the same object as target 0"):
        merge_trees(base, [targets[0], targets[1], targets[0]], method="sce")
    with pytest.raises(InputError, match="sce needs base params"):
        merge_trees(None, targets, method="sce")
    with pytest.raises(InputError, match="targets is empty"):
        merge_trees(base, [], method="sce")
    with pytest.raises(InputError, match="must be a list of trees"):
        merge_trees(base, base, method="sce")
    with pytest.raises(InputError, match="is not an array but float"):
        merge_leaf("a", 1.0, [np.ones(2)], method="sce", params={})
    with pytest.raises(InputError, match="beyond the range of float16"):
        ones = np.full(4, 60000, np.float16)
        merge_leaf("a", None, [ones, ones], method="linear", params={"weights": [1, 1], "normalize": False})


def test_linear_needs_no_base():
    _, targets = models()
    merged = merge_trees(None, targets, method="linear")
    np.testing.assert_allclose(
        flat(merged)["final_norm.scale"], np.mean([flat(t)["final_norm.scale"] for t in targets], axis=0), rtol=1e-6
    )


def test_the_table_is_complete():
    for name, method in MERGE_METHODS.items():
        assert method.description and method.paper.startswith("https://"), name
        for parameter in method.parameters.values():
            assert parameter.description and parameter.low <= parameter.high
            assert not parameter.choices or parameter.default in parameter.choices
