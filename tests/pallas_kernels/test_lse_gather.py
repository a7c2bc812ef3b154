import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from pallas_kernels import lse_gather
from pallas_kernels.fused_softmax_kl import xla

IMPLEMENTATIONS = ("reference", "xla")
IDS = np.array([[3, 0, 3, -1], [22, 23, 2**31 - 1, 5], [1, 2, -100, 0], [7, 7, 7, 7], [9, 21, 22, 20]], np.int32)


def _logits(dtype=np.float32, scale=2.0):
    return (scale * np.random.default_rng(1).normal(size=(5, 23))).astype(dtype)


def _oracle(logits, temperatures, softcap, valid):
    z = logits.astype(np.float64)[:, :valid]
    z = z if softcap is None else softcap * np.tanh(z / softcap)
    lse = np.stack([np.log(np.exp(z / t).sum(-1)) for t in temperatures], -1)
    inside = (IDS >= 0) & (valid > IDS)
    return lse, np.where(inside, np.take_along_axis(z, np.where(inside, IDS, 0), -1), 0.0), z


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("temperatures", [(1.0,), (1.0, 2.0), (0.5, 1.0, 4.0)])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("valid", [23, 21])
def test_values_and_gradients(implementation, temperatures, softcap, valid):
    logits = _logits()
    rng = np.random.default_rng(2)
    g_lse, g_z = rng.normal(size=(5, len(temperatures))), rng.normal(size=(5, 4))
    call = functools.partial(
        lse_gather, temperatures=temperatures, softcap=softcap, valid_vocab=valid, implementation=implementation
    )
    out, pull = jax.vjp(lambda x: call(x, jnp.asarray(IDS)), jnp.asarray(logits))
    lse, z, capped = _oracle(logits, temperatures, softcap, valid)
    np.testing.assert_allclose(out.lse, lse, rtol=1e-6, atol=2e-6)
    np.testing.assert_allclose(out.z, z, rtol=1e-6, atol=1e-6)
    expected = np.zeros((5, 23))
    for i, t in enumerate(temperatures):
        expected[:, :valid] += g_lse[:, i, None] / t * np.exp(capped / t - lse[:, i, None])
    for row in range(5):
        for column in range(4):
            if 0 <= IDS[row, column] < valid:
                expected[row, IDS[row, column]] += g_z[row, column]
    expected[:, :valid] *= 1.0 if softcap is None else 1 - (capped / softcap) ** 2
    (gradient,) = pull(type(out)(jnp.asarray(g_lse, jnp.float32), jnp.asarray(g_z, jnp.float32)))
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=3e-6)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_finite_differences(softcap):
    def both(x):
        return lse_gather(x, jnp.asarray(IDS), temperatures=(1.0, 2.0), softcap=softcap, valid_vocab=21)

    check_grads(both, (jnp.asarray(_logits()),), order=1, modes=["rev"], atol=5e-3, rtol=5e-3, eps=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_keep_float32_statistics(dtype):
    logits = jnp.asarray(_logits(), dtype)
    lse, z, _ = _oracle(np.asarray(logits, np.float32), (1.0,), None, 23)
    out, pull = jax.vjp(lambda x: lse_gather(x, jnp.asarray(IDS)), logits)
    assert out.lse.dtype == out.z.dtype == jnp.float32
    np.testing.assert_allclose(out.lse, lse, rtol=1e-6)
    np.testing.assert_allclose(out.z, z, rtol=1e-6)
    assert pull(out)[0].dtype == dtype


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_relative_statistics_of_large_and_shifted_logits(implementation):
    """Exact to float32 where a log-sum-exp of 1e4 holds 5e-4 only; both forms have the same gradient."""
    rng = np.random.default_rng(2)
    for logits in (_logits(scale=1e4), _logits() + np.float32(1e6)):
        wide = logits.astype(np.float64)
        top = wide.max(-1, keepdims=True)
        call = functools.partial(
            lse_gather, ids=jnp.asarray(IDS), temperatures=(1.0, 2.0), implementation=implementation
        )
        near, pull = jax.vjp(functools.partial(call, relative=True), jnp.asarray(logits))
        far, pull_far = jax.vjp(call, jnp.asarray(logits))
        expected = np.stack([np.log(np.exp((wide - top) / t).sum(-1)) for t in (1.0, 2.0)], -1)
        np.testing.assert_allclose(near.lse, expected, rtol=1e-6, atol=1e-6)
        inside = (IDS >= 0) & (IDS < 23)
        gathered = np.take_along_axis(wide - top, np.where(inside, IDS, 0), -1)
        np.testing.assert_allclose(near.z, np.where(inside, gathered, 0.0), rtol=1e-6)
        np.testing.assert_allclose(far.lse, expected + top / np.array([1.0, 2.0]), rtol=1e-6)
        cotangent = type(near)(jnp.float32(rng.normal(size=(5, 2))), jnp.float32(rng.normal(size=(5, 4))))
        if implementation == "xla":
            np.testing.assert_array_equal(pull(cotangent)[0], pull_far(cotangent)[0])


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_gradient_of_16_bits_that_accelerators_take_is_rounded_once(softcap, monkeypatch):
    """There the entries at the ids are set to their totals, duplicates and inert ids included."""
    logits = jnp.asarray(_logits(), jnp.bfloat16)
    rng = np.random.default_rng(3)
    g_lse, g_z = rng.normal(size=(5, 2)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)

    def gradient(x):
        options = {"temperatures": (1.0, 2.0), "softcap": softcap, "valid_vocab": 22}
        out, pull = jax.vjp(lambda x: lse_gather(x, jnp.asarray(IDS), **options), x)
        return pull(type(out)(g_lse, g_z))[0]

    exact = np.asarray(gradient(logits.astype(jnp.float32)))
    monkeypatch.setattr(xla.lax, "platform_dependent", lambda *given, cpu, default: default(*given))
    found = gradient(logits)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=2**-8, atol=1e-6)


