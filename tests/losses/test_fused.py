import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fusejax.config import LossConfig
from fusejax.errors import InputError
from fusejax.losses import batch_fusion_loss
from fusejax.parallel import ShardingRules
from pallas_kernels.fused_softmax_kl import LinearOptions
from tests.losses.groups import random_batch
from tests.pallas_kernels import oracle

WIDTH, VOCAB = 16, 32
SHARDED = {"rtol": 2e-6, "atol": 1e-7}  # one device against a mesh, float32


def _arrays(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(8, 6, WIDTH)).astype(np.float32)
    return hidden, (0.4 * rng.normal(size=(WIDTH, VOCAB))).astype(np.float32)


def _grad(batch, groups, **options):
    options = {"max_members": 24, "chunk": 4} | options
    loss = lambda h, w, b: batch_fusion_loss(h, w, b, groups, **options)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))


def _dense_oracle(hidden, head, batch, symbol_of, clm_weight, fusion_weight, z_loss_weight=0.0):
    """Loss and gradient of the logits with Q summed per symbol over the whole vocabulary."""
    logits = hidden.astype(np.float64) @ head
    count = batch.mask.sum()
    loss, dlogits = 0.0, np.zeros_like(logits)
    for at in np.ndindex(batch.mask.shape):
        if not batch.mask[at]:
            continue
        q, live = oracle.softmax(logits[at]), batch.partition[at] >= 0
        weight = clm_weight if live.any() else clm_weight + fusion_weight
        lse = np.log(np.exp(logits[at]).sum())
        loss += weight * (z_loss_weight * lse**2 - np.log(q[batch.labels[at]])) / count
        dlogits[at] += weight * (q * (1 + z_loss_weight * 2 * lse) - np.eye(VOCAB)[batch.labels[at]]) / count
        for m in np.flatnonzero(live):
            table = symbol_of[batch.partition[at][m]]
            sets = [set(np.flatnonzero(table == s)) for s in batch.targets.ids[at][m]]
            p, rest = np.exp(batch.targets.logprobs[at][m]), np.exp(batch.targets.residual_logprob[at][m])
            value, gradient = oracle.position(logits[at], sets, p, rest)
            scale = fusion_weight * batch.weights[at][m] / count
            loss, dlogits[at] = loss + scale * value, dlogits[at] + scale * gradient
    return loss, dlogits @ head.T, np.einsum("btd,btv->dv", hidden, dlogits)


