"""ULD and ALM against float64 loops, their properties, and gradients against finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.losses.rivals import alm_divergence, chunk_logprobs, uld_distance
from fusejax.types import TopK

N, V = 5, 12


def _softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _source(p, k, *, ids=None):
    """The k largest of p [n, V_s] as they are stored."""
    ordered = -np.sort(-p, axis=1)
    with np.errstate(divide="ignore"):
        rest = np.log(np.maximum(ordered[:, k:].sum(1), 0))
        logprobs = np.log(ordered[:, :k])
    ids = np.tile(np.arange(k), (len(p), 1)) if ids is None else ids
    return TopK(ids.astype(np.int32), logprobs.astype(np.float32), rest.astype(np.float32))


def _uld_oracle(z, p, k, *, tail="bucket", temperature=1.0):
    """Entry by entry in float64; p [n, V_s] sorted by hand, the unknown part of it as `tail` has it."""
    found = []
    for logits, row in zip(z.astype(np.float64), p, strict=True):
        q, p_sorted = sorted(_softmax(logits / temperature), reverse=True), sorted(row, reverse=True)
        known, rest = p_sorted[:k], sum(p_sorted[k:])
        if tail == "renormalize":
            known = [x / sum(known) for x in known]
        q = q + [0.0] * max(0, k - len(q))
        total = sum(abs(a - b) for a, b in zip(q, known, strict=False))
        found.append(total + abs(sum(q[k:]) - (rest if tail == "bucket" else 0.0)))
    return np.array(found)


@pytest.mark.parametrize(("vocab", "k"), [(20, 4), (20, 20), (7, 7)])
@pytest.mark.parametrize("tail", ["bucket", "zero", "renormalize"])
def test_uld_equals_a_loop(vocab, k, tail):
    rng = np.random.default_rng(0)
    z, p = rng.normal(size=(N, V)).astype(np.float32), rng.dirichlet(np.ones(vocab), N)
    got = uld_distance(jnp.asarray(z), _source(p, k), jnp.ones(N, bool), tail=tail, temperature=1.5)
    np.testing.assert_allclose(got, _uld_oracle(z, p, k, tail=tail, temperature=1.5), rtol=2e-6, atol=5e-7)
    if tail == "bucket":  # never more than the distance to the whole distribution
        assert (got <= _uld_oracle(z, p, vocab, temperature=1.5) * (1 + 1e-6)).all()


def test_uld_sees_no_tokens_only_sizes():
    rng = np.random.default_rng(1)
    z = rng.normal(size=(N, V)).astype(np.float32)
    every = jnp.ones(N, bool)
    itself = _source(_softmax(z.astype(np.float64)), 5)
    np.testing.assert_allclose(uld_distance(jnp.asarray(z), itself, every), 0, atol=3e-7)
    other = _source(rng.dirichlet(np.ones(V), N), 5)
    shuffled = np.stack([rng.permutation(row) for row in z])
    renamed = other._replace(ids=rng.permutation(100)[:5] + 0 * other.ids)
    for logits, source in ((shuffled, other), (z, renamed)):
        got = uld_distance(jnp.asarray(logits), source, every)
        np.testing.assert_allclose(got, uld_distance(jnp.asarray(z), other, every), rtol=1e-5)
    with pytest.raises(ValueError, match="choose one of bucket"):
        uld_distance(jnp.asarray(z), other, every, tail="rest")


def test_uld_gradient_and_mask():
    rng = np.random.default_rng(2)
    z, p = rng.normal(size=(N, V)), rng.dirichlet(np.ones(9), N)
    mask = np.array([True, True, False, True, True])
    source = _source(p, 4)
    source.logprobs[2] = np.nan
    call = jax.jit(jax.value_and_grad(lambda x: uld_distance(x, source, jnp.asarray(mask)).sum()))
    dirty = z.astype(np.float32)
    dirty[2] = np.nan
    loss, gradient = call(dirty)
    assert (np.asarray(gradient)[2] == 0).all() and np.isfinite(loss)
    step = 1e-5
    for at in ((0, 3), (1, 0), (4, 11)):
        up, down = (z + step * sign * _unit(at) for sign in (1, -1))
        slope = (_uld_oracle(up, p, 4)[mask].sum() - _uld_oracle(down, p, 4)[mask].sum()) / (2 * step)
        np.testing.assert_allclose(gradient[at], slope, rtol=1e-3, atol=1e-5)


def _unit(at):
    one = np.zeros((N, V))
    one[at] = 1
    return one


def _binary(p, q):
    """KL of two coins in float64."""
    return p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 100.0])
def test_alm_is_the_divergence_of_two_coins(temperature):
    rng = np.random.default_rng(3)
    a, b = -rng.exponential(4, (2, 40))
    got = alm_divergence(jnp.asarray(a), jnp.asarray(b), jnp.ones(40, bool), temperature=temperature)
    expected = _binary(np.exp(a / temperature), np.exp(b / temperature))
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-7)
    slope = jax.grad(lambda x: alm_divergence(jnp.asarray(a), x, jnp.ones(40, bool), temperature=temperature).sum())(
        jnp.asarray(b)
    )
    q, p = np.exp(b / temperature), np.exp(a / temperature)
    np.testing.assert_allclose(slope, (q - p) / (1 - q) / temperature, rtol=2e-3, atol=2e-6)


def test_alm_is_zero_where_likelihoods_agree_and_finite_at_the_ends():
    x = jnp.array([-5.0, -1e-8, 0.0, -80.0])
    every = jnp.ones(4, bool)
    for divergence in ("kl", "jsd"):
        call = jax.value_and_grad(lambda q, d=divergence: alm_divergence(x, q, every, divergence=d).sum())
        loss, slope = call(x)
        np.testing.assert_allclose(loss, 0, atol=1e-6)
        np.testing.assert_allclose(slope[:2], 0, atol=2e-6)  # at its bound q = 1 the slope is one-sided
    loss, slope = jax.value_and_grad(lambda q: alm_divergence(jnp.array([0.0, -50.0]), q, every[:2]).sum())(
        jnp.array([-50.0, 0.0])
    )
    assert np.isfinite(loss) and np.isfinite(slope).all()
    masked = alm_divergence(x * jnp.nan, x, jnp.zeros(4, bool))
    np.testing.assert_array_equal(masked, 0)


def test_chunks_are_whole_trained_and_within_their_document():
    #          a chunk of 2, one of 1, nothing, one of 3 (the second label masked), | document: 2 of 3, then 1 | overlap
    lengths = np.array([[0, 2, 1, 0, 0, 0, 3], [0, 3, 1, 0, 2, 3, 0]])
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])
    mask = np.ones((2, 7), bool)
    mask[0, 5] = False
    logprobs = -np.arange(1.0, 15.0).reshape(2, 7)
    found = chunk_logprobs(*map(jnp.asarray, (logprobs, lengths, positions, mask)))
    np.testing.assert_array_equal(found.ends, [[0, 1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 0, 0]])
    np.testing.assert_array_equal(found.covered, [[1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(found.logprob, [[0, -3, -3, 0, 0, 0, 0], [0, 0, -10, 0, -23, 0, 0]])
    slope = jax.grad(lambda x: chunk_logprobs(x, *map(jnp.asarray, (lengths, positions, mask))).logprob.sum())(
        jnp.asarray(logprobs)
    )
    np.testing.assert_array_equal(slope, found.covered)


def test_chunk_sums_equal_a_loop():
    rng = np.random.default_rng(4)
    rows, width = 3, 40
    lengths = np.zeros((rows, width), np.int32)
    logprobs = -rng.exponential(size=(rows, width))
    expected = np.zeros((rows, width))
    for row in range(rows):
        start = 0
        while start < width - 5:
            size = int(rng.integers(1, 5))
            lengths[row, start + size - 1] = size
            expected[row, start + size - 1] = logprobs[row, start : start + size].sum()
            start += size + int(rng.integers(0, 2))
    place = np.tile(np.arange(width), (rows, 1))
    call = jax.jit(functools.partial(chunk_logprobs, mask=jnp.ones((rows, width), bool)))
    found = call(jnp.asarray(logprobs), jnp.asarray(lengths), jnp.asarray(place))
    np.testing.assert_allclose(found.logprob, expected, rtol=1e-6)
