"""The hand-written kernels in Pallas's interpreter against the float64 definition, shapes that fit no block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import LseGather, lse_gather
from pallas_kernels.fused_softmax_kl import tiling
from tests.pallas_kernels.compiled import quick_jit

MOSAIC_GPU = pytest.mark.skipif(
    jax.__version_info__ < (0, 11) or not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of Mosaic GPU kernels needs JAX 0.11",
)


def oracle(logits, ids, g_lse, g_z, *, temperatures=(1.0,), softcap=None, valid_vocab=None):
    """Returns (lse, z, dlogits) in float64, dense."""
    raw = np.asarray(logits, np.float64)[:, :valid_vocab]
    z = raw if softcap is None else softcap * np.tanh(raw / softcap)
    top = z.max(-1, keepdims=True)
    sums = [np.exp((z - top) / t) for t in temperatures]
    lse = np.stack([np.log(e.sum(-1)) + top[:, 0] / t for e, t in zip(sums, temperatures, strict=True)], -1)
    gradient = sum(g_lse[:, i, None] / t * sums[i] / sums[i].sum(-1, keepdims=True) for i, t in enumerate(temperatures))
    inside = (ids >= 0) & (ids < z.shape[1])
    for row, column in zip(*np.nonzero(inside), strict=True):
        gradient[row, ids[row, column]] += g_z[row, column]
    gradient *= 1.0 if softcap is None else 1 - (z / softcap) ** 2
    gathered = np.where(inside, np.take_along_axis(z, np.where(inside, ids, 0), -1), 0.0)
    return lse, gathered, np.pad(gradient, [(0, 0), (0, logits.shape[1] - z.shape[1])])


def problem(tokens, vocab, gathered, *, dtype=jnp.float32, n=1, seed=0):
    rng = np.random.default_rng(seed)
    logits = jnp.asarray(2 * rng.normal(size=(tokens, vocab)), dtype)
    ids = rng.integers(-2, vocab + 2, (tokens, gathered)).astype(np.int32)
    if gathered > 2:
        ids[:, 1], ids[:, 2] = ids[:, 0], vocab - 1  # a duplicate, the last column
        ids[0] = np.arange(gathered) % vocab  # every id in one block
        edges = [v for v in (127, 128, 511, 512) if v < vocab][:gathered]
        ids[tokens // 2, : len(edges)] = edges  # of lanes and of slabs
        ids[-1, 0] = 2**31 - 1
    return logits, ids, rng.normal(size=(tokens, n)).astype(np.float32), rng.normal(size=(tokens, gathered)).astype("f")


def check(implementation, tokens, vocab, gathered, *, dtype=jnp.float32, **options):
    logits, ids, g_lse, g_z = problem(tokens, vocab, gathered, dtype=dtype, n=len(options.get("temperatures", (1.0,))))
    call = functools.partial(lse_gather, implementation=implementation, interpret=True, **options)

    @quick_jit
    def run(logits, ids, g_lse, g_z):
        out, pull = jax.vjp(lambda x: call(x, ids), logits)
        return out, pull(LseGather(g_lse, g_z))[0]

    out, gradient = run(logits, ids, g_lse, g_z)
    lse, z, expected = oracle(logits, ids, g_lse, g_z, **options)
    np.testing.assert_allclose(out.lse, lse, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(out.z, z, rtol=1e-6, atol=1e-6)
    assert gradient.dtype == dtype
    if dtype == jnp.float32:
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=3e-6)
    else:
        error = np.asarray(gradient, np.float64) - expected
        assert np.linalg.norm(error) < 3e-3 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("tokens", "vocab", "gathered", "options"),
    [
        (19, 1100, 5, {"temperatures": (1.0, 2.0)}),
        (1, 1, 1, {}),
        (3, 129, 0, {"temperatures": (0.5, 1.0, 4.0)}),
        (17, 640, 130, {"softcap": 3.0, "valid_vocab": 601, "dtype": jnp.bfloat16}),
        (8, 127, 4, {"softcap": 2.0, "temperatures": (1.0, 3.0)}),
        (63, 128, 3, {"temperatures": (0.1, 100.0)}),
        (64, 129, 2, {}),
        (65, 513, 5, {"dtype": jnp.bfloat16}),
    ],
    ids=str,
)
def test_tpu(tokens, vocab, gathered, options):
    check("tpu", tokens, vocab, gathered, **options)


def test_tpu_over_several_vocabulary_blocks(monkeypatch):
    """The running statistics of several blocks, with a last block that is mostly padding."""
    monkeypatch.setattr(tiling, "_TPU_BLOCK_BYTES", 20 * 8 * tiling.TPU_SLAB)
    assert tiling.tpu_blocks(16, 1100, 4, itemsize=4, bytes_per_logit=20).columns == tiling.TPU_SLAB
    check("tpu", 16, 1100, 6, temperatures=(1.0, 2.0))


@MOSAIC_GPU
@pytest.mark.parametrize(
    ("tokens", "vocab", "gathered", "options"),
    [
        (65, 1000, 5, {"temperatures": (1.0, 2.0)}),
        (63, 136, 20, {"softcap": 3.0, "valid_vocab": 130, "dtype": jnp.bfloat16}),
        (64, 132, 0, {"temperatures": (0.1, 100.0)}),
        (1, 8, 3, {}),
        (64, 516, 5, {}),
    ],
    ids=str,
)
def test_mosaic_gpu(tokens, vocab, gathered, options):
    check("mosaic_gpu", tokens, vocab, gathered, **options)


@pytest.mark.parametrize("implementation", ["xla", "tpu", pytest.param("mosaic_gpu", marks=MOSAIC_GPU)])
def test_rows_without_cotangent_and_rows_of_minus_infinity(implementation):
    logits, ids, _, _ = problem(64, 128, 2)
    logits = logits.at[1].set(jnp.nan).at[2].set(-jnp.inf).at[3, 4].set(jnp.inf)
    weights = jnp.ones(64).at[jnp.array([1, 3])].set(0.0)

    @quick_jit
    def run(x):
        def loss(x):
            out = lse_gather(x, jnp.asarray(ids), implementation=implementation, interpret=True)
            return jnp.where(weights > 0, out.lse[:, 0], 0.0).sum(), out.lse

        return jax.value_and_grad(loss, has_aux=True)(x)

    (_, lse), gradient = run(logits)
    assert lse[2, 0] == -jnp.inf
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[1:4] == 0).all()
    np.testing.assert_allclose(gradient[4:].sum(-1), 1.0, rtol=1e-5)
