"""The TPU kernel against plain operations, interpreted here and lowered for TPUs."""

import contextlib
import dataclasses
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.models import ModelConfig, abstract_params, hidden_states, param_table
from fusejax.models.layers import attention, attention_mask
from fusejax.models.splash import splash_attention, suits_splash
from fusejax.parallel import batch_sharding, make_mesh, param_shardings
from fusejax.parallel.sharding import Layout, ShardingRules
from pallas_kernels.testing import count_kernels, lower_for

MODEL = ModelConfig(512, 256, 512, 2, 4, 2, head_dim=128, max_positions=256, dtype="bfloat16")


def heads(dtype=jnp.float32, length=256, width=64):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, n, width)), dtype) for n in (4, 2, 2))
    segments = np.ones((2, length), np.int32)
    segments[0, 100:200], segments[0, 200:] = 2, 0
    return q, k, v, jnp.asarray(segments)


@pytest.mark.parametrize("window", [None, 70])
def test_kernel_and_plain_operations_agree_forward_and_backward(window):
    q, k, v, segments = heads()
    mask = attention_mask(segments, sliding_window=window)
    weight = jnp.cos(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)

    def of(fn):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(weight * fn(*x)), argnums=(0, 1, 2)))(q, k, v)

    kernel = of(partial(splash_attention, segments=segments, window=window, interpret=True))
    plain = of(lambda *x: attention(*x, mask, Layout(), segments=segments, window=window))
    assert float(kernel[0]) == pytest.approx(float(plain[0]), rel=1e-4, abs=1e-3)
    for ours, theirs in zip(kernel[1], plain[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


@pytest.mark.parametrize("width", [64, 128])
def test_it_lowers_for_tpus(width):
    given = heads(jnp.bfloat16, length=512, width=width)

    def loss(q, k, v, segments):
        return jnp.sum(splash_attention(q, k, v, segments, window=300).astype(jnp.float32))

    assert count_kernels(lower_for("tpu", jax.grad(loss, argnums=(0, 1, 2)), *given), "tpu") == 3


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 2}, {"tensor": 4}, {"fsdp": 4, "explicit": True}])
def test_the_model_takes_it_where_the_devices_are_tpus(monkeypatch, sizes):
    monkeypatch.setattr("fusejax.models.layers.suits_splash", lambda q, k, mesh: q.shape[1] % 128 == 0)
    mesh = make_mesh(**sizes) if sizes else None
    whole = ShardingRules(kv_heads=()) if sizes == {"tensor": 4} else None  # fewer key heads than shards

    def lowered(**options):
        config = dataclasses.replace(MODEL, **options)
        batch = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=mesh and batch_sharding(mesh))
        params = abstract_params(config)
        if mesh is not None:
            where = param_shardings(param_table(config), mesh, whole)
            params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, where)

        def loss(params, *given):
            return jnp.sum(hidden_states(params, config, *given, mesh=mesh, rules=whole).astype(jnp.float32))

        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            traced = jax.jit(jax.grad(loss)).trace(params, batch, batch, batch)
            return traced.lower(lowering_platforms=("tpu",))

    assert count_kernels(lowered(), "tpu") == 3
    assert count_kernels(lowered(attention="xla"), "tpu") == 0


def test_it_is_for_tpus_and_whole_blocks():
    q = jnp.zeros((1, 256, 4, 64))
    tpus = SimpleNamespace(devices=np.array([SimpleNamespace(platform="tpu")]))
    assert suits_splash(q, q, tpus) and not suits_splash(q, q, None)
    assert not suits_splash(q[:, :200], q[:, :200], tpus) and not suits_splash(q[:, :128], q, tpus)
