"""Events of thousands of tokens: gathering their members against comparing every column with the events' symbols.

    python benchmarks/large_events.py [--json FILE] [--rounds N]

A source with a finer vocabulary makes events with many members. Their mass under the model can be had from G gathered
logits per position, as `lse_gather` and `event_divergence` do, or by streaming the logits against `symbol_of [V]`: each
column belongs to the event of its symbol, if any. Forward is `log Q [T, K]`, backward its cotangents written into
`dlogits [T, V]`. Both give the same numbers (checked here). `cpu_seconds` is the least processor time of the rounds.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import lse_gather
from pallas_kernels.fused_softmax_kl.losses import segment_logsumexp

K = 10
SHAPES = [(2048, 2048, 256), (2048, 2048, 1024), (256, 32000, 256), (256, 32000, 1024), (256, 32000, 4096)]
SHAPES += [(256, 32000, 8192), (256, 128256, 8192)]


def problem(tokens: int, vocab: int, members: int) -> tuple[jax.Array, ...]:
    """Returns (logits [T, V], symbol_of [V], symbols [T, K], ids [T, G], event [T, G]): K events fill G slots."""
    rng = np.random.default_rng(0)
    size = members // K
    symbol_of = (np.arange(vocab) // size).astype(np.int32)
    symbols = np.stack([rng.permutation(vocab // size)[:K] for _ in range(tokens)]).astype(np.int32)
    ids = (symbols[:, :, None] * size + np.arange(size)).reshape(tokens, -1).astype(np.int32)
    event = np.broadcast_to(np.repeat(np.arange(K, dtype=np.int32), size), ids.shape)
    logits = jax.random.normal(jax.random.key(0), (tokens, vocab))
    return logits, *(jnp.asarray(x) for x in (symbol_of, symbols, ids, event))


def gathered(logits, symbol_of, symbols, ids, event):
    """log Q [T, K] from the members' logits."""
    del symbol_of, symbols
    rows = lse_gather(logits, ids, relative=True)
    return segment_logsumexp(rows.z, event, K) - rows.lse


def compared(logits, symbol_of, symbols, ids, event):
    """log Q [T, K] by comparing each column's symbol with the K symbols."""
    del ids, event
    q = jax.nn.softmax(logits, axis=-1)
    inside = symbol_of[None, None, :] == symbols[:, :, None]
    return jnp.log(jnp.where(inside, q[:, None, :], 0.0).sum(axis=-1))


def with_gradient(forward: Callable, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns log Q and the gradient of its sum by the logits."""

    def total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        value = forward(logits, *arrays[1:])
        return value.sum(), value

    (_, value), gradient = jax.value_and_grad(total, has_aux=True)(arrays[0])
    return value, gradient


def measure(shape: tuple[int, int, int], rounds: int) -> list[dict]:
    """Returns the rows of one shape; the ways take turns."""
    arrays = problem(*shape)
    calls = {}
    for name, way in (("gather", gathered), ("compare", compared)):
        calls[name, "forward"] = jax.jit(way)
        calls[name, "forward and backward"] = jax.jit(functools.partial(with_gradient, way))
    results = {key: jax.block_until_ready(call(*arrays)) for key, call in calls.items()}
    for what in ("forward", "forward and backward"):
        for a, b in zip(*(jax.tree.leaves(results[name, what]) for name in ("gather", "compare")), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    wall, cpu = {key: [] for key in calls}, {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call(*arrays))
            wall[key].append(time.perf_counter() - start)
            cpu[key].append(time.process_time() - start_cpu)
    rows = []
    for name, what in calls:
        row = {"name": f"large_events {what}", "shape": list(shape), "implementation": name, "baseline": "compare"}
        row |= {"seconds": statistics.median(wall[name, what]), "cpu_seconds": min(cpu[name, what])}
        row["ratio"] = row["cpu_seconds"] / min(cpu["compare", what])
        rows.append(row | {"device": jax.devices()[0].device_kind})
        print(f"{what}, {shape}, {name}: {row['cpu_seconds'] * 1e3:.1f} ms, {row['ratio']:.2f}", flush=True)
    return rows


def main() -> None:
    """Measures every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    rows = [row for shape in SHAPES for row in measure(shape, given.rounds)]
    versions = {"jax": jax.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
    if given.json:
        given.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
