"""Defects found by executing other libraries' losses; each one is a test that it is not here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from pallas_kernels import linear_fused_softmax_kl, linear_fusion_loss
from tests.pallas_kernels.compiled import quick_jit

TOKENS, WIDTH, VOCAB, K = 6, 8, 40, 3


def arrays(seed=0, *, vocab=VOCAB, dtype=jnp.float32):
    """Returns (hidden, head, labels, ids, logprobs, rest) with logits of standard deviation about 1."""
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.ones(K + 1), TOKENS)
    ids = np.stack([rng.permutation(vocab)[:K] for _ in range(TOKENS)]).astype(np.int32)
    hidden, head = rng.normal(size=(TOKENS, WIDTH)), rng.normal(size=(WIDTH, vocab)) / WIDTH**0.5
    labels = rng.integers(0, vocab, TOKENS).astype(np.int32)
    logs = np.log(p).astype(np.float32)
    return jnp.asarray(hidden, dtype), jnp.asarray(head, dtype), labels, ids, logs[:, :K], logs[:, K]


def total(hidden, head, labels, ids, logprobs, rest, *, clm=1.0, kl=1.0, **options):
    """The sum of both losses over all positions."""
    ones = jnp.ones(hidden.shape[0], jnp.float32)
    return linear_fusion_loss(hidden, head, labels, ids, logprobs, rest, clm * ones, kl * ones, **options)[0]


def test_padded_columns_are_masked_however_small_the_logits():
    """Zero rows of a padded head are logits of 0; with small logits they would take much of the softmax (tokamax)."""
    hidden, head, *targets = arrays(vocab=VOCAB + 1)
    padded = jnp.pad(head, [(0, 0), (0, 23)])
    for chunk in (None, 4):
        run = quick_jit(jax.value_and_grad(functools.partial(total, valid_vocab=VOCAB + 1, chunk=chunk), (0, 1)))
        value, (dhidden, dhead) = run(hidden, head, *targets)
        value2, (dhidden2, dhead2) = run(hidden, padded, *targets)
        np.testing.assert_allclose(value, value2, rtol=1e-6)
        np.testing.assert_allclose(dhidden, dhidden2, atol=1e-6)
        np.testing.assert_allclose(dhead, dhead2[:, : VOCAB + 1], atol=1e-6)


def test_statistics_are_float32_for_bfloat16_inputs():
    """A log-sum-exp kept in the inputs' dtype is wrong by up to 0.1 nats per token (tokamax, DistillKit)."""
    hidden, head, labels, ids, logprobs, rest = arrays(1, dtype=jnp.bfloat16)
    run = quick_jit(lambda *a: linear_fused_softmax_kl(*a, jnp.ones(TOKENS)))
    out = run(hidden, head, labels, ids, logprobs, rest)
    assert out.clm.dtype == out.kl.dtype == jnp.float32
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    lse = np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(out.clm, lse - logits[np.arange(TOKENS), labels], atol=2e-6)


def central_difference(fn, x, direction, step):
    return (float(fn(x + step * direction)) - float(fn(x - step * direction))) / (2 * step)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 1.5},  # levanter: the derivative of the cap is missing, 70 % off
        {"temperature": 2.0, "scale_by_temperature_squared": True},  # Axolotl: tau^2 applied after the gradients
        {"temperature": 3.0, "divergence": "jsd"},
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_loss(options):
    hidden, head, *targets = arrays(2)
    run = quick_jit(jax.value_and_grad(functools.partial(total, **options)))
    direction = jnp.asarray(np.random.default_rng(3).normal(size=hidden.shape), jnp.float32)
    slope = float((run(hidden, head, *targets)[1] * direction).sum())
    numeric = central_difference(lambda h: run(h, head, *targets)[0], hidden, direction, 1e-2)
    assert abs(slope / numeric - 1) < 2e-3


def test_the_temperature_leaves_the_cross_entropy_alone():
    """One temperature for both losses would temper the CLM loss too (VeOmni)."""
    hidden, head, labels, *targets = arrays(4)
    expected = optax.softmax_cross_entropy_with_integer_labels(hidden @ head, labels)
    for temperature in (1.0, 4.0):
        run = quick_jit(functools.partial(linear_fused_softmax_kl, temperature=temperature))
        out = run(hidden, head, labels, *targets, jnp.ones(TOKENS))
        np.testing.assert_allclose(out.clm, expected, rtol=1e-5, atol=1e-6)


def test_duplicates_count_once_in_the_value():
    """Sum p log p per entry is not that of the merged distribution (VeOmni)."""
    hidden, head, labels, ids, logprobs, rest = arrays(5)
    split = np.concatenate([logprobs, logprobs[:, :1]], 1)
    split[:, [0, K]] += np.log(0.5)
    run = quick_jit(jax.value_and_grad(total))
    once = run(hidden, head, labels, ids, logprobs, rest)
    twice = run(hidden, head, labels, np.concatenate([ids, ids[:, :1]], 1), split, rest)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), once, twice)


def test_mass_outside_the_support_is_punished():
    """A student renormalised over the top-k is free to put its mass elsewhere (MaxText, Tunix, Model-Optimizer)."""
    hidden, head, labels, ids, logprobs, _ = arrays(6)
    run = quick_jit(jax.value_and_grad(functools.partial(total, clm=0.0), 1))
    _, gradient = run(hidden, head, labels, ids, logprobs, np.full(TOKENS, -np.inf, np.float32))
    outside = [v for v in range(VOCAB) if v not in set(ids.ravel().tolist())]
    assert np.abs(np.asarray(gradient)[:, outside]).max() > 1e-3


def test_cross_entropy_alone_is_that_of_optax():
    hidden, head, labels, *targets = arrays(7)
    value, gradient = quick_jit(jax.value_and_grad(functools.partial(total, kl=0.0), (0, 1)))(
        hidden, head, labels, *targets
    )

    def plain(hidden, head):
        return optax.softmax_cross_entropy_with_integer_labels(hidden @ head, labels).sum()

    expected, expected_gradient = quick_jit(jax.value_and_grad(plain, (0, 1)))(hidden, head)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), gradient, expected_gradient)
