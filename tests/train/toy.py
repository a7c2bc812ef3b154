"""A model, a loss and records that are small enough to train in a test and still meet the contract."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VOCAB, WIDTH = 16, 8


class Record(NamedTuple):
    doc_id: str
    header: dict[str, Any]
    arrays: dict[str, np.ndarray]


def toy_params(seed: int = 0, dtype: Any = np.float32) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "embed": {"embedding": rng.normal(size=(VOCAB, WIDTH)).astype(dtype)},
        "layers": {"norm": {"scale": np.ones((2, WIDTH), dtype)}},
        "head": {"kernel": (0.3 * rng.normal(size=(WIDTH, VOCAB))).astype(dtype)},
    }


def toy_mask() -> dict:
    return {"embed": {"embedding": True}, "layers": {"norm": {"scale": False}}, "head": {"kernel": True}}


def toy_loss(params, batch, denominator):
    # One-hot products: a gather with a sharded operand is refused on an explicit mesh.
    x = jax.nn.one_hot(batch.tokens, VOCAB) @ params["embed"]["embedding"]
    x = jnp.tanh(x * params["layers"]["norm"]["scale"][0]) * params["layers"]["norm"]["scale"][1]
    logprobs = jax.nn.log_softmax((x @ params["head"]["kernel"]).astype(jnp.float32))
    nats = -jnp.sum(jax.nn.one_hot(batch.labels, VOCAB) * logprobs, axis=-1)
    loss = jnp.sum(nats * batch.mask) / denominator
    tokens = jnp.sum(batch.mask)
    return loss, {"clm_nats": loss * denominator / jnp.maximum(tokens, 1.0), "tokens": tokens}


def toy_records(count: int = 20, seed: int = 0) -> list[Record]:
    rng = np.random.default_rng(seed)
    records = []
    for number in range(count):
        n = int(rng.integers(3, 30))
        x = rng.integers(0, VOCAB, n + 1).astype(np.int32)
        mask = (rng.random(n) < 0.8).astype(np.int8)
        records.append(Record(f"doc{number}", {}, {"tokens": x[:-1], "labels": x[1:], "mask": mask}))
    return records
