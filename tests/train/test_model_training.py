"""The whole training step: loader, Llama, fused loss, AdamW, on every kind of mesh."""

import jax
import numpy as np
import pytest

from fusejax.data.loader import FusionLoader
from fusejax.losses.fused import batch_fusion_loss
from fusejax.models import ModelConfig, decay_mask, head_kernel, hidden_states, init_params, param_table
from fusejax.parallel import ShardingRules, batch_sharding, make_mesh, param_shardings
from fusejax.train.loop import train
from fusejax.train.optimizer import make_optimizer

from .toy import Record

CFG = ModelConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2)
STEPS = 3

pytestmark = pytest.mark.slow  # each mesh compiles the whole step


def fused_records(count=40, entries=4):
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        n = int(rng.integers(4, 40))
        # Something to learn in a few steps: a quarter of the tokens occurs, and the source prefers a few of these.
        x = 4 * rng.integers(0, CFG.vocab_size // 4, n + 1).astype(np.int32)
        ids = np.broadcast_to(8 * np.arange(entries, dtype=np.int32), (n, 1, entries))
        probabilities = rng.dirichlet(2 * np.arange(entries + 1, 0, -1), (n, 1))
        arrays = {
            "tokens": x[:-1],
            "labels": x[1:],
            "mask": (rng.random(n) < 0.9).astype(np.int8),
            "ids": ids,
            "logprobs": np.log(probabilities[..., :-1]).astype(np.float32),
            "residual_logprob": np.log(probabilities[..., -1]).astype(np.float32),
            "partition": rng.integers(-1, 1, (n, 1)).astype(np.int32),
            "weights": np.ones((n, 1), np.float32),
        }
        records.append(Record(f"doc{number}", {}, arrays))
    return records


def run(sizes=None, *, explicit=False, accumulation=1, steps=STEPS, **kept):
    mesh = None if sizes is None else make_mesh(**sizes, explicit=explicit)
    rules = ShardingRules()

    def loss_fn(params, batch, denominator):
        hidden = hidden_states(params, CFG, batch.tokens, batch.positions, batch.segment_ids, mesh=mesh, rules=rules)
        head, layout = head_kernel(params, CFG)
        return batch_fusion_loss(
            hidden, head, batch, None, head_layout=layout, denominator=denominator, mesh=mesh, chunk=32
        )

    where = {}
    if mesh is not None:
        shardings = param_shardings(param_table(CFG), mesh, rules)
        where = {"mesh": mesh, "param_shardings": shardings, "batch_sharding": batch_sharding(mesh, rules)}
    return train(
        init_params(CFG, jax.random.key(0)),
        FusionLoader(fused_records(), batch_size=16, seq_len=16, epochs=20),
        loss_fn=loss_fn,
        optimizer=make_optimizer(1e-2, decay_mask=decay_mask(CFG), **kept),
        total_steps=steps,
        accumulation=accumulation,
        **where,
    )


@pytest.fixture(scope="module")
def one_device():
    return run()


NAMES = ("loss", "clm_nats", "fusion_nats", "tokens", "supervised_tokens", "grad_norm")


@pytest.mark.parametrize(
    ("sizes", "explicit", "accumulation"),
    [
        ({"data": 8}, False, 1),
        ({"fsdp": 8}, True, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, False, 1),
        ({"data": 2, "fsdp": 2, "tensor": 2}, True, 2),
    ],
    ids=["data8", "fsdp8-explicit", "2x2x2", "2x2x2-explicit-accumulated"],
)
def test_every_mesh_trains_alike(one_device, sizes, explicit, accumulation):
    result = run(sizes, explicit=explicit, accumulation=accumulation)
    for name in NAMES:
        np.testing.assert_allclose(
            [h[name] for h in result.history], [h[name] for h in one_device.history], rtol=2e-5, err_msg=name
        )


def test_it_learns_both_parts(one_device):
    for name in ("loss", "clm_nats", "fusion_nats"):
        assert one_device.history[-1][name] < one_device.history[0][name]
    assert 0 < one_device.history[0]["supervised_tokens"] < one_device.history[0]["tokens"]


def test_moments_in_eight_bits_learn_as_float32_does():
    wide, coded = (
        np.array([h["loss"] for h in run(steps=20, moments_dtype=dtype).history]) for dtype in ("float32", "int8")
    )
    assert wide[-1] < 0.75 * wide[0]
    np.testing.assert_allclose(coded, wide, rtol=1e-3)
    assert np.any(coded != wide)
