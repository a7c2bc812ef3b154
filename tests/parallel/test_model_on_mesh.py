"""A model gives the same value and gradient on every mesh, in Auto and in Explicit mode."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.models import logits, param_table
from fusejax.parallel import ShardingRules, batch_sharding, make_mesh, param_shardings
from tests.models.tiny import TINY, tiny_batch, tiny_params

TOLERANCE = 2e-5  # of the largest entry of each leaf of the gradient
CFG = replace(TINY, attention_bias=True, mlp_bias=True)
MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]


def loss(params, tokens, positions, segments, cfg, mesh=None, rules=None):
    z = logits(params, cfg, tokens, positions, segments, mesh=mesh, rules=rules)
    return jnp.mean(jnp.where(segments > 0, jnp.square(z).mean(-1), 0))


step = jax.jit(jax.value_and_grad(loss), static_argnames=("cfg", "mesh", "rules"))


def assert_same_on(mesh, cfg, rules=None) -> None:
    params, batch = tiny_params(cfg), tiny_batch()
    value, gradient = step(params, *batch, cfg=cfg)
    shardings = param_shardings(param_table(cfg), mesh, rules)
    placed = jax.device_put(params, shardings)
    batch = [jax.device_put(x, batch_sharding(mesh)) for x in batch]
    again, gradient_again = step(placed, *batch, cfg=cfg, mesh=mesh, rules=rules)
    np.testing.assert_allclose(again, value, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(gradient_again), strict=True):
        np.testing.assert_allclose(np.asarray(b), a, atol=TOLERANCE * np.abs(a).max() + 1e-9)
    kernel = gradient_again["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.is_equivalent_to(shardings["layers"]["mlp"]["up"]["kernel"], kernel.ndim)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_value_and_gradient_do_not_depend_on_the_mesh(sizes, explicit) -> None:
    assert_same_on(make_mesh(**sizes, explicit=explicit), CFG)


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_key_heads_may_stay_whole_where_query_heads_are_split(explicit) -> None:
    mesh = make_mesh(data=2, tensor=4, explicit=explicit)
    assert_same_on(mesh, replace(TINY, tie_embeddings=True, remat="full"), ShardingRules(kv_heads=()))


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
@pytest.mark.parametrize(
    "sizes", [pytest.param({"tensor": 2}, marks=pytest.mark.slow), {"data": 2, "fsdp": 2, "tensor": 2}], ids=str
)
def test_the_stream_may_lie_over_tensor_along_positions(sizes, explicit) -> None:
    assert_same_on(make_mesh(**sizes, explicit=explicit), replace(CFG, remat="full"), ShardingRules.sequence_parallel())
