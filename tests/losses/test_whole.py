"""The loss from whole logits: equal to the gathered one, and to dense float64 sums where everything is stored."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from fusejax.errors import InputError
from fusejax.losses import batch_fusion_loss
from fusejax.losses.rivals import uld_distance
from fusejax.losses.weights import position_weights, spare_weight, supervision_masks
from fusejax.losses.whole import batch_whole_loss, symbol_tables
from fusejax.types import TopK
from tests.losses.groups import random_batch

WIDTH, VOCAB = 16, 32


def _arrays(seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(8, 6, WIDTH)).astype(np.float32)
    return hidden, (0.4 * rng.normal(size=(WIDTH, VOCAB))).astype(np.float32)


def _grad(call, batch, groups, **options):
    loss = lambda h, w: call(h, w, batch, groups, **options)  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*_arrays())


@pytest.mark.parametrize(
    "options",
    [
        {"unsupervised": "none"},
        pytest.param(
            {"divergence": "jsd", "tail": "renormalize", "scale_by_temperature_squared": True, "temperature": 0.5},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_equals_the_gathered_loss(options):
    batch, groups, _ = random_batch()
    hidden = _grad(batch_fusion_loss, batch, groups, max_members=VOCAB, **options)
    whole = _grad(batch_whole_loss, batch, groups, chunk=5, **options)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6), whole, hidden)


def test_whole_distributions_give_the_dense_kl():
    """K = V, no rest: KL(P || Q) of two dense distributions over the symbols of each source, in float64."""
    batch, groups, symbol_of = random_batch(mixed=1)
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.full(VOCAB, 0.3), batch.mask.shape)
    ids = np.full((*batch.mask.shape, 1, VOCAB), -1, np.int32)
    logprobs = np.full(ids.shape, -np.inf, np.float32)
    expected = 0.0
    hidden, head = _arrays()
    logits = hidden.astype(np.float64) @ head
    q = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    for at in np.ndindex(batch.mask.shape):
        known = np.unique(symbol_of[batch.partition[at][0]])
        known = known[known >= 0]
        of_source = p[at][: len(known) + 1] / p[at][: len(known) + 1].sum()  # the last: what has no symbol
        ids[at][0, : len(known)], logprobs[at][0, : len(known)] = known, np.log(of_source[:-1])
        batch.targets.residual_logprob[at] = np.log(of_source[-1])
        if batch.mask[at] and batch.partition[at][0] >= 0:
            table = symbol_of[batch.partition[at][0]]
            of_model = np.array([*(q[at][table == s].sum() for s in known), q[at][table < 0].sum()])
            expected += (of_source * np.log(of_source / of_model)).sum()
    targets = TopK(ids, logprobs, batch.targets.residual_logprob)
    batch = batch._replace(targets=targets, weights=np.ones_like(batch.weights))
    options = {"clm_weight": 0.0, "fusion_weight": 1.0, "unsupervised": "none", "denominator": 1.0}
    (loss, metrics), gradients = _grad(batch_whole_loss, batch, groups, **options)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    assert metrics["folded_events"] == 0 and metrics["floored_rests"] == 0
    assert all(np.isfinite(g).all() for g in gradients)


def test_uld_in_a_batch_of_two_sources():
    batch, groups, _ = random_batch()
    options = {"clm_weight": 0.0, "fusion_weight": 1.0, "unsupervised": "none", "denominator": 1.0}
    call = functools.partial(batch_whole_loss, *_arrays(), batch, groups, chunk=7, divergence="uld", **options)
    loss, metrics = jax.jit(call)()
    logits, expected = _arrays()[0] @ _arrays()[1], 0.0
    for m in range(2):
        live = (batch.mask > 0) & (batch.partition[..., m] >= 0)
        one = TopK(*(x[:, :, m][live] for x in batch.targets))
        expected += (uld_distance(logits[live], one, np.ones(live.sum(), bool)) * batch.weights[..., m][live]).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics["supervised_tokens"] == ((batch.mask > 0) & (batch.partition >= 0).any(-1)).sum()


def test_alm_in_a_batch_of_two_sources():
    """Chunks of two and three tokens; covered positions take CLM once, all others with the divergence's weight too."""
    batch, groups, _ = random_batch(k=1)
    shape = batch.mask.shape
    lengths, said = np.full((*shape, 2, 1), -1), np.full((*shape, 2, 1), -np.inf)
    lengths[:, 1, 0], lengths[:, 4, 1], said[:, 1, 0], said[:, 4, 1] = 2, 3, -2.5, -4.0
    partition = np.where(lengths[..., 0] > 0, np.arange(2), -1).astype(np.int32)
    place = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    targets = TopK(lengths.astype(np.int32), said.astype(np.float32), np.zeros((*shape, 2), np.float32))
    batch = batch._replace(partition=partition, positions=place, targets=targets)
    options = {"clm_weight": 0.7, "fusion_weight": 0.3, "denominator": 1.0}
    options |= {"divergence": "alm", "temperature": 5.0}
    loss, metrics = jax.jit(functools.partial(batch_whole_loss, *_arrays(), batch, groups, **options))()
    logp = np.asarray(jax.nn.log_softmax(_arrays()[0] @ _arrays()[1]))
    own = np.take_along_axis(logp, batch.labels[..., None], -1)[..., 0]
    expected, chunks = 0.0, 0
    for row in range(shape[0]):
        covered = np.zeros(shape[1], bool)
        for m, (first, after) in enumerate(((0, 2), (2, 5))):
            if batch.mask[row, first:after].all():
                p, q = (np.exp(x / 5.0) for x in (said[row, after - 1, m, 0], own[row, first:after].sum()))
                coin = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
                expected += 0.3 * batch.weights[row, after - 1, m] * coin
                covered[first:after], chunks = True, chunks + 1
        expected -= (np.where(covered, 0.7, 1.0) * own[row])[batch.mask[row] > 0].sum()
    assert chunks > 3 and metrics["supervised_tokens"] == chunks
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_masked_positions_change_nothing_bitwise():
    batch, groups, _ = random_batch()
    hidden, head = _arrays()
    call = jax.jit(jax.value_and_grad(lambda h, w, b: batch_whole_loss(h, w, b, groups)[0], (0, 1)))
    clean = call(hidden, head, batch)
    hidden[batch.mask == 0] = np.nan
    labels = np.where(batch.mask == 0, -100, batch.labels)
    logprobs = np.where(batch.mask[..., None, None] == 0, np.nan, batch.targets.logprobs).astype(np.float32)
    dirty = batch._replace(labels=labels, targets=batch.targets._replace(logprobs=logprobs))
    jax.tree.map(np.testing.assert_array_equal, clean, call(hidden, head, dirty))