def test_rows_without_cotangent_get_exact_zeros():
    logits = _logits()
    logits[1], logits[2], logits[3, 4] = np.nan, -np.inf, np.inf
    keep = np.array([1, 0, 0, 0, 1], np.float32)

    def loss(x):
        out = lse_gather(x, jnp.asarray(IDS))
        return jnp.where(keep > 0, out.lse[:, 0] - out.z[:, 0], 0.0).sum()

    gradient = jax.grad(loss)(jnp.asarray(logits))
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[1:4] == 0).all()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_vocabulary_over_a_mesh_axis(axis_type):
    mesh = jax.make_mesh((4,), ("tensor",), axis_types=(axis_type,))
    logits = np.random.default_rng(0).normal(size=(5, 24)).astype(np.float32)

    def loss(x, axis):
        out = lse_gather(x, jnp.asarray(IDS), temperatures=(1.0, 2.0), valid_vocab=23, vocab_axis=axis)
        return (out.lse * jnp.array([1.0, 0.5])).sum() + (out.z**2).sum()

    expected = jax.value_and_grad(loss)(jnp.asarray(logits), None)
    mapped = jax.shard_map(
        lambda x: jax.value_and_grad(loss)(x, "tensor"),
        mesh=mesh,
        in_specs=P(None, "tensor"),
        out_specs=(P(), P(None, "tensor")),
        check_vma=False,
    )
    got = jax.jit(mapped)(jax.device_put(logits, jax.NamedSharding(mesh, P(None, "tensor"))))
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [{"implementation": "triton"}, {"temperatures": (0.0,)}, {"temperatures": ()}, {"softcap": -1.0}],
    ids=str,
)
def test_bad_options(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        lse_gather(jnp.zeros((2, 3)), jnp.zeros((2, 1), jnp.int32), **change)


def test_unknown_implementation_lists_those_that_exist():
    with pytest.raises(ValueError, match="reference, xla, tpu, mosaic_gpu"):
        lse_gather(jnp.zeros((2, 3)), jnp.zeros((2, 1), jnp.int32), implementation="triton")


def test_bad_shapes():
    with pytest.raises(ValueError, match="T, V"):
        lse_gather(jnp.zeros((2, 3)), jnp.zeros((3, 1), jnp.int32))
    with pytest.raises(ValueError, match="floating logits"):
        lse_gather(jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 1), jnp.int32))
