"""Inputs that break losses, against a definition in float64 and log space; and what the arithmetic of sizes says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import linear_fused_softmax_kl, linear_fusion_loss, lse_gather
from pallas_kernels.fused_softmax_kl import REST_FLOOR, event_divergence, merge_duplicates, tiling, z_loss
from tests.pallas_kernels import oracle
from tests.pallas_kernels.compiled import quick_jit

NEG = -np.inf
KINDS = [("kl", "bucket"), ("kl", "renormalize"), ("kl", "zero"), ("reverse_kl", "bucket"), ("jsd", "bucket")]


@functools.partial(quick_jit, static_argnames=("temperature", "options"))
def _losses(logits, labels, ids, logprobs, rest, temperature, options):
    """Returns ((clm [T], divergence [T]), their gradients [T, V]) with every position weighted 1."""

    def terms(z):
        both = jnp.concatenate([labels[:, None], ids], axis=1)
        rows = lse_gather(z, both, temperatures=(1.0, temperature), relative=True)
        slots = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        targets = slots, logprobs[:, None], rest[:, None], jnp.ones((len(ids), 1), bool)
        divergence = event_divergence(rows.z[:, 1:], rows.lse[:, 1], *targets, temperature=temperature, **dict(options))
        nats = jnp.where(rows.lse[:, 0] == NEG, jnp.inf, rows.lse[:, 0] - rows.z[:, 0])
        return nats, divergence[:, 0]

    values, pull = jax.vjp(terms, logits)
    ones, zeros = jnp.ones(len(ids)), jnp.zeros(len(ids))
    return values, (pull((ones, zeros))[0], pull((zeros, ones))[0])


def _log_space(row, ids, log_p, log_rest, *, temperature, divergence, tail):
    """The divergence of one position in float64, from logarithms alone; the rest floored as documented."""
    z = row.astype(np.float64) / temperature
    z = z - z.max() - np.log(np.exp(z - z.max()).sum())
    log_q, p = z[ids], np.exp(log_p.astype(np.float64))
    if tail == "renormalize":
        p = p / p.sum()
    rest = np.exp(np.float64(log_rest))
    q_rest = max(-np.expm1(min(np.log(np.exp(log_q - log_q.max()).sum()) + log_q.max(), 0.0)), REST_FLOOR)
    p, log_q = np.append(p, rest if tail == "bucket" else 0.0), np.append(log_q, np.log(q_rest))
    log_p = np.log(np.maximum(p, 1e-300))
    if divergence == "kl":
        return (p * np.where(p > 0, log_p - log_q, 0.0)).sum()
    q = np.exp(log_q)
    if divergence == "reverse_kl":
        return (q * (log_q - log_p)).sum()
    middle = np.logaddexp(log_p, log_q) - np.log(2)
    return 0.5 * (p * (log_p - middle)).sum() + 0.5 * (q * (log_q - middle)).sum()


@pytest.mark.parametrize(("divergence", "tail"), KINDS)
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
def test_large_and_shifted_logits_lose_nothing(divergence, tail, temperature):
    case = oracle.random_case(3)
    options = {"divergence": divergence, "tail": tail}
    for logits in (case.logits * np.float32(1e4), case.logits + np.float32(1e6), case.logits * np.float32(0)):
        arrays = case.labels, case.ids, case.logprobs[:, 0], case.rest[:, 0]
        (clm, value), gradients = _losses(logits, *arrays, temperature, tuple(options.items()))
        wide = logits.astype(np.float64)
        lse = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
        np.testing.assert_allclose(clm, lse - wide[np.arange(len(wide)), case.labels], rtol=1e-6, atol=2e-6)
        rows = zip(logits, case.ids, case.logprobs[:, 0], case.rest[:, 0], strict=True)
        expected = [_log_space(*row, temperature=temperature, **options) for row in rows]
        np.testing.assert_allclose(value, expected, rtol=2e-5, atol=2e-5)
        assert all(np.isfinite(g).all() for g in gradients)
        np.testing.assert_allclose(gradients[0].sum(-1), 0.0, atol=1e-5)
        # Nothing pulls by more than its probability, but through the rest's floor: by 1 / REST_FLOOR.
        largest = 1 + 1e-5 if tail != "bucket" else 2 / REST_FLOOR
        assert np.abs(gradients[1]).max() <= largest / temperature
        if divergence == "kl" and tail != "bucket":
            p = np.exp(case.logprobs[:, 0].astype(np.float64))
            p /= p.sum(-1, keepdims=True) if tail == "renormalize" else 1
            q = np.exp((wide - wide.max(-1, keepdims=True)) / temperature)
            pull = p.sum(-1, keepdims=True) * q / q.sum(-1, keepdims=True)
            np.put_along_axis(pull, case.ids, np.take_along_axis(pull, case.ids, -1) - p, -1)
            np.testing.assert_allclose(gradients[1], pull / temperature, rtol=1e-5, atol=2e-6 / temperature)


@pytest.mark.parametrize(("divergence", "tail"), KINDS)
def test_a_row_of_minus_infinity_is_an_infinite_loss_without_gradient(divergence, tail):
    case = oracle.random_case(4)
    logits = case.logits.copy()
    logits[2] = NEG
    arrays = case.labels, case.ids, case.logprobs[:, 0], case.rest[:, 0]
    (clm, value), gradients = _losses(logits, *arrays, 1.0, (("divergence", divergence), ("tail", tail)))
    assert np.flatnonzero(np.isinf(clm)).tolist() == np.flatnonzero(np.isinf(value)).tolist() == [2]
    for gradient in gradients:
        assert np.isfinite(gradient).all() and (np.asarray(gradient[2]) == 0).all()
        assert (np.asarray(gradient[3]) != 0).any()


def test_columns_of_minus_infinity_are_no_tokens():
    """A vocabulary masked by value is the smaller vocabulary."""
    case = oracle.random_case(5, vocab=20)
    wide = np.concatenate([case.logits, np.full((len(case.logits), 7), NEG, np.float32)], axis=1)
    arrays = case.labels, case.ids, case.logprobs[:, 0], case.rest[:, 0]
    for divergence, tail in KINDS:
        options = ("divergence", divergence), ("tail", tail)
        values, gradients = _losses(case.logits, *arrays, 2.0, options)
        masked, masked_gradients = _losses(wide, *arrays, 2.0, options)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), masked, values)
        for a, b in zip(masked_gradients, gradients, strict=True):
            np.testing.assert_allclose(a[:, :20], b, atol=1e-6)
            assert (np.asarray(a[:, 20:]) == 0).all()


def _linear(labels, weights, **changes):
    rng = np.random.default_rng(6)
    hidden, head = rng.normal(size=(6, 8)).astype(np.float32), rng.normal(size=(8, 20)).astype(np.float32)
    ids = np.stack([rng.permutation(20)[:3] for _ in range(6)]).astype(np.int32)
    labels = ids[:, 0] if labels is None else np.asarray(labels, np.int32)
    arrays = {"ids": ids, "logprobs": np.log(np.full((6, 3), 0.2)), "rest": np.log(np.full(6, 0.4))} | changes
    targets = labels, arrays["ids"], jnp.float32(arrays["logprobs"]), jnp.float32(arrays["rest"])

    def loss(hidden, head):
        return linear_fusion_loss(hidden, head, *targets, jnp.float32(weights), jnp.float32(weights), chunk=4)

    (value, out), gradients = quick_jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, head)
    return value, out, gradients, hidden @ head, labels


def test_labels_outside_the_vocabulary_have_no_cross_entropy_whatever_their_weight():
    value, out, gradients, _, _ = _linear([-100, 20, -1, 2**31 - 1, 3, 4], np.ones(6))
    assert (np.asarray(out.clm[:4]) == 0).all() and (np.asarray(out.clm[4:]) > 0).all()
    assert (np.asarray(out.z_loss[:4]) == 0).all() and (np.asarray(out.kl) > 0).all()
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradients)


def test_a_label_that_is_an_event_too_adds_both_gradients():
    value, out, (_, dhead), logits, labels = _linear(None, np.ones(6))
    q = np.exp(logits - logits.max(-1, keepdims=True))
    q /= q.sum(-1, keepdims=True)
    np.testing.assert_allclose(out.clm, -np.log(q[np.arange(6), labels]), rtol=1e-5)
    np.testing.assert_allclose(value, (out.clm + out.kl).sum(), rtol=1e-6)
    np.testing.assert_allclose(dhead.sum(axis=1), 0.0, atol=1e-5)


def test_no_events_at_all_leave_the_cross_entropy():
    nothing = {"ids": np.zeros((6, 0), np.int32), "logprobs": np.zeros((6, 0)), "rest": np.zeros(6)}
    value, out, gradients, _, _ = _linear([1, 2, 3, 4, 5, 6], np.ones(6), **nothing)
    assert (np.asarray(out.kl) == 0).all()
    np.testing.assert_allclose(value, out.clm.sum(), rtol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)


def test_logits_near_the_end_of_float32_overflow_where_the_readme_says():
    logits = jnp.array([[1.7e38, -1.7e38, 0.0], [3e38, -3e38, 0.0]])
    rows = lse_gather(logits, jnp.array([[1], [1]]))
    np.testing.assert_allclose(rows.lse[:, 0], [1.7e38, 3e38], rtol=1e-6)
    assert float(rows.z[0, 0]) == pytest.approx(-1.7e38, rel=1e-6) and float(rows.z[1, 0]) == NEG


@pytest.mark.parametrize("vocab", [32000, 50257])
def test_vocabularies_of_real_models_by_value(vocab):
    rng = np.random.default_rng(0)
    logits, ids = (3 * rng.normal(size=(3, vocab))).astype(np.float32), np.array([[0, vocab - 1, vocab]] * 3, np.int32)
    rows = quick_jit(functools.partial(lse_gather, temperatures=(0.1, 1.0, 100.0)))(logits, ids)
    for i, t in enumerate((0.1, 1.0, 100.0)):
        wide = logits.astype(np.float64) / t
        expected = np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1)) + wide.max(-1)
        np.testing.assert_allclose(rows.lse[:, i], expected, rtol=1e-6)
    np.testing.assert_allclose(rows.z, np.pad(logits[:, [0, -1]], [(0, 0), (0, 1)]), atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_events_that_hang_together_are_one(seed):
    """Against union by union in plain Python: shared ids join events, also by way of others."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 9, (1, 12)).astype(np.int32)
    event = np.where(rng.random((1, 12)) < 0.2, -1, rng.integers(0, 6, (1, 12))).astype(np.int32)
    logprobs = np.log(rng.dirichlet(np.ones(6), (1, 1))).astype(np.float32)
    found, merged = _merged(ids, event, logprobs)
    groups = [{e} for e in range(6)]
    for token in range(9):
        joined = {int(e) for e in event[0][ids[0] == token] if e >= 0}
        touched = [g for g in groups if g & joined]
        groups = [g for g in groups if not g & joined] + ([set().union(*touched)] if touched else [])
    for group in groups:
        first, *others = sorted(group)
        total = np.exp(logprobs[0, 0, sorted(group)]).sum()
        np.testing.assert_allclose(np.exp(merged[0, 0, first]), total, rtol=1e-5)
        assert all(merged[0, 0, e] == NEG for e in others)
    members = {(int(e), int(i)) for e, i in zip(found[0], ids[0], strict=True) if e >= 0}
    assert len(members) == (np.asarray(found) >= 0).sum()  # each id once
    owner = {e: min(g) for g in groups for e in g}
    assert members == {(owner[int(e)], int(i)) for e, i in zip(event[0], ids[0], strict=True) if e >= 0}


