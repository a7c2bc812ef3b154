"""The forward pass: what may influence what, rematerialisation, dtypes, the module as a pytree."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from fusejax.models import hidden_states
from fusejax.models.llama import Llama
from tests.models.tiny import TINY, tiny_batch, tiny_logits, tiny_params


def test_the_state_of_the_module_is_the_parameter_tree() -> None:
    params = tiny_params(replace(TINY, attention_bias=True))
    state = nnx.to_pure_dict(nnx.state(Llama(params, TINY)))
    assert jax.tree.structure(state) == jax.tree.structure(params)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(params), strict=True))


def test_packed_documents_read_as_if_alone() -> None:
    params = tiny_params()
    tokens, positions, segments = tiny_batch(rows=2)
    packed = tiny_logits(params, TINY, tokens, positions, segments)
    for segment in (1, 2):
        where = np.flatnonzero(segments[0] == segment)
        alone = tiny_logits(params, TINY, *(x[:, where] for x in (tokens, positions, jnp.ones_like(segments))))
        np.testing.assert_allclose(packed[:, where], alone, atol=1e-5)


def test_later_tokens_change_nothing_before() -> None:
    params = tiny_params()
    tokens, positions, segments = tiny_batch(rows=2)
    changed = tokens.at[:, 9].set((tokens[:, 9] + 1) % 64)
    before, after = (np.asarray(tiny_logits(params, TINY, t, positions, segments)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert np.abs(before[:, 9:14] - after[:, 9:14]).max() > 1e-3


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_rematerialisation_changes_neither_value_nor_gradient(remat: str) -> None:
    params, batch = tiny_params(), tiny_batch()

    def loss(params, cfg):
        return jnp.square(hidden_states(params, cfg, *batch)).mean()

    step = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradient = step(params, TINY)
    again, gradient_again = step(params, replace(TINY, remat=remat))
    np.testing.assert_allclose(value, again, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max()), gradient, gradient_again)


def test_bfloat16_activations_follow_float32_closely() -> None:
    params, batch = tiny_params(), tiny_batch()
    exact = tiny_logits(params, TINY, *batch)
    narrow_cfg = replace(TINY, dtype="bfloat16")
    assert hidden_states(params, narrow_cfg, *batch).dtype == jnp.bfloat16
    narrow = tiny_logits(params, narrow_cfg, *batch)
    assert narrow.dtype == jnp.float32
    assert np.abs(narrow - exact).max() < 0.03 * np.abs(exact).max()


def test_padding_and_single_tokens_stay_finite() -> None:
    params = tiny_params()
    ones = jnp.ones((1, 1), jnp.int32)
    assert np.isfinite(tiny_logits(params, TINY, ones, 0 * ones, 0 * ones)).all()


def test_a_token_beyond_the_vocabulary_is_not_read_as_another() -> None:
    ones = jnp.ones((1, 1), jnp.int32)
    assert np.isnan(tiny_logits(tiny_params(), TINY, 64 * ones, 0 * ones, ones)).all()
