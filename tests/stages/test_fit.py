"""The loss that a run trains on: no array of tokens by vocabulary in the compiled step."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.alignment import event_groups
from fusejax.models import ModelConfig, init_params
from fusejax.stages import fit
from fusejax.stages.fit import loss_function
from fusejax.types import EventGroups, FusionBatch, TopK

# Sizes that no other dimension of the program shares.
ROWS, LENGTH, VOCAB, K = 8, 64, 1031, 5


def _batch(rng):
    def integers(high, *shape):
        return jnp.asarray(rng.integers(0, high, (ROWS, LENGTH, *shape)), jnp.int32)

    probability = rng.dirichlet(np.ones(K + 1), (ROWS, LENGTH, 1))
    targets = TopK(
        integers(VOCAB, 1, K),
        jnp.asarray(np.log(probability[..., :K]), jnp.float32),
        jnp.asarray(np.log(probability[..., K]), jnp.float32),
    )
    ones = jnp.ones((ROWS, LENGTH))
    positions = jnp.broadcast_to(jnp.arange(LENGTH, dtype=jnp.int32), (ROWS, LENGTH))
    partition = jnp.zeros((ROWS, LENGTH, 1), jnp.int32)
    return FusionBatch(
        tokens=integers(VOCAB),
        labels=integers(VOCAB),
        segment_ids=jnp.ones((ROWS, LENGTH), jnp.int32),
        positions=positions,
        mask=ones,
        targets=targets,
        partition=partition,
        weights=ones[..., None],
    )


@pytest.mark.parametrize("tied", [True, False])
def test_no_array_of_tokens_by_vocabulary(tied):
    rng = np.random.default_rng(0)
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_layers=2, num_heads=2, tie_embeddings=tied
    )
    groups = event_groups((np.arange(VOCAB) // 4 * 4).astype(np.int32))  # four tokens to a symbol
    groups = EventGroups(np.asarray(groups.offsets)[None], np.asarray(groups.members)[None])
    loss = {"clm_weight": 0.9, "fusion_weight": 0.1, "max_members": 32, "chunk": 64}
    loss_fn = loss_function(config, groups, loss, None)
    params = init_params(config, jax.random.key(0))
    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    compiled = step.lower(params, _batch(rng), jnp.float32(ROWS * LENGTH)).compile()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\d+\[([\d,]+)\]", compiled.as_text())}
    with_vocabulary = {shape for shape in shapes if VOCAB in shape}
    assert (VOCAB, 24) in with_vocabulary or (24, VOCAB) in with_vocabulary  # the head is there: the test can see
    largest = max(np.prod(shape) for shape in with_vocabulary)
    assert largest <= 64 * VOCAB < ROWS * LENGTH * VOCAB
    (value, metrics), _ = compiled(params, _batch(np.random.default_rng(1)), jnp.float32(ROWS * LENGTH))
    assert np.isfinite(value)
    assert metrics["supervised_tokens"] == ROWS * LENGTH


@pytest.mark.parametrize(
    ("kind", "peak"), [("NVIDIA H100 80GB HBM3", 989.4e12), ("TPU v5 lite", 197e12), ("cpu", None)]
)
def test_the_share_of_the_peak_where_the_device_is_known(monkeypatch, kind, peak):
    monkeypatch.setattr(fit.jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    config = ModelConfig(vocab_size=100, hidden_size=8, intermediate_size=16, num_layers=2, num_heads=2)
    share = fit.peak_share(config, 32, devices=4)
    if peak is None:
        assert share is None
        return
    assert share is not None
    matrices = 2 * (4 * 8 * 8 + 3 * 8 * 16) + 100 * 8
    flops = 6 * matrices + 12 * 2 * 8 * 33 / 2  # attention sees (T + 1) / 2 positions
    assert share({"tokens_per_second": 1e6})["peak_share"] == pytest.approx(1e6 * flops / (4 * peak))