_merged = quick_jit(merge_duplicates)


def test_chunks_come_from_the_memory_budget():
    assert tiling.chunk_tokens(2**20, 32000) == 4096  # of float32: 500 MiB
    assert tiling.chunk_tokens(2**20, 32000, itemsize=2) == 8192
    assert tiling.chunk_tokens(2**20, 256000) == 512
    assert tiling.chunk_tokens(64, 32000) == 16  # a quarter of the tokens
    assert tiling.chunk_tokens(1, 10**9) == 8


def test_blocks_of_the_gpu_kernels_leave_no_part_of_a_row_empty():
    for tokens, vocab in ((1, 8), (64, 1000), (2048, 32000), (8192, 128256), (10**6, 256000)):
        blocks = tiling.gpu_blocks(tokens, vocab)
        steps = -(-vocab // blocks.columns)
        each = -(-steps // blocks.splits)
        assert (blocks.splits - 1) * each < steps <= blocks.splits * each
        assert 1 <= blocks.stages <= steps


def test_temporaries_are_a_fourteenth_of_those_of_dense_losses():
    """Compiled, not run, at the size of the target; 64 MiB of them are one chunk's logits."""
    tokens, embed, vocab, k = 2048, 512, 32000, 32
    s = jax.ShapeDtypeStruct
    hidden, head, labels = s((tokens, embed), "f"), s((embed, vocab), "f"), s((tokens,), jnp.int32)
    ids, logprobs, row = s((tokens, k), jnp.int32), s((tokens, k), "f"), s((tokens,), "f")

    def dense(hidden, head, labels, target):
        logits = hidden @ head
        clm = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1).mean()
        return clm + (target * (jnp.log(target + 1e-9) - jax.nn.log_softmax(logits / 2))).sum(-1).mean()

    def ours(hidden, head, *targets):
        return linear_fusion_loss(hidden, head, *targets, temperature=2.0)[0]

    def temporaries(loss, *arguments):
        compiled = quick_jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head, labels, *arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    naive = temporaries(dense, s((tokens, vocab), "f"))
    assert 14 * temporaries(ours, ids, logprobs, row, row, row) <= naive


def test_z_loss_alone():
    lse, mask = jnp.array([2.0, NEG, 3.0, NEG, jnp.nan]), jnp.array([True, True, False, False, False])
    value, gradient = jax.value_and_grad(lambda x: jnp.where(jnp.isinf(z_loss(x, mask)), 0.0, z_loss(x, mask)).sum())(
        lse
    )
    assert z_loss(lse, mask).tolist() == [4.0, np.inf, 0.0, 0.0, 0.0]
    assert float(value) == 4.0 and gradient.tolist() == [4.0, 0.0, 0.0, 0.0, 0.0]


def test_unreduced_losses_take_infinite_rows_and_masked_ones():
    """-inf through the matmul: a head with an infinite row makes every logit of positive hidden states -inf."""
    hidden, head = jnp.ones((3, 2)).at[1].set(-1.0), jnp.full((2, 5), NEG)
    targets = jnp.zeros(3, jnp.int32), jnp.zeros((3, 1), jnp.int32), jnp.log(jnp.full((3, 1), 0.5)), jnp.full(3, -0.7)
    out = linear_fused_softmax_kl(hidden, head, *targets, jnp.array([1.0, 0.0, 0.0]))
    assert out.clm.tolist() == out.kl.tolist() == [np.inf, 0.0, 0.0]
