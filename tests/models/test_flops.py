import jax
import jax.numpy as jnp
import pytest

from fusejax.models import ModelConfig, count_params, hidden_states, init_params
from fusejax.models.flops import flops_per_token


@pytest.mark.parametrize("tied", [True, False])
def test_it_is_six_per_parameter_that_is_multiplied_and_attention(tied):
    config = ModelConfig(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4, num_kv_heads=2,
        tie_embeddings=tied,
    )  # fmt: skip
    norms = (2 * 3 + 1) * 64
    looked_up = 0 if tied else 512 * 64
    attention = 12 * 3 * 64 * (100 + 1) / 2
    assert flops_per_token(config, 100) == 6 * (count_params(config) - norms - looked_up) + attention


def test_xla_counts_a_third_of_it_in_a_forward_pass():
    config = ModelConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4, tie_embeddings=True
    )
    rows, length = 2, 32
    tokens = jnp.zeros((rows, length), jnp.int32)
    params = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def forward(params):
        hidden = hidden_states(params, config, tokens, tokens, tokens + 1)
        return hidden @ params["embed"]["embedding"].T

    found = jax.jit(forward).lower(params).compile().cost_analysis()["flops"]
    # XLA counts a scan's body once and attention over all positions; elementwise work comes on top.
    one_layer = flops_per_token(config, length) - 6 * 2 * 256 * 64
    expected = rows * length / 3 * (one_layer / 2 + 6 * 256 * 64)
    assert found == pytest.approx(expected, rel=0.35)