def test_partition_events_equal_a_dense_sum_per_symbol():
    batch, groups, symbol_of = random_batch()
    hidden, head = _arrays()
    (loss, metrics), grads = _grad(batch, groups, clm_weight=0.6, fusion_weight=0.4)(hidden, head, batch)
    expected = _dense_oracle(hidden, head, batch, symbol_of, 0.6, 0.4)
    np.testing.assert_allclose(loss, expected[0], rtol=2e-6)
    for got, want in zip(grads, expected[1:], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    supervised = (batch.mask > 0) & (batch.partition >= 0).any(-1)
    assert metrics["tokens"] == batch.mask.sum() and metrics["supervised_tokens"] == supervised.sum()
    assert metrics["folded_events"] == 0


@pytest.mark.parametrize("sources", [(0, 1), (1, 0)], ids=str)
def test_each_source_has_the_mean_divergence_of_its_own_positions(sources):
    """Only one source's distributions left: its mean is the fusion loss; the weights are shared among all."""
    batch, groups, _ = random_batch()
    hidden, head = _arrays()
    one, other = sources
    (_, whole), _ = _grad(batch, groups)(hidden, head, batch)
    alone = batch._replace(
        partition=np.where(batch.partition == one, one, -1), weights=np.ones_like(batch.weights), mask=batch.mask
    )
    (_, single), _ = _grad(alone, groups)(hidden, head, alone)
    own = (batch.mask[..., None] > 0) & (batch.partition == one) & (batch.weights > 0)
    supervised = ((batch.mask[..., None] > 0) & (batch.partition >= 0) & (batch.weights > 0)).any(-1).sum()
    assert whole["source_tokens"][one] == single["source_tokens"][one] == own.sum() > 0
    assert single["source_tokens"][other] == single["source_nats"][other] == 0
    np.testing.assert_allclose(whole["source_nats"][one], single["source_nats"][one], rtol=1e-6)
    total = single["source_nats"][one] * single["source_tokens"][one]
    np.testing.assert_allclose(total, single["fusion_nats"] * single["supervised_tokens"], rtol=1e-6)
    np.testing.assert_allclose(whole["source_share"][one], (batch.weights * own).sum() / supervised, rtol=1e-6)


@pytest.fixture(scope="module")
def single():
    batch, groups, _ = random_batch()
    return _grad(batch, groups, temperature=1.5)(*_arrays(), batch)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_mesh_equals_one_device(single, shape, axis_type):
    batch, groups, _ = random_batch()
    hidden, head = _arrays()
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(axis_type,) * 3)
    tokens = NamedSharding(mesh, P(("data", "fsdp")))
    hidden, batch = jax.device_put((hidden, batch), tokens)
    head = jax.device_put(head, NamedSharding(mesh, P("fsdp", "tensor")))
    call = _grad(batch, groups, temperature=1.5, mesh=mesh)
    compiled = call.lower(hidden, head, batch).compile()
    got = compiled(hidden, head, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **SHARDED), jax.device_get(got), jax.device_get(single))
    gathers = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    assert all(s.split(",")[0] == str(WIDTH) for s in gathers), gathers  # only the head itself, over fsdp

    dhead = got[1][1]
    assert dhead.sharding.is_equivalent_to(head.sharding, 2), "scattered back to where the head is stored"


RULES = [None, ShardingRules(embed=()), ShardingRules(vocab=()), ShardingRules(batch=("data",))]


@pytest.mark.parametrize("rules", RULES, ids=["default", "width-whole", "vocabulary-whole", "rows-over-data"])
def test_head_layouts_and_rules_agree(single, rules):
    batch, groups, _ = random_batch()
    hidden, head = _arrays()
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    options = {"temperature": 1.5, "head_layout": "vd", "mesh": mesh, "rules": rules}
    (loss, _), grads = _grad(batch, groups, **options)(hidden, head.T, batch)
    np.testing.assert_allclose(loss, single[0][0], **SHARDED)
    np.testing.assert_allclose(grads[1].T, single[1][1], **SHARDED)


