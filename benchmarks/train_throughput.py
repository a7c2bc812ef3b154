"""Tokens per second of the real training step against a PyTorch step of the same model on the same processor.

    python benchmarks/train_throughput.py [--json FILE] [--rounds N]

A Llama of 7 million parameters (6 layers, d = 256, V = 4096), 4 rows of 256 tokens, float32, AdamW behind clipping.
Ours is the compiled step of `fusejax train`, on CLM alone and with the fusion loss (K = 10 symbols at every position
over a partition of two thirds as many symbols as tokens); PyTorch's is transformers' model with its default attention
(sdpa), cross-entropy on the same labels, `torch.optim.AdamW(fused=True)` and `clip_grad_norm_`. The baseline of every
row is PyTorch on CLM: it has no fusion loss. Both start from the same weights, and the losses of three steps must
agree to 1e-3 before anything is timed.

The steps take turns in one process, each on as many threads as the process may use. `ratio` is the median over the
rounds of PyTorch's processor seconds divided by the row's (above 1: the row is faster); `wall_ratio` likewise of wall
time. `peak_bytes` is the compiler's and null for PyTorch. `roofline` is the share of the device's peak that the model's
own operations reach, null where the peak is not known (a processor's is not).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else PyTorch's idle threads spin while the other step is timed

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from fusejax.alignment import event_groups
from fusejax.models import ModelConfig, decay_mask, init_params
from fusejax.models.flops import flops_per_token
from fusejax.parallel.device_kinds import find_device_kind
from fusejax.stages.fit import loss_function
from fusejax.train.optimizer import make_optimizer
from fusejax.train.step import init_train_state, make_train_step
from fusejax.types import EventGroups, FusionBatch, TopK

VOCAB, LENGTH, ROWS, K, RATE, CHECKED = 4096, 256, 4, 10, 1e-3, 3
MODEL = ModelConfig(VOCAB, 256, 688, 6, 4, 4, max_positions=LENGTH, remat="dots")
TORCH, CLM, FUSION = "PyTorch, CLM", "fusejax, CLM", "fusejax, CLM and fusion"


def make_batch(rng: np.random.Generator) -> tuple[FusionBatch, EventGroups]:
    """Returns a batch in which every position is trained and supervised, and its one partition."""
    symbols = np.sort(rng.permutation(VOCAB)[: 2 * VOCAB // 3])
    symbol_of = rng.choice(symbols, VOCAB).astype(np.int32)
    symbol_of[symbols] = symbols
    groups = event_groups(symbol_of)
    shape = (ROWS, LENGTH)
    order = np.argsort(rng.random((*shape, 1, len(symbols))), axis=-1)[..., :K]
    p = rng.dirichlet(np.ones(K + 1), (*shape, 1)).astype(np.float32)
    tokens = rng.integers(0, VOCAB, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = FusionBatch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        segment_ids=np.ones(shape, np.int32),
        positions=np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape),
        mask=np.ones(shape, np.float32),
        targets=TopK(symbols[order].astype(np.int32), np.log(p[..., :K]), np.log(p[..., K])),
        partition=np.zeros((*shape, 1), np.int32),
        weights=np.ones((*shape, 1), np.float32),
    )
    return jax.tree.map(jnp.asarray, batch), EventGroups(
        np.asarray(groups.offsets)[None], np.asarray(groups.members)[None]
    )


def our_step(params: Any, batch: FusionBatch, groups: EventGroups | None) -> tuple[Callable[[], float], int]:
    """Returns (a call that does one more step and waits, peak bytes)."""
    loss = {"clm_weight": 0.9 if groups else 1.0, "fusion_weight": 0.1 if groups else 0.0}
    optimizer = make_optimizer(RATE, decay_mask=decay_mask(MODEL))
    step = make_train_step(loss_function(MODEL, groups, loss, None), optimizer)
    state = init_train_state(jax.tree.map(jnp.array, params), optimizer)
    program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    memory = program.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    def call() -> float:
        nonlocal state
        state, metrics = program(state, batch)
        return float(metrics["loss"])

    return call, int(peak - memory.alias_size_in_bytes)


def torch_model(params: Any) -> torch.nn.Module:
    """Returns transformers' model with the weights of our tree."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=MODEL.hidden_size,
        intermediate_size=MODEL.intermediate_size,
        num_hidden_layers=MODEL.num_layers,
        num_attention_heads=MODEL.num_heads,
        num_key_value_heads=MODEL.num_kv_heads,
        max_position_embeddings=LENGTH,
        rms_norm_eps=MODEL.norm_eps,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    layers, width = jax.tree.map(np.asarray, params["layers"]), MODEL.hidden_size
    weights = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"]["kernel"].T,
    }
    for i in range(MODEL.num_layers):
        at, attention = f"model.layers.{i}.", layers["attention"]
        for name in "qkv":
            weights[f"{at}self_attn.{name}_proj.weight"] = attention[name]["kernel"][i].reshape(width, -1).T
        weights[f"{at}self_attn.o_proj.weight"] = attention["o"]["kernel"][i].reshape(-1, width).T
        for name in ("gate", "up", "down"):
            weights[f"{at}mlp.{name}_proj.weight"] = layers["mlp"][name]["kernel"][i].T
        weights[f"{at}input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        weights[f"{at}post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
    model.load_state_dict({name: torch.tensor(np.array(value)) for name, value in weights.items()})
    return model.train()


def torch_step(params: Any, batch: FusionBatch) -> Callable[[], float]:
    """Returns a call that does one more step of PyTorch."""
    model = torch_model(params)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    parts = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parts, lr=RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    tokens, labels = (torch.tensor(np.array(x), dtype=torch.long) for x in (batch.tokens, batch.labels))

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.view(-1, VOCAB), labels.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return call


def measure(calls: dict[str, Callable[[], float]], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Returns name -> (wall seconds, processor seconds) of each round."""
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in calls}
    for i in range(rounds):
        for name, call in calls.items() if i % 2 else reversed(calls.items()):
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            times[name][0].append(time.perf_counter() - start)
            times[name][1].append(time.process_time() - start_cpu)
    return times


def peak_share(tokens_per_second: float) -> float | None:
    """Returns the share of one device's peak, in bfloat16, that the model's operations reach; None where unknown."""
    kind = find_device_kind(jax.devices()[0].device_kind)
    return None if kind is None else tokens_per_second * flops_per_token(MODEL, LENGTH) / kind.bf16_flops


def main() -> None:
    """Checks that both train alike, measures them, prints a table and writes the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    batch, groups = make_batch(np.random.default_rng(0))
    params = init_params(MODEL, jax.random.key(0))
    (clm, clm_peak), (fusion, fusion_peak) = our_step(params, batch, None), our_step(params, batch, groups)
    calls, peaks = {TORCH: torch_step(params, batch), CLM: clm, FUSION: fusion}, {CLM: clm_peak, FUSION: fusion_peak}
    losses = {name: [call() for _ in range(CHECKED)] for name, call in calls.items()}
    np.testing.assert_allclose(losses[CLM], losses[TORCH], rtol=1e-3)
    times, tokens = measure(calls, arguments.rounds), ROWS * LENGTH
    base_wall, base_cpu = times[TORCH]
    print("| step | ms | CPU ms | tokens/s | ratio of CPU | ratio of wall |\n|---|---|---|---|---|---|")
    rows = []
    for name, (wall, cpu) in times.items():
        seconds, busy = statistics.median(wall), statistics.median(cpu)
        ratio = statistics.median(a / b for a, b in zip(base_cpu, cpu, strict=True))
        wall_ratio = statistics.median(a / b for a, b in zip(base_wall, wall, strict=True))
        row = {"name": "train_throughput", "shape": [ROWS, LENGTH, MODEL.hidden_size, MODEL.num_layers, VOCAB, K]}
        row |= {"implementation": name, "baseline": TORCH, "seconds": seconds, "cpu_seconds": busy, "threads": threads}
        row |= {"tokens_per_second": tokens / seconds, "ratio": ratio, "wall_ratio": wall_ratio}
        row |= {"roofline": None if name == TORCH else peak_share(tokens / seconds)}
        rows.append(row | {"peak_bytes": peaks.get(name), "device": jax.devices()[0].device_kind})
        cells = name, f"{seconds * 1e3:.0f}", f"{busy * 1e3:.0f}", f"{tokens / seconds:.0f}"
        print("| " + " | ".join((*cells, f"{ratio:.2f}", f"{wall_ratio:.2f}")) + " |", flush=True)
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"numpy": np.__version__, "python": sys.version.split()[0]}
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
