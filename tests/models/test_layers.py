"""Layer functions against obvious float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.models.layers import apply_rope, attention, attention_mask, rms_norm
from fusejax.models.rope import RopeConfig, rope_frequencies, rope_tables
from fusejax.parallel import Layout


def test_rms_norm_is_computed_in_float32() -> None:
    x = np.random.default_rng(0).normal(size=(3, 64)) * 30
    scale = np.linspace(0.5, 2, 64)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(jnp.float32(x), jnp.float32(scale), eps=1e-5), expected, rtol=2e-6)
    narrow = rms_norm(jnp.bfloat16(x), jnp.float32(scale), eps=1e-5)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(narrow), expected, rtol=2**-7)


def test_rope_keeps_norms_and_sees_only_distances() -> None:
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def rotated(x, position):
        cos, sin = rope_tables(RopeConfig(), jnp.array([[position]]), head_dim=8, max_positions=64)
        return apply_rope(x, cos, sin)

    np.testing.assert_allclose(jnp.linalg.norm(rotated(q, 9)), jnp.linalg.norm(q), rtol=1e-5)
    near, far = ((rotated(q, a) * rotated(k, b)).sum() for a, b in ((5, 2), (45, 42)))
    np.testing.assert_allclose(near, far, rtol=1e-4, atol=1e-5)
    assert abs(near - (q * k).sum()) > 1e-3


def test_dynamic_rope_leaves_short_rows_alone() -> None:
    rope = RopeConfig(kind="dynamic", factor=4.0)
    positions = jnp.array([np.arange(8), np.arange(8) + 32])
    cos, _ = rope_tables(rope, positions, head_dim=8, max_positions=16)
    plain, _ = rope_tables(RopeConfig(), positions, head_dim=8, max_positions=16)
    np.testing.assert_allclose(cos[0], plain[0], rtol=1e-6)  # the long neighbour does not matter
    assert np.abs(cos[1] - plain[1]).max() > 0.1


def test_scaled_frequencies_lie_between_kept_and_divided() -> None:
    plain, _ = rope_frequencies(RopeConfig(), 64)
    options = {"factor": 8.0, "original_max_position_embeddings": 512}
    for rope in (
        RopeConfig("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **options),
        RopeConfig("yarn", **options),
    ):
        scaled, _ = rope_frequencies(rope, 64)
        assert (scaled <= plain * 1.00001).all() and (scaled >= plain / 8 * 0.99999).all()
        np.testing.assert_allclose([scaled[0], scaled[-1]], [plain[0], plain[-1] / 8], rtol=1e-6)


def oracle(q, k, v, segments, window):
    """Attention position by position, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = [s for s in range(t + 1) if segments[b, s] == segments[b, t] and (window is None or t - s < window)]
        head = n // (q.shape[2] // k.shape[2])
        scores = np.array([q[b, t, n] @ k[b, s, head] for s in seen]) / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = (weights / weights.sum()) @ v[b, seen, head]
    return out


@pytest.mark.parametrize("window", [None, 1, 3])
def test_attention_is_causal_within_segments_and_window(window) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.float32(rng.normal(size=(2, 9, heads, 4))) for heads in (4, 2, 2))
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 9])
    mask = attention_mask(jnp.asarray(segments), sliding_window=window)
    ours = attention(q, k, v, mask, Layout())
    np.testing.assert_allclose(ours, oracle(q, k, v, segments, window), atol=2e-6)
