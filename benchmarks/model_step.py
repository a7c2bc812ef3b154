"""Time of the forward and backward pass of a small Llama, by attention implementation and layer loop.

    python benchmarks/model_step.py [--json FILE]

One million parameters (d = 128, 4 layers, 4 heads over 2 key heads, V = 2048), 8 rows of 256 tokens, float32.
`cpu_seconds` is processor time of the process, which other load on the machine disturbs less than `seconds`.
"""

import argparse
import contextlib
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp

from fusejax.models import ModelConfig, hidden_states, init_params
from fusejax.models.layers import attention

CFG = ModelConfig(2048, 128, 344, 4, 4, 2, tie_embeddings=True)
ROWS, LENGTH, REPEATS = 8, 256, 9
ATTENTION = "fusejax.models.llama.attention"


def einsum_attention(q, k, v, mask, layout, **_):
    """Grouped queries by two einsums, scores `[B, Nkv, G, T, S]`."""
    batch, length, _, width = q.shape
    grouped = q.reshape(batch, length, k.shape[2], -1, width) * width**-0.5
    scores = jnp.einsum("btkgh,bskh->bkgts", grouped, k)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -1e30), axis=-1)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v).reshape(q.shape)


def matmul_attention(q, k, v, mask, layout, **_):
    """Grouped queries folded into the rows of plain matrix products, scores `[B, Nkv, G * T, S]`."""
    batch, length, heads, width = q.shape
    groups = heads // k.shape[2]
    rows = q.reshape(batch, length, -1, groups, width).transpose(0, 2, 3, 1, 4)
    scores = (rows.reshape(batch, -1, groups * length, width) * width**-0.5) @ k.transpose(0, 2, 3, 1)
    weights = jax.nn.softmax(jnp.where(jnp.tile(mask, (1, 1, groups, 1)), scores, -1e30), axis=-1)
    mixed = (weights @ v.transpose(0, 2, 1, 3)).reshape(batch, -1, groups, length, width)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def recomputed_attention(q, k, v, mask, layout, **_):
    """The chosen attention, its scores computed again in the backward pass instead of kept."""
    return jax.checkpoint(lambda q, k, v: attention(q, k, v, mask, layout), prevent_cse=False)(q, k, v)


def unrolled(step, carry, xs):
    """The loop over layers, written out."""
    for i in range(CFG.num_layers):
        carry, _ = step(carry, jax.tree.map(lambda x: x[i], xs))  # noqa: B023 - called at once
    return carry, None


VARIANTS = {
    "chosen": (CFG, {}),
    "einsum attention": (CFG, {ATTENTION: einsum_attention}),
    "matmul attention": (CFG, {ATTENTION: matmul_attention}),
    "recomputed attention": (CFG, {ATTENTION: recomputed_attention}),
    "no attention": (CFG, {ATTENTION: lambda q, k, v, mask, layout: q}),
    "unrolled layers": (CFG, {"jax.lax.scan": unrolled}),
    "remat full": (replace(CFG, remat="full"), {}),
    "remat dots": (replace(CFG, remat="dots"), {}),
}


def measure(cfg: ModelConfig, patches: dict) -> tuple[float, float]:
    """Returns the median wall and processor seconds of one value and gradient."""
    params = init_params(cfg, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, cfg.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    segments = jnp.ones_like(tokens)

    def loss(params):
        return jnp.square(hidden_states(params, cfg, tokens, positions, segments)).mean()

    step = jax.jit(jax.value_and_grad(loss))
    with contextlib.ExitStack() as stack:  # while it is traced
        for name, replacement in patches.items():
            stack.enter_context(mock.patch(name, replacement))
        jax.block_until_ready(step(params))
    wall, cpu = [], []
    for _ in range(REPEATS):
        start, start_cpu = time.perf_counter(), time.process_time()
        jax.block_until_ready(step(params))
        wall.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    return statistics.median(wall), statistics.median(cpu)


def main() -> None:
    """Measures every variant, prints a line for each and writes the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    rows = []
    for name, (cfg, patches) in VARIANTS.items():
        seconds, cpu_seconds = measure(cfg, patches)
        rows.append(
            {
                "name": "model_step",
                "shape": [ROWS, LENGTH, cfg.hidden_size, cfg.num_layers],
                "implementation": name,
                "baseline": "chosen",
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "peak_bytes": None,
                "ratio": cpu_seconds / (rows[0]["cpu_seconds"] if rows else cpu_seconds),
                "roofline": None,
                "device": jax.devices()[0].device_kind,
            }
        )
        rate = ROWS * LENGTH / seconds
        print(f"{name:20s} {seconds * 1e3:6.0f} ms  cpu {cpu_seconds * 1e3:6.0f} ms  {rate:7.0f} tokens/s", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
