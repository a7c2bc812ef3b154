"""Time of a whole training step with the fusion loss against the same step with CLM alone.

    python benchmarks/train_step.py [--json FILE] [--rounds N]

The target of `fusejax quickstart` (1 million parameters, V = 2048) and of K = 10 symbols per position over a partition
of two thirds as many symbols, with the real step: model, `batch_fusion_loss`, AdamW, clipping. Events have 256 slots
per position (the default of `loss.max_members`), or 64. The steps take turns in one process. `ratio` is of processor
time, the median of each round's ratio, since other load disturbs wall time. `seconds` is the median wall time;
`peak_bytes` is the compiler's, arguments and results included.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.alignment import event_groups
from fusejax.models import ModelConfig, decay_mask, init_params
from fusejax.stages.fit import loss_function
from fusejax.train.optimizer import make_optimizer, make_schedule
from fusejax.train.step import init_train_state, make_train_step
from fusejax.types import EventGroups, FusionBatch, TopK

VOCAB, K, LENGTH = 2048, 10, 256
MODEL = ModelConfig(VOCAB, 128, 344, 4, 4, 2, max_positions=LENGTH, tie_embeddings=True)
SHAPES = (2, 8)  # rows per batch: what the quickstart takes, and a common size
CLM, FUSION, FEWER = "CLM only", "CLM and fusion", "CLM and fusion, 64 members"


def random_partition(rng: np.random.Generator) -> tuple[EventGroups, np.ndarray]:
    """Returns one partition of the vocabulary, stacked, and its symbols: most of one token, some of many."""
    symbols = np.sort(rng.permutation(VOCAB)[: 2 * VOCAB // 3])
    # Tokens that are no symbol of their own join one; low symbols draw most, as openings of words do.
    share = 1.0 / np.arange(1, len(symbols) + 1)
    symbol_of = rng.choice(symbols, VOCAB, p=share / share.sum()).astype(np.int32)
    symbol_of[symbols] = symbols
    groups = event_groups(symbol_of)
    return EventGroups(np.asarray(groups.offsets)[None], np.asarray(groups.members)[None]), symbols


def random_batch(rng: np.random.Generator, rows: int, symbols: np.ndarray) -> FusionBatch:
    """Returns a batch in which every position is trained and supervised."""
    order = np.argsort(rng.random((rows, LENGTH, 1, len(symbols))), axis=-1)[..., :K]
    p = rng.dirichlet(np.ones(K + 1), (rows, LENGTH, 1)).astype(np.float32)
    ones = np.ones((rows, LENGTH), np.float32)
    tokens = rng.integers(0, VOCAB, (rows, LENGTH + 1)).astype(np.int32)
    batch = FusionBatch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        segment_ids=np.ones((rows, LENGTH), np.int32),
        positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (rows, LENGTH)),
        mask=ones,
        targets=TopK(symbols[order].astype(np.int32), np.log(p[..., :K]), np.log(p[..., K])),
        partition=np.zeros((rows, LENGTH, 1), np.int32),
        weights=ones[..., None],
    )
    return jax.tree.map(jnp.asarray, batch)


def compiled_step(loss: dict[str, Any], groups: EventGroups | None, batch: FusionBatch) -> tuple[Callable, int]:
    """Returns (a call that does one more step and waits, peak bytes)."""
    schedule = make_schedule("cosine", peak=1e-3, total_steps=1000)
    optimizer = make_optimizer(schedule, decay_mask=decay_mask(MODEL))
    step = make_train_step(loss_function(MODEL, groups, loss, None), optimizer)
    state = init_train_state(init_params(MODEL, jax.random.key(0)), optimizer)
    program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    memory = program.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    def call() -> float:
        nonlocal state
        state, metrics = program(state, batch)
        return float(metrics["loss"])

    return call, int(peak - memory.alias_size_in_bytes)


def measure(calls: dict[str, Callable], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Returns name -> (wall seconds, processor seconds) of each round."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for call in calls.values():
        call()
    for i in range(rounds):
        for name, call in calls.items() if i % 2 else reversed(calls.items()):
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            times[name][0].append(time.perf_counter() - start)
            times[name][1].append(time.process_time() - start_cpu)
    return times


def rows_of(rows: int, rounds: int) -> list[dict]:
    """Measures the steps on batches of `rows` rows."""
    rng = np.random.default_rng(0)
    groups, symbols = random_partition(rng)
    batch = random_batch(rng, rows, symbols)
    made = {
        CLM: compiled_step({"clm_weight": 1.0, "fusion_weight": 0.0}, None, batch),
        FUSION: compiled_step({"clm_weight": 0.9, "fusion_weight": 0.1}, groups, batch),
        FEWER: compiled_step({"clm_weight": 0.9, "fusion_weight": 0.1, "max_members": 64}, groups, batch),
    }
    times = measure({name: call for name, (call, _) in made.items()}, rounds)
    out = []
    for name, (wall, cpu) in times.items():
        ratio = statistics.median(a / b for a, b in zip(cpu, times[CLM][1], strict=True))
        out.append(
            {
                "name": "train_step",
                "shape": [rows, LENGTH, MODEL.hidden_size, MODEL.num_layers, VOCAB, K],
                "implementation": name,
                "baseline": CLM,
                "seconds": statistics.median(wall),
                "cpu_seconds": statistics.median(cpu),
                "ratio": ratio,
                "peak_bytes": made[name][1],
                "roofline": None,
                "device": jax.devices()[0].device_kind,
            }
        )
        cells = f"{rows} x {LENGTH}", name, f"{out[-1]['seconds'] * 1e3:.1f}", f"{out[-1]['cpu_seconds'] * 1e3:.1f}"
        print("| " + " | ".join((*cells, f"{ratio:.3f}", f"{made[name][1] / 2**20:.0f}")) + " |", flush=True)
    return out


def main() -> None:
    """Measures every shape, prints a table and writes the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=21)
    arguments = parser.parse_args()
    print("| tokens | step | ms | CPU ms | ratio | peak, MiB |\n|---|---|---|---|---|---|")
    rows = [row for shape in SHAPES for row in rows_of(shape, arguments.rounds)]
    versions = {"jax": jax.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
