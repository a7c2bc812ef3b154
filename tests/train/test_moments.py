"""The codes of AdamW's moments: exact in the mean, bounded, the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from fusejax.train.moments import Coded, decoded, encoded, ratio_bound

BETAS = [(0.9, 0.95), (0.9, 0.999), (0.0, 0.9)]
BOUND = ratio_bound(0.9, 0.95)


def moments(shape=(64, 96), seed=0, octaves=20.0):
    """Second moments over many orders of magnitude, some zero, and first moments within the bound."""
    rng = np.random.default_rng(seed)
    nu = np.exp2(-octaves * rng.random(shape)) * (rng.random(shape) < 0.95)
    mu = np.sqrt(nu) * rng.uniform(-0.9 * BOUND, 0.9 * BOUND, shape)
    return jnp.asarray(mu, jnp.float32), jnp.asarray(nu, jnp.float32)


def bits(shape, seed=0):
    return jax.random.bits(jax.random.key(seed), shape, jnp.uint32)


@pytest.mark.parametrize(("b1", "b2"), BETAS)
def test_no_gradients_lead_beyond_the_bound_and_some_lead_to_it(b1, b2):
    bound = ratio_bound(b1, b2)
    rng = np.random.default_rng(0)
    worst = (b1 / b2) ** -np.arange(4000.0) if b1 else np.concatenate([np.zeros(99), np.ones(1)])
    for grads in (worst / worst.max(), *rng.normal(size=(20, 200)) * np.exp(3 * rng.normal(size=(20, 200)))):
        mu = nu = largest = 0.0
        for g in grads:
            mu, nu = b1 * mu + (1 - b1) * g, b2 * nu + (1 - b2) * g * g
            largest = max(largest, abs(mu) / max(nu, 1e-300) ** 0.5)
        assert largest <= bound * (1 + 1e-9)
        if grads.size in (100, 4000):
            assert largest == pytest.approx(bound, rel=1e-3)


def test_what_is_read_is_within_a_level_of_what_was_written():
    mu, nu = moments()
    codes = jax.jit(lambda *x: encoded(*x, bound=BOUND))(mu, nu, bits(nu.shape))
    assert [x.dtype for x in codes] == [jnp.int8, jnp.uint8, jnp.int16] and codes.top.shape == (64, 1)
    first, second = (np.asarray(x) for x in decoded(codes, bound=BOUND))
    kept = np.asarray(nu) > 0
    assert np.array_equal(second > 0, kept) and not np.any(first[~kept])
    ratio = second[kept] / np.asarray(nu)[kept]
    assert ratio.min() > 2**-0.126 and ratio.max() < 2**0.126
    moved = np.abs(first[kept] - np.asarray(mu)[kept]) / np.sqrt(second[kept])
    assert moved.max() < 2.1 * BOUND / 127 + 1e-6


def test_the_mean_over_the_noise_is_exact():
    mu, nu = (jnp.broadcast_to(x, (20000, 12)) for x in moments((1, 12), octaves=4.0))
    codes = jax.jit(lambda *x: encoded(*x, bound=BOUND))(mu, nu, bits(nu.shape))
    first, second = (np.mean(np.asarray(x, np.float64), 0) for x in decoded(codes, bound=BOUND))
    np.testing.assert_allclose(second, nu[0], rtol=2e-3)
    np.testing.assert_allclose(first, mu[0], rtol=0, atol=2e-3 * float(nu.max()) ** 0.5)


def test_small_values_are_kept_and_zero_stays_zero():
    nu = jnp.asarray([[1.0, 1e-6, 1e-20, 0.0]])
    mu = jnp.asarray([[0.5, 1e-4, 1e-11, 0.0]])
    codes = encoded(mu, nu, bits(nu.shape), bound=BOUND)
    first, second = (np.asarray(x)[0] for x in decoded(codes, bound=BOUND))
    assert second[1] == pytest.approx(1e-6, rel=0.1)
    assert 0 < second[2] < 2**-31 and second[3] == 0 and first[3] == 0, "at the lowest level: a shorter step"
    assert not np.any(np.concatenate([np.ravel(x) for x in encoded(0 * mu, 0 * nu, bits(nu.shape), bound=BOUND)]))


@pytest.mark.parametrize("seed", [1, 2])
def test_values_on_the_grid_stay_whatever_the_row_and_the_noise(seed):
    mu, nu = moments()
    codes = encoded(mu, nu, bits(nu.shape), bound=BOUND)
    again = encoded(*decoded(codes, bound=BOUND), bits(nu.shape, seed), bound=BOUND)
    moved = [np.mean(np.asarray(a) != np.asarray(b)) for a, b in zip(codes, again, strict=True)]
    assert max(moved) < 1e-3, "float32's rounding of exp2 and log2 alone"
    _, second = decoded(codes, bound=BOUND)
    louder = second.at[:, 0].set(64.0)  # the row's largest value changes, the others' levels do not
    _, shown = decoded(encoded(mu, louder, bits(nu.shape, seed), bound=BOUND), bound=BOUND)
    assert np.mean(np.asarray(shown)[:, 1:] != np.asarray(second)[:, 1:]) < 1e-3


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P("x", "y")], ids=str)
def test_codes_do_not_depend_on_the_mesh(spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:8])
    mu, nu = moments()
    given = (mu, nu, bits(nu.shape))
    code = jax.jit(lambda *x: encoded(*x, bound=BOUND))
    one, many = code(*given), code(*(jax.device_put(x, NamedSharding(mesh, spec)) for x in given))
    assert isinstance(many, Coded)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b)
