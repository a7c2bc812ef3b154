"""Conventions of the sparse divergences and the adversarial list."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.fused_softmax_kl import REST_FLOOR, event_divergence, lse_gather, merge_duplicates, rest_floored
from tests.pallas_kernels import oracle
from tests.pallas_kernels.compiled import quick_jit

FAST = settings(max_examples=10, deadline=None)
NEG = -np.inf


@functools.partial(quick_jit, static_argnames=("temperature", "options"))
def _divergence(logits, ids, event, logprobs, rest, temperature, options):
    def total(z):
        merged, merged_logprobs = merge_duplicates(ids, event, logprobs)
        rows = lse_gather(z, ids, temperatures=(temperature,))
        kept = jnp.where((ids >= 0) & (ids < z.shape[1]), merged, -1)
        targets = kept, merged_logprobs, rest, jnp.ones(rest.shape, bool)
        out = event_divergence(rows.z, rows.lse[:, 0], *targets, temperature=temperature, **dict(options))
        return out.sum(), out[:, 0]

    (_, value), gradient = jax.value_and_grad(total, has_aux=True)(logits)
    return value, gradient


def divergence(logits, ids, logprobs, rest, *, event=None, temperature=1.0, **options):
    """The divergence [T] and its gradient [T, V] of one distribution per position."""
    ids, logits = np.asarray(ids, np.int32), np.asarray(logits, np.float32)
    event = np.broadcast_to(np.arange(ids.shape[1]), ids.shape) if event is None else event
    targets = np.asarray(logprobs, np.float32)[:, None], np.asarray(rest, np.float32)[:, None]
    out = _divergence(logits, ids, np.asarray(event, np.int32), *targets, temperature, tuple(sorted(options.items())))
    return tuple(np.asarray(x) for x in out)


def _plain(case):
    return case.logits, case.ids, case.logprobs[:, 0], case.rest[:, 0]


def _same(a, b, **tolerance):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 1e-5, "atol": 3e-6} | tolerance))


KINDS = [("kl", "bucket"), ("kl", "renormalize"), ("kl", "zero"), ("reverse_kl", "bucket"), ("jsd", "bucket")]


@pytest.mark.parametrize(("kind", "tail"), KINDS)
class TestProperties:
    @FAST
    @given(seed=st.integers(0, 10**6), shift=st.floats(-50, 50))
    def test_shift_invariance(self, kind, tail, seed, shift):
        logits, *rest = _plain(oracle.random_case(seed))
        options = {"divergence": kind, "tail": tail, "temperature": 2.0}
        _same(divergence(logits, *rest, **options), divergence(logits + shift, *rest, **options), atol=3e-5, rtol=1e-4)

    @FAST
    @given(seed=st.integers(0, 10**6))
    def test_order_of_entries(self, kind, tail, seed):
        logits, ids, logprobs, rest = _plain(oracle.random_case(seed))
        order = np.random.default_rng(seed).permutation(ids.shape[1])
        options = {"divergence": kind, "tail": tail}
        _same(
            divergence(logits, ids, logprobs, rest, **options),
            divergence(logits, ids[:, order], logprobs[:, order], rest, **options),
        )

    @FAST
    @given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95))
    def test_splitting_an_entry_into_duplicates(self, kind, tail, seed, share):
        logits, ids, logprobs, rest = _plain(oracle.random_case(seed))
        more = np.concatenate([ids, ids[:, :1]], 1)
        split = np.concatenate([logprobs, logprobs[:, :1] + np.log(1 - share)], 1).astype(np.float32)
        split[:, 0] += np.log(share)
        options = {"divergence": kind, "tail": tail}
        _same(divergence(logits, ids, logprobs, rest, **options), divergence(logits, more, split, rest, **options))

    @FAST
    @given(seed=st.integers(0, 10**6))
    def test_entries_without_probability_change_nothing(self, kind, tail, seed):
        logits, ids, logprobs, rest = _plain(oracle.random_case(seed))
        free = np.array([[v for v in range(23) if v not in row][:2] for row in ids.tolist()])
        more = np.concatenate([ids, free], 1)
        padded = np.concatenate([logprobs, np.full((len(ids), 2), NEG)], 1)
        options = {"divergence": kind, "tail": tail}
        _same(divergence(logits, ids, logprobs, rest, **options), divergence(logits, more, padded, rest, **options))

    @FAST
    @given(seed=st.integers(0, 10**6))
    def test_gradient_sums_to_zero_and_loss_is_not_negative(self, kind, tail, seed):
        logits, ids, logprobs, rest = _plain(oracle.random_case(seed))
        value, gradient = divergence(logits, ids, logprobs, rest, divergence=kind, tail=tail)
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=2e-6)
        if tail != "zero":
            assert (value > -1e-6).all()


@FAST
@given(seed=st.integers(0, 10**6))
def test_all_tokens_as_events_equal_the_dense_divergence(seed):
    rng = np.random.default_rng(seed)
    logits, p = rng.normal(size=(4, 12)), rng.dirichlet(np.ones(12), 4)
    ids = np.stack([rng.permutation(12) for _ in range(4)])
    value, gradient = divergence(logits, ids, np.log(np.take_along_axis(p, ids, -1)), np.full(4, NEG))
    q = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(value, (p * (np.log(p) - np.log(q))).sum(-1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient, q - p, atol=1e-5)


def test_sets_with_repeated_ids_count_once():
    case = oracle.random_case(5, members=2)
    doubled = np.concatenate([case.ids, case.ids], 1), np.concatenate([case.event, case.event], 1)
    args = case.logprobs[:, 0], case.rest[:, 0]
    _same(
        divergence(case.logits, case.ids, *args, event=case.event),
        divergence(case.logits, doubled[0], *args, event=doubled[1]),
    )


@pytest.mark.parametrize("missing", [-1, 23, 2**31 - 1])
def test_an_event_outside_the_vocabulary_joins_the_rest(missing):
    logits, ids, logprobs, rest = _plain(oracle.random_case(6))
    changed = ids.copy()
    changed[:, 1] = missing
    fewer = np.delete(ids, 1, 1), np.delete(logprobs, 1, 1), np.logaddexp(rest, logprobs[:, 1])
    _same(divergence(logits, changed, logprobs, rest), divergence(logits, *fewer))


@pytest.mark.parametrize("total", [0.0, 0.6, 1.3])
def test_targets_that_do_not_sum_to_one_are_taken_as_they_are(total):
    case = oracle.random_case(7)
    with np.errstate(divide="ignore"):
        logprobs = (case.logprobs + np.log(total)).astype(np.float32)
    for tail in ("bucket", "zero"):
        value, gradient = divergence(case.logits, case.ids, logprobs[:, 0], case.rest[:, 0], tail=tail)
        assert np.isfinite(value).all() and np.isfinite(gradient).all()
        if total:
            expected = oracle.losses(case._replace(logprobs=logprobs), tail=tail)
            np.testing.assert_allclose(value, expected[1][:, 0], rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(gradient, expected[3][:, 0], rtol=1e-5, atol=3e-6)


def test_no_entries_at_all():
    value, gradient = divergence(np.zeros((3, 5)), np.zeros((3, 0)), np.zeros((3, 0)), np.zeros(3))
    assert (value == 0).all() and (gradient == 0).all()


def test_vocabulary_of_one():
    value, gradient = divergence(np.ones((1, 1)), np.zeros((1, 1)), np.zeros((1, 1)), np.full(1, NEG))
    assert abs(value[0]) < 1e-5 and (gradient == 0).all()


def test_minus_infinity_logit_at_an_event_is_an_infinite_loss_with_finite_gradient():
    logits = np.zeros((2, 6))
    logits[0, 2] = NEG
    value, gradient = divergence(logits, np.array([[2, 3], [2, 3]]), np.log(np.full((2, 2), 0.4)), np.log([0.2, 0.2]))
    assert value[0] == np.inf and np.isfinite(value[1])
    assert np.isfinite(gradient).all()


def test_rest_below_its_floor_still_pulls_bounded_and_in_the_right_direction():
    logits = np.array([[40.0, 0.0, 0.0, 0.0]])  # the model leaves about 1e-17 to the rest
    value, gradient = divergence(logits, np.array([[0]]), np.log([[0.5]]), np.log([0.5]))
    np.testing.assert_allclose(value, 0.5 * np.log(0.5) + 0.5 * np.log(0.5 / REST_FLOOR), rtol=1e-5)
    assert np.isfinite(gradient).all() and gradient[0, 0] >= 0 and (gradient[0, 1:] <= 0).all()


def test_reverse_kl_without_stored_rest_is_finite():
    logits, ids, logprobs, rest = _plain(oracle.random_case(8, rest=False))
    value, gradient = divergence(logits, ids, logprobs, rest, divergence="reverse_kl")
    assert np.isfinite(value).all() and np.isfinite(gradient).all()


def test_targets_with_hardly_any_rest_are_found():
    rest = np.log(np.array([[0.5], [1e-7], [0.0], [1e-7]], np.float32) + np.float32(1e-30))
    rest[2] = NEG
    mask = np.array([[True], [True], [True], [False]])
    assert rest_floored(jnp.asarray(rest), jnp.asarray(mask))[:, 0].tolist() == [False, True, True, False]