@pytest.mark.slow
def test_mesh_equals_one_device():
    batch, groups, _ = random_batch()
    single = _grad(batch_whole_loss, batch, groups)
    mesh = jax.make_mesh((2, 4, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    meshed = _grad(batch_whole_loss, batch, groups, mesh=mesh)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=5e-6, atol=1e-7), meshed, single)
    mesh = jax.make_mesh((1, 4, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(InputError, match="set mesh"):
        _grad(batch_whole_loss, batch, groups, mesh=mesh)


def test_symbols_of_tokens_are_the_partitions():
    np.testing.assert_array_equal(symbol_tables(None, 5), [np.arange(5)])
    _, groups, symbol_of = random_batch()
    got = np.asarray(symbol_tables(jax.tree.map(jnp.asarray, groups), VOCAB))
    np.testing.assert_array_equal(np.where(got == VOCAB, -1, got), symbol_of)


def test_what_takes_the_divergences_weight_where_there_is_none():
    batch, _, _ = random_batch()
    masks = supervision_masks(batch)
    full, less = (position_weights(batch, masks, 0.9, 0.1, 2.0, unsupervised=how)[0] for how in ("clm", "none"))
    alone = ~(batch.partition >= 0).any(-1)
    assert (alone & (batch.mask > 0)).any()
    np.testing.assert_allclose(less, 0.45 * batch.mask, rtol=1e-6)
    np.testing.assert_allclose(full, np.where(alone, 0.5, 0.45) * batch.mask, rtol=1e-6)
    with pytest.raises(ValueError, match="choose one of clm, none"):
        spare_weight(0.9, 0.1, "kl")
