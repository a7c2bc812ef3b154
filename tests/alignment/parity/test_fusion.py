"""MinCE and AvgCE by the papers' rewards, at every level, and their dense targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.alignment.parity import Warp
from fusejax.alignment.parity.fusion import (
    avg_ce_weights,
    block_metric,
    dense_target,
    min_ce_choice,
    rewards,
    sequence_metric,
    token_metric,
    window_metric,
)
from fusejax.alignment.parity.split import pack_rows, split_text
from fusejax.errors import InputError
from fusejax.losses import fusion_loss
from fusejax.types import TopK


def test_levels():
    realised = np.array([-1.0, -2.0, -3.0])
    assert sequence_metric(realised) == 2.0
    assert sequence_metric(realised, mask=np.array([0, 1, 1])) == 2.5
    assert np.isnan(sequence_metric(realised, mask=np.zeros(3)))
    assert block_metric([2.0, 1.0], [3, 1]) == 1.75
    beside = Warp(np.array([0, 1, 2, 2]), np.array([0, 2, 2, 2]), 0)
    assert token_metric(realised, beside).tolist() == [1.0, 2.5, 3.0, 3.0]


def test_windows():
    """Tokens predict bytes 0-2, 2-5, 5-6 and eos; windows of three bytes."""
    ends, realised = np.array([0, 2, 5, 6]), np.array([-1.0, -2.0, -4.0, -8.0])
    assert window_metric(ends, realised, 6, window_bytes=None).tolist() == [15 / 4]
    assert window_metric(ends, realised, 6, window_bytes=3).tolist() == [1.5, 14 / 3]
    assert window_metric(ends, realised, 6, window_bytes=1).tolist() == [1, 1, 2, 2, 2, 6]
    assert np.isnan(window_metric(ends + 3, realised, 9, window_bytes=3)[0])
    assert window_metric(np.array([0]), realised[:1], 0, window_bytes=4).tolist() == [1.0]


def test_min_ce():
    metrics = np.array([[2.0, 1.0, np.nan, 3.001], [2.0, 1.5, 1.0, 3.0]])
    assert min_ce_choice(metrics).tolist() == [0, 0, 1, 1]
    # bfloat16 cannot tell 3.001 from 3, and there NaN wins.
    assert min_ce_choice(metrics, reference_bugs=True).tolist() == [0, 0, 0, 0]


def test_avg_ce():
    metrics = np.array([[0.0, 1.0], [np.inf, 1.0], [np.nan, np.nan]])
    weights = avg_ce_weights(metrics)
    np.testing.assert_allclose(weights, [[np.e / (np.e + 1), 0.5], [1 / (np.e + 1), 0.5], [0, 0]])
    np.testing.assert_allclose(avg_ce_weights(metrics, reference_bugs=True), weights, atol=4e-3)
    np.testing.assert_allclose(rewards(metrics, reference_bugs=True).astype(float)[0], [1, np.exp(-1)], rtol=8e-3)


def test_dense_targets():
    made = dense_target([[3, 1, 3], []], [[1.0, 0.0, 1.0], []], 5, length=3, instead=np.full((3, 5), 0.2))
    p = 1 / (2 + np.exp(-1.0))
    np.testing.assert_allclose(made, [[0, 1 - 2 * p, 0, 2 * p, 0], [0.2] * 5, [1, 0, 0, 0, 0]])
    with pytest.raises(InputError, match="no entries"):
        dense_target([[]], [[]], 5)


@pytest.mark.once
def test_a_fallback_trains():
    """All mass on one entry and none outside: loss and gradient are finite, and are those of the label."""
    targets = TopK(np.array([[[2, -1]]], np.int32), np.array([[[0.0, -np.inf]]], np.float32), np.array([[-np.inf]]))
    logits = jnp.array([[[0.5, 0.1, -0.3, 1.0]]])

    def loss(x, **options):
        return fusion_loss(x, np.array([[2]]), targets, np.ones((1, 1)), clm_weight=0.0, fusion_weight=1.0, **options)[
            0
        ]

    wanted = -jax.nn.log_softmax(logits)[0, 0, 2]
    for tail in ("bucket", "renormalize", "zero"):
        value, gradient = jax.value_and_grad(loss)(logits, tail=tail)
        assert np.isfinite(gradient).all(), tail
        if tail != "renormalize":
            np.testing.assert_allclose(value, wanted, rtol=1e-5, err_msg=tail)


def test_packing_drops_nan_and_averages_by_tokens():
    documents = {"input_ids": [[1, 2, 3], [4], [5, 6]], "metric_ce": [1.0, float("nan"), 4.0]}
    blocks = list(pack_rows(documents, block_size=4, drop_nan=True))
    assert blocks == [{"input_ids": [1, 2, 3, 5], "metric_ce": 1.75}, {"input_ids": [6], "metric_ce": 4.0}]
    assert len(list(pack_rows(documents, block_size=4, batch=2))) == 2


def test_splitting_needs_room():
    with pytest.raises(InputError, match="48"):
        split_text("text", [(str.split, " ".join)], block_size=48)
    words = (lambda text: [ord(c) for c in text], lambda ids: "".join(map(chr, ids)))
    assert split_text("abcdefg", [words], block_size=51) == ["abc", "def", "g"]
    assert split_text("abc", [words], block_size=51) == ["abc"]
