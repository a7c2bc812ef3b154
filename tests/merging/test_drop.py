"""Random dropping: the right share, an unbiased expectation, and the same bits wherever and however it runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.merging import merge_leaf
from fusejax.merging.drop import dare_linear, della_linear

METHODS = ("dare_linear", "dare_ties", "della_linear", "della")


def leaves(shape=(4, 32, 16), count=2):
    rng = np.random.default_rng(5)
    base = rng.standard_normal(shape).astype(np.float32)
    return base, [base + rng.standard_normal(shape).astype(np.float32) for _ in range(count)]


def draws(function, base, target, **params):
    """Task vectors merged with 400 keys, [400, ...]."""
    keys = jax.vmap(jax.random.key_data)(jax.random.split(jax.random.key(1, impl="threefry2x32"), 400))
    run = jax.jit(jax.vmap(lambda key: function(base, target[None], key=key, weights=jnp.ones(1), **params) - base))
    return np.asarray(run(keys), np.float64)


@pytest.mark.parametrize("epsilon", [None, 0.2])
@pytest.mark.parametrize("density", [0.3, 0.7])
def test_the_share_kept_and_the_expectation(density, epsilon):
    base, (target,) = leaves((16, 16), 1)
    base = jnp.zeros_like(base)  # so that what is dropped is exactly 0
    probability = np.full(target.shape, density)
    params = {"density": jnp.array([density])}
    if epsilon:
        rank = np.argsort(np.argsort(np.abs(target), axis=-1), axis=-1)
        probability = density - epsilon + 2 * epsilon * rank / 15
        params["epsilon"] = jnp.array([epsilon])
    drawn = draws(della_linear if epsilon else dare_linear, base, target, **params)
    kept, number = drawn != 0, len(drawn)
    assert abs(kept.mean() - density) < 4 * np.sqrt(density * (1 - density) / kept.size)
    sigma = np.sqrt(probability * (1 - probability) / number)
    assert (np.abs(kept.mean(0) - probability) < 4.5 * sigma).all()  # 256 elements
    mean, sigma = drawn.mean(0), np.abs(target) * np.sqrt((1 / probability - 1) / number)
    assert (np.abs(mean - target) < 4.5 * sigma + 1e-6).all()
    np.testing.assert_allclose(np.where(kept, drawn * probability, target), np.where(kept, target, target), rtol=1e-5)


def test_mergekits_variant_keeps_the_l1_norm():
    _, (target,) = leaves((16, 16), 1)
    drawn = draws(dare_linear, jnp.zeros((16, 16)), target, density=jnp.array([0.5]), variant="mergekit")
    np.testing.assert_allclose(np.abs(drawn).sum((1, 2)), np.abs(target).sum(), rtol=1e-5)
    plain = draws(dare_linear, jnp.zeros((16, 16)), target, density=jnp.array([0.5]), rescale=False)
    np.testing.assert_array_equal(plain[plain != 0], np.broadcast_to(target, plain.shape)[plain != 0])


@pytest.mark.parametrize("method", METHODS)
def test_same_key_same_bits(method):
    base, targets = leaves()
    params = {"density": 0.5, "seed": 11}

    def merge(path, rows, **other):
        xs = [x[rows] for x in targets]
        return np.asarray(merge_leaf(path, base[rows], xs, method=method, params=params | other))

    stacked = merge("layers.mlp.kernel", slice(None))
    np.testing.assert_array_equal(stacked, merge("layers.mlp.kernel", slice(None)))
    for i in range(4):  # numbered layers are the same matrices
        np.testing.assert_array_equal(stacked[i], merge(f"layers.{i}.mlp.kernel", i))
    del params["seed"]
    by_key = jax.jit(lambda key: merge_leaf("layers.mlp.kernel", base, targets, method=method,
                                            params=params | {"key": key}))  # fmt: skip
    by_key = np.asarray(by_key(jax.random.key(11, impl="threefry2x32")))
    np.testing.assert_array_equal(by_key == base, stacked == base)
    for path, key in (("layers.mlp.kernel", 12), ("layers.other.kernel", 11)):
        other = merge(path, slice(None), key=key)
        assert np.mean((other == base) != (stacked == base)) > 0.2, "another key or path draws other numbers"
    assert np.mean((stacked[0] == base[0]) != (stacked[1] == base[1])) > 0.2, "and so does every layer"
