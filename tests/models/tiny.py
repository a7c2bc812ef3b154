"""A small model and batch that the tests of models, meshes and scoring share."""

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.models import ModelConfig, logits, param_table
from fusejax.parallel import unflatten_paths

TINY = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2)

tiny_logits = jax.jit(logits, static_argnames=("cfg", "mesh", "rules"))


def tiny_params(cfg: ModelConfig = TINY):
    """Random parameters that matter: norms and biases away from one and zero. Drawn by numpy: nothing to compile."""
    rng = np.random.default_rng(0)
    return unflatten_paths(
        {
            path: jnp.asarray(rng.normal(spec.initializer == "ones", 0.25, spec.shape), jnp.float32)
            for path, spec in param_table(cfg).items()
        }
    )


def tiny_batch(*, rows: int = 8, length: int = 16, vocab_size: int = 64):
    """Tokens, positions and segment ids `[rows, length]`: two documents per row, then padding."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (rows, length))
    cut, end = length // 3, length - 2
    index = np.arange(length)
    segments = np.where(index < cut, 1, np.where(index < end, 2, 0))
    positions = np.where(index < cut, index, np.where(index < end, index - cut, 0))
    return tuple(
        jnp.asarray(x, jnp.int32) for x in (tokens, np.tile(positions, (rows, 1)), np.tile(segments, (rows, 1)))
    )
