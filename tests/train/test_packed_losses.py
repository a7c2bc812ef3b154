"""A token's loss does not depend on the documents that share its row: one row of seven against seven rows of one.

Documents that a row's end cuts do differ, as `fusejax.data.packing` says: what follows the cut has less context.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.data.loader import FusionLoader
from fusejax.losses.fused import batch_fusion_loss
from fusejax.models import ModelConfig, head_kernel, hidden_states, init_params

from .toy import Record

CFG = ModelConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2)
WINDOWED = dataclasses.replace(CFG, architecture="mistral", sliding_window=4)
LENGTHS = (3, 5, 4, 7, 2, 9, 11)
ENTRIES = 3


def records():
    rng = np.random.default_rng(0)
    found = []
    for number, n in enumerate(LENGTHS):
        x = rng.integers(0, CFG.vocab_size, n + 1).astype(np.int32)
        x[0] = number  # the tokens up to a position say which it is
        ids = np.stack([rng.choice(CFG.vocab_size, ENTRIES, replace=False) for _ in range(n)])[:, None]
        probabilities = rng.dirichlet(np.ones(ENTRIES + 1), (n, 1))
        arrays = {
            "tokens": x[:-1],
            "labels": x[1:],
            "mask": np.ones(n, np.int8),
            "ids": ids.astype(np.int32),
            "logprobs": np.log(probabilities[..., :-1]).astype(np.float32),
            "residual_logprob": np.log(probabilities[..., -1]).astype(np.float32),
            "partition": rng.integers(-1, 1, (n, 1)).astype(np.int32),
            "weights": np.ones((n, 1), np.float32),
        }
        found.append(Record(f"doc{number}", {}, arrays))
    return found


def all_rows(*, packed):
    loader = FusionLoader(records(), batch_size=1, seq_len=sum(LENGTHS), packed=packed, prefetch=0)
    rows = [loader.batch(step) for step in range(len(loader))]
    return jax.tree.map(lambda *x: np.concatenate(x), *rows)


def total(params, batch, cfg, weights):
    hidden = hidden_states(params, cfg, batch.tokens, batch.positions, batch.segment_ids)
    head, layout = head_kernel(params, cfg)
    clm, fusion = weights
    loss, _ = batch_fusion_loss(
        hidden, head, batch, None, head_layout=layout, denominator=1.0, clm_weight=clm, fusion_weight=fusion
    )
    return loss


def token_losses(params, batch, cfg, weights):
    """{the tokens that the model has read there: the loss of the one position}, over all positions of a batch."""
    places = np.argwhere(batch.mask != 0)
    masks = np.zeros((len(places), *batch.mask.shape), batch.mask.dtype)
    masks[np.arange(len(places)), places[:, 0], places[:, 1]] = 1
    nats = jax.jit(lambda m: jax.lax.map(lambda one: total(params, batch._replace(mask=one), cfg, weights), m))(masks)
    read = [batch.tokens[row, at - batch.positions[row, at] : at + 1].tobytes() for row, at in places]
    assert len(set(read)) == len(read)  # else two positions could be taken for one another
    return dict(zip(read, np.asarray(nats), strict=True))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.9, 0.1)], ids=["clm", "kl", "both"])
@pytest.mark.parametrize("cfg", [CFG, WINDOWED], ids=["llama", "sliding window"])
def test_packed_and_unpacked_losses_are_equal_token_by_token(cfg, weights):
    params = init_params(cfg, jax.random.key(1))
    packed, alone = all_rows(packed=True), all_rows(packed=False)
    assert (len(packed.tokens), len(alone.tokens)) == (1, len(LENGTHS))
    ours, wanted = (token_losses(params, batch, cfg, weights) for batch in (packed, alone))
    assert ours.keys() == wanted.keys() and len(ours) == sum(LENGTHS)
    np.testing.assert_allclose([ours[key] for key in wanted], list(wanted.values()), rtol=1e-5, atol=1e-6)


def test_packed_and_unpacked_gradients_are_equal():
    params = init_params(CFG, jax.random.key(1))
    gradients = [
        jax.jit(jax.grad(lambda p, b: total(p, b, CFG, (0.5, 0.5))))(
            params, jax.tree.map(jnp.asarray, all_rows(packed=p))
        )
        for p in (True, False)
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), *gradients)