def test_micro_batches_with_one_denominator_sum_to_the_batch():
    batch, groups, _ = random_batch()
    hidden, head = _arrays()
    count = float(batch.mask.sum())
    call = _grad(batch, groups, denominator=count)
    (whole, _), (_, dhead) = call(hidden, head, batch)
    halves = [call(hidden[r], head, jax.tree.map(lambda x, r=r: x[r], batch)) for r in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(sum(h[0][0] for h in halves), whole, rtol=1e-6)
    np.testing.assert_allclose(sum(h[1][1] for h in halves), dhead, rtol=1e-5, atol=1e-7)


def test_masked_positions_change_nothing_bitwise():
    batch, groups, _ = random_batch()
    hidden, head = _arrays()
    call = _grad(batch, groups)
    clean = call(hidden, head, batch)
    hidden[batch.mask == 0] = np.nan
    labels = np.where(batch.mask == 0, -100, batch.labels)
    logprobs = np.where(batch.mask[..., None, None] == 0, np.nan, batch.targets.logprobs).astype(np.float32)
    dirty = batch._replace(labels=labels, targets=batch.targets._replace(logprobs=logprobs))
    jax.tree.map(np.testing.assert_array_equal, clean, call(hidden, head, dirty))


def test_without_fusion_it_is_the_mean_cross_entropy():
    batch, groups, _ = random_batch()
    hidden, head = _arrays()
    (loss, metrics), _ = _grad(batch, groups, clm_weight=1.0, fusion_weight=0)(hidden, head, batch)
    logp = jax.nn.log_softmax(hidden @ head)
    nats = -jnp.take_along_axis(logp, jnp.asarray(batch.labels)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, (nats * batch.mask).sum() / batch.mask.sum(), rtol=1e-6)
    np.testing.assert_allclose(metrics["clm_nats"], loss, rtol=1e-6)
    assert metrics["supervised_tokens"] == 0


def test_traced_weights_and_events_without_room():
    batch, groups, _ = random_batch()
    hidden, head = _arrays()
    call = functools.partial(batch_fusion_loss, hidden, head, batch, groups)
    traced = jax.jit(lambda a, b: call(clm_weight=a, fusion_weight=b, max_members=24))(0.5, 0.5)
    np.testing.assert_allclose(
        traced[0], jax.jit(functools.partial(call, clm_weight=0.5, fusion_weight=0.5, max_members=24))()[0], rtol=1e-6
    )
    loss, metrics = jax.jit(functools.partial(call, max_members=2))()
    assert metrics["folded_events"] > 0 and np.isfinite(loss)


def test_logits_in_bfloat16_stay_near_those_in_float32(single):
    batch, groups, _ = random_batch()
    (loss, _), grads = _grad(batch, groups, temperature=1.5, logits_dtype="bfloat16")(*_arrays(), batch)
    assert 0 < abs(loss / single[0][0] - 1) < 1e-3
    for got, want in zip(grads, single[1], strict=True):
        assert np.linalg.norm(got - want) < 5e-3 * np.linalg.norm(want)


def test_every_loss_setting_of_the_configuration_is_an_option():
    named = set(inspect.signature(batch_fusion_loss).parameters) | set(LinearOptions._fields)
    assert set(LossConfig().model_dump()) <= named


def test_sizes_that_the_mesh_cannot_split():
    batch, groups, _ = random_batch()
    hidden, head = _arrays()
    mesh = jax.make_mesh((1, 1, 8), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(InputError, match="pad the vocabulary"):
        batch_fusion_loss(hidden, head[:, :30], batch, groups, mesh=mesh)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(InputError, match="over one mesh axis, the rules name fsdp, tensor"):
        batch_fusion_loss(hidden, head, batch, groups, mesh=mesh, rules=ShardingRules(vocab=("fsdp", "tensor")))
    mesh = jax.make_mesh((1, 8), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(InputError, match="width 12 cannot be split over 8"):
        batch_fusion_loss(hidden[..., :12], head[:12], batch, groups, mesh=mesh)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with pytest.raises(InputError, match="multiple of 8"):
        batch_fusion_loss(hidden[:5], head, jax.tree.map(lambda x: x[:5], batch), groups, mesh=mesh)


@pytest.mark.parametrize("shape", [None, (2, 2, 2)], ids=str)
def test_z_loss_is_a_part_of_the_cross_entropy(shape):
    batch, groups, symbol_of = random_batch()
    hidden, head = _arrays()
    mesh = None if shape is None else jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    call = _grad(batch, groups, clm_weight=0.6, fusion_weight=0.4, z_loss_weight=0.1, mesh=mesh)
    (loss, metrics), grads = call(hidden, head, batch)
    expected = _dense_oracle(hidden, head, batch, symbol_of, 0.6, 0.4, z_loss_weight=0.1)
    np.testing.assert_allclose(loss, expected[0], rtol=2e-6)
    for got, want in zip(grads, expected[1:], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    logits = hidden.astype(np.float64) @ head
    lse = np.log(np.exp(logits).sum(-1))[np.asarray(batch.mask) != 0]
    np.testing.assert_allclose(metrics["z_loss"], (lse**2).mean(), rtol=1e-5)
