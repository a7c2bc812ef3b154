import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.losses import clm_loss, fusion_loss, topk_divergence
from fusejax.types import TopK
from tests.losses.groups import compressed, random_symbols
from tests.pallas_kernels import oracle


def _problem():
    case = oracle.random_case(0, tokens=6)
    logprobs = case.logprobs[:, 0].copy()
    logprobs[2] = -np.inf  # no mass there
    shape = lambda x: jnp.asarray(x).reshape(2, 3, *x.shape[1:])  # noqa: E731
    targets = TopK(*map(shape, (case.ids, logprobs, case.rest[:, 0])))
    return case, shape(case.logits), shape(case.labels), targets, jnp.array([[1.0, 1, 1], [1, 0, 1]])


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"divergence": "jsd", "tail": "zero"}], ids=str)
def test_loss_equals_oracle(options):
    case, logits, labels, targets, mask = _problem()
    call = jax.jit(jax.value_and_grad(lambda z: fusion_loss(z, labels, targets, mask, **options), has_aux=True))
    (loss, metrics), gradient = call(logits)
    clm, kl, dclm, dkl = oracle.losses(case, **options)
    keep = np.array([1, 1, 1, 1, 0, 1]) / 5
    alone = np.array([0, 0, 1, 0, 0, 0])
    a, b = keep * np.where(alone, 1.0, 0.9), keep * np.where(alone, 0, 0.1)
    np.testing.assert_allclose(loss, (a * clm).sum() + (b * kl[:, 0]).sum(), rtol=2e-6)
    expected = a[:, None] * dclm + b[:, None] * dkl[:, 0]
    np.testing.assert_allclose(gradient.reshape(6, -1), expected, rtol=1e-5, atol=1e-6)
    assert metrics["tokens"] == 5 and metrics["supervised_tokens"] == 4
    np.testing.assert_allclose(metrics["clm_nats"], (5 * keep * clm).sum() / 5, rtol=2e-6)


def test_partitioned_targets():
    rng = np.random.default_rng(1)
    symbol_of = random_symbols(rng, 20, 9)
    known = np.unique(symbol_of[symbol_of >= 0])
    ids = np.stack([rng.permutation(known)[:3] for _ in range(4)])
    p = rng.dirichlet(np.ones(4), 4)
    logits = rng.normal(size=(4, 20)).astype(np.float32)
    targets = TopK(jnp.asarray(ids, jnp.int32), jnp.log(p[:, :3]), jnp.log(p[:, 3]))
    got = topk_divergence(jnp.asarray(logits), targets, jnp.ones(4), groups=compressed(symbol_of), max_members=20)
    for t in range(4):
        sets = [set(np.flatnonzero(symbol_of == s)) for s in ids[t]]
        np.testing.assert_allclose(got[t], oracle.position(logits[t], sets, p[t, :3], p[t, 3])[0], rtol=1e-5)


def test_labels_outside_the_vocabulary_have_no_loss():
    logits = jnp.zeros((3, 5))
    nats = clm_loss(logits, jnp.array([1, -100, 4]), jnp.ones(3), valid_vocab=4)
    np.testing.assert_allclose(nats, [np.log(4), 0, 0], rtol=1e-6)


def test_an_empty_mask_gives_zero():
    _, logits, labels, targets, mask = _problem()
    loss, gradient = jax.jit(jax.value_and_grad(lambda z: fusion_loss(z, labels, targets, 0 * mask)[0]))(logits)
    assert loss == 0 and (np.asarray(gradient) == 0).all()
