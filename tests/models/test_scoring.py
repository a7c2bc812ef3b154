"""Scores of labels and top-k distributions against a float64 log-softmax."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.models import param_table, score_tokens
from fusejax.models.scoring import _score_logits
from fusejax.parallel import batch_sharding, make_mesh, param_shardings
from tests.models.tiny import TINY, tiny_batch, tiny_logits, tiny_params

score = jax.jit(score_tokens, static_argnames=("cfg", "k", "chunk", "valid_vocab", "mesh", "rules"))
TIED = replace(TINY, tie_embeddings=True)


def log_softmax(x) -> np.ndarray:
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize(("cfg", "chunk"), [(TINY, None), (TIED, 1), (TIED, 24)])
def test_scores_equal_the_dense_log_softmax(cfg, chunk) -> None:
    params = tiny_params(cfg)
    tokens, positions, segments = tiny_batch(length=19)
    labels = jnp.roll(tokens, -1, axis=1)
    dense = log_softmax(np.asarray(tiny_logits(params, cfg, tokens, positions, segments))[..., :50])
    realised, topk = score(params, cfg, tokens, labels, positions, segments, k=5, chunk=chunk, valid_vocab=50)

    inside = np.asarray(labels) < 50
    expected = np.take_along_axis(dense, np.minimum(labels, 49)[..., None], -1)[..., 0]
    np.testing.assert_allclose(np.asarray(realised)[inside], expected[inside], atol=1e-5)
    assert np.isneginf(np.asarray(realised)[~inside]).all() and not inside.all()
    order = np.argsort(-dense, axis=-1)[..., :5]
    np.testing.assert_array_equal(topk.ids, order)
    np.testing.assert_allclose(topk.logprobs, np.take_along_axis(dense, order, -1), atol=1e-5)
    rest = np.log(np.sort(np.exp(dense), axis=-1)[..., :-5].sum(-1))
    np.testing.assert_allclose(topk.residual_logprob, rest, atol=1e-5)


def test_a_tiny_residual_keeps_its_digits() -> None:
    z = np.array([[40.0, 39.0, *np.linspace(-4, -3, 30)]])
    _, topk = _score_logits(jnp.float32(z), jnp.zeros((1,), jnp.int32), k=2, valid=32)
    np.testing.assert_allclose(topk.residual_logprob, np.log(np.exp(log_softmax(z)[0, 2:]).sum()), rtol=1e-6)


def test_more_entries_than_tokens_are_marked_unused() -> None:
    tokens, positions, segments = tiny_batch(rows=2)
    realised, topk = score(tiny_params(), TINY, tokens, tokens, positions, segments, k=7, valid_vocab=4)
    assert topk.ids.shape == (2, 16, 7) and (topk.ids[..., 4:] == -1).all()
    assert np.isneginf(topk.logprobs[..., 4:]).all() and np.isneginf(topk.residual_logprob).all()
    np.testing.assert_allclose(np.exp(topk.logprobs).sum(-1), 1, atol=1e-5)
    assert realised.shape == (2, 16)


def test_without_top_k_there_is_none() -> None:
    tokens, positions, segments = tiny_batch(rows=2)
    realised, topk = score(tiny_params(), TINY, tokens, tokens, positions, segments)
    assert topk is None and realised.dtype == jnp.float32


@pytest.mark.parametrize("options", [{"k": -1}, {"chunk": 0}, {"valid_vocab": 65}, {"valid_vocab": 0}])
def test_options_out_of_range_are_refused(options) -> None:
    tokens, positions, segments = tiny_batch(rows=2)
    with pytest.raises(ValueError, match="valid_vocab"):
        score_tokens(tiny_params(), TINY, tokens, tokens, positions, segments, **options)


def test_no_array_holds_all_logits() -> None:
    batch = tiny_batch(length=32)
    lowered = score.lower(tiny_params(), TINY, batch[0], *batch, k=3, chunk=16)
    assert "8x2x64xf32" in lowered.as_text() and "8x32x64xf32" not in lowered.as_text()


@pytest.mark.parametrize("explicit", [False, True])
def test_a_mesh_gives_the_same_scores(explicit) -> None:
    params, (tokens, positions, segments) = tiny_params(TIED), tiny_batch()
    expected, expected_topk = score(params, TIED, tokens, tokens, positions, segments, k=3)
    mesh = make_mesh(data=2, fsdp=2, tensor=2, explicit=explicit)
    placed = jax.device_put(params, param_shardings(param_table(TIED), mesh))
    batch = [jax.device_put(x, batch_sharding(mesh)) for x in (tokens, tokens, positions, segments)]
    realised, topk = score(placed, TIED, *batch, k=3, mesh=mesh)
    np.testing.assert_allclose(realised, expected, atol=1e-5)
    np.testing.assert_array_equal(topk.ids, expected_topk.ids)
    np.testing.assert_allclose(topk.residual_logprob, expected_topk.residual_logprob, atol=1e-5)
