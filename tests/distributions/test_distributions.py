import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.distributions import (
    avg_ce,
    empty_topk,
    from_dense,
    min_ce,
    normalize,
    to_dense,
    topk_from_logits,
    total_logprob,
)
from fusejax.errors import InputError
from fusejax.types import TopK

SEEDS = st.integers(0, 10**6)
FEW = settings(max_examples=15, deadline=None)


def _stack(*dists):
    return jax.tree.map(lambda *x: jnp.stack(x), *dists)


@FEW
@given(seed=SEEDS, temperature=st.sampled_from([0.5, 1.0, 3.0]), valid=st.sampled_from([None, 15]))
def test_topk_from_logits_equals_numpy(seed, temperature, valid):
    logits = np.random.default_rng(seed).normal(size=(3, 17)).astype(np.float32) * 3
    dist = topk_from_logits(jnp.asarray(logits), 5, temperature=temperature, valid_vocab=valid)
    z = logits[:, :valid].astype(np.float64) / temperature
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    order = np.argsort(-p, -1, kind="stable")
    np.testing.assert_array_equal(dist.ids, order[:, :5])
    np.testing.assert_allclose(dist.logprobs, np.log(np.take_along_axis(p, order[:, :5], -1)), atol=3e-6)
    rest = np.log(np.take_along_axis(p, order[:, 5:], -1).sum(-1))
    np.testing.assert_allclose(dist.residual_logprob, rest, atol=5e-6)
    np.testing.assert_allclose(total_logprob(dist), 0, atol=1e-6)


def test_ties_padding_and_whole_vocabulary():
    dist = topk_from_logits(jnp.zeros((1, 4)), 2)
    assert dist.ids.tolist() == [[0, 1]]
    np.testing.assert_allclose(jnp.exp(dist.residual_logprob), [0.5], rtol=1e-6)
    assert topk_from_logits(jnp.zeros((1, 4)), 4).residual_logprob[0] == -jnp.inf
    tiny = topk_from_logits(jnp.array([[60.0, 0.0, 0.0]]), 1)
    np.testing.assert_allclose(tiny.residual_logprob, [np.log(2) - 60], rtol=1e-6)


@pytest.mark.parametrize(("k", "temperature"), [(0, 1.0), (5, 1.0), (2, 0.0)])
def test_bad_options(k, temperature):
    with pytest.raises(InputError):
        topk_from_logits(jnp.zeros((1, 4)), k, temperature=temperature)


def test_dense_and_back():
    p = np.random.default_rng(0).dirichlet(np.ones(8), 3)
    dist = from_dense(jnp.asarray(p), 8)
    np.testing.assert_allclose(to_dense(dist, 8), p, rtol=1e-5)
    half = from_dense(jnp.asarray(p / 2), 3)
    np.testing.assert_allclose(total_logprob(half), np.log(0.5), rtol=1e-5)
    np.testing.assert_allclose(total_logprob(normalize(half)), 0, atol=1e-6)
    assert total_logprob(normalize(empty_topk((2,), 3))).tolist() == [-np.inf] * 2


@FEW
@given(seed=SEEDS)
def test_min_ce_takes_the_lowest_score_among_sources_with_mass(seed):
    rng = np.random.default_rng(seed)
    dists = [topk_from_logits(jnp.asarray(rng.normal(size=(4, 9)), jnp.float32), 3) for _ in range(3)]
    targets = _stack(*dists)
    gone = rng.random((3, 4)) < 0.4
    targets = targets._replace(logprobs=jnp.where(gone[..., None], -jnp.inf, targets.logprobs))
    scores = rng.normal(size=(3, 4)).astype(np.float32)
    best, choice = min_ce(targets, jnp.asarray(scores))
    for t in range(4):
        left = [s for s in range(3) if not gone[s, t]]
        want = min(left, key=lambda s: scores[s, t]) if left else -1
        assert choice[t] == want
        if left:
            for got, source in zip(best, targets, strict=True):
                np.testing.assert_array_equal(got[t], source[want, t])
        else:
            assert (best.ids[t] == -1).all() and (best.logprobs[t] == -jnp.inf).all()


@FEW
@given(seed=SEEDS, temperature=st.sampled_from([0.3, 1.0]))
def test_avg_ce_equals_a_dense_average(seed, temperature):
    rng = np.random.default_rng(seed)
    targets = _stack(*(topk_from_logits(jnp.asarray(rng.normal(size=(2, 9)), jnp.float32), 4) for _ in range(3)))
    scores = rng.normal(size=3).astype(np.float32)
    dist, weights = avg_ce(targets, jnp.asarray(scores), temperature=temperature)
    w = np.exp(-scores / temperature) / np.exp(-scores / temperature).sum()
    np.testing.assert_allclose(weights, np.repeat(w[:, None], 2, 1), rtol=1e-5)
    dense = np.einsum("s,stv->tv", w, np.asarray(to_dense(targets, 9)))
    np.testing.assert_allclose(to_dense(dist, 9), dense, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(total_logprob(dist), 0, atol=2e-6)
    cut, _ = avg_ce(targets, jnp.asarray(scores), temperature=temperature, k=2)
    np.testing.assert_allclose(cut.logprobs, np.log(np.sort(dense, -1)[:, :-3:-1]), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total_logprob(cut), 0, atol=2e-6)


def test_avg_ce_ignores_sources_without_mass():
    one = TopK(jnp.array([[1, 2]]), jnp.log(jnp.array([[0.5, 0.25]])), jnp.log(jnp.array([0.25])))
    dist, weights = avg_ce(_stack(one, empty_topk((1,), 2)), jnp.array([5.0, 0.0]))
    assert weights[:, 0].tolist() == [1.0, 0.0]
    assert dist.ids.tolist() == [[1, 2, -1, -1]]
    none, weights = avg_ce(_stack(empty_topk((1,), 2)), jnp.array([0.0]))
    assert (weights == 0).all() and (none.ids == -1).all() and (none.logprobs == -jnp.inf).all()


def test_scores_of_the_wrong_shape():
    with pytest.raises(InputError, match="leading part"):
        min_ce(_stack(empty_topk((2,), 2)), jnp.zeros(3))
