"""Tokens per second of the real training step against a PyTorch step of the same model on the same device.

    python benchmarks/train_throughput.py [--json FILE] [--rounds N]

On a processor: a Llama of 7 million parameters (6 layers, d = 256, V = 4096), 4 rows of 256 tokens, float32. On an
NVIDIA GPU: one of 1.1 billion (22 layers, d = 2048, V = 32000), 2 rows of 2048 tokens, weights and moments in float32
and the products in bfloat16 (PyTorch: autocast), some 25 GB. Both libraries must use the same device, else it ends.

Ours is the compiled step of `fusejax train`, on CLM alone and with the fusion loss (K = 10 symbols at every position
over a partition of two thirds as many symbols as tokens); PyTorch's is transformers' model with its default attention
(sdpa), cross-entropy on the same labels, `torch.optim.AdamW(fused=True)` and `clip_grad_norm_`. The baseline of every
row is PyTorch on CLM: it has no fusion loss. Both start from the same weights, and the losses of three steps must
agree (to 1e-3, in bfloat16 to 1e-2) before anything is timed.

On a processor the steps take turns in one process, each on as many threads as the process may use, and `ratio` is the
median over the rounds of PyTorch's processor seconds divided by the row's (above 1: the row is faster); `wall_ratio`
likewise of wall time. On a GPU one is timed after the other, for room, and both are of wall time. `peak_bytes` is the
compiler's; PyTorch's is its allocator's on a GPU, null else. `roofline` is the share of the device's peak in bfloat16
that the model's own operations reach, null where the peak is not known (a processor's is not) or the products are in
float32. The file is written anew after every round, so that an end before the last leaves what there is.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else PyTorch's idle threads spin while the other step is timed
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX takes a GPU's memory from PyTorch

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

K, RATE, CHECKED = 10, 1e-3, 3
TORCH, CLM, FUSION = "PyTorch, CLM", "fusejax, CLM", "fusejax, CLM and fusion"
Steps = dict[str, Callable[[], float]]


@dataclass(frozen=True)
class Case:
    """What is trained: a model on rows of `model.max_positions` tokens; losses agree to a relative `tolerance`."""

    model: ModelConfig
    rows: int
    tolerance: float
    gpu: bool

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and positions of a batch."""
        return self.rows, self.model.max_positions


# No row holds two documents, which is what PyTorch's attention is told too.
_COMMON: dict[str, Any] = {"remat": "dots", "attention": "auto_rows"}
PROCESSOR = Case(ModelConfig(4096, 256, 688, 6, 4, 4, max_positions=256, **_COMMON), 4, 1e-3, gpu=False)
GPU = Case(ModelConfig(32000, 2048, 5632, 22, 32, 4, dtype="bfloat16", **_COMMON), 2, 1e-2, gpu=True)


def choose_case() -> Case:
    """Returns the case for the device of both libraries; ends the program where they would use different ones."""
    ours, cuda = jax.devices()[0], torch.cuda.is_available()
    if ours.platform == "cpu":
        if cuda and os.environ.get("JAX_PLATFORMS") != "cpu":
            raise SystemExit("PyTorch has a GPU and JAX has none: install fusejax[cuda], or set JAX_PLATFORMS=cpu")
        return PROCESSOR
    theirs = torch.cuda.get_device_name(0) if cuda else "a processor"
    if theirs != ours.device_kind:
        raise SystemExit(
            f"JAX computes on {ours.device_kind}, PyTorch on {theirs}: install PyTorch for it, or set JAX_PLATFORMS=cpu"
        )
    return GPU


def make_batch(case: Case, rng: np.random.Generator) -> tuple[FusionBatch, EventGroups]:
    """Returns a batch in which every position is trained and supervised, and its one partition."""
    vocab, (rows, length) = case.model.vocab_size, case.shape
    symbols = np.sort(rng.permutation(vocab)[: 2 * vocab // 3])
    symbol_of = rng.choice(symbols, vocab).astype(np.int32)
    symbol_of[symbols] = symbols
    groups = event_groups(symbol_of)
    first = rng.integers(0, len(symbols), (*case.shape, 1, 1))
    chosen = (first + np.arange(K) * (len(symbols) // K)) % len(symbols)  # K different ones
    p = rng.dirichlet(np.ones(K + 1), (*case.shape, 1)).astype(np.float32)
    tokens = rng.integers(0, vocab, (rows, length + 1)).astype(np.int32)
    batch = FusionBatch(
        tokens=tokens[:, :-1],
        labels=tokens[:, 1:],
        segment_ids=np.ones(case.shape, np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), case.shape),
        mask=np.ones(case.shape, np.float32),
        targets=TopK(symbols[chosen].astype(np.int32), np.log(p[..., :K]), np.log(p[..., K])),
        partition=np.zeros((*case.shape, 1), np.int32),
        weights=np.ones((*case.shape, 1), np.float32),
    )
    return jax.tree.map(jnp.asarray, batch), EventGroups(
        np.asarray(groups.offsets)[None], np.asarray(groups.members)[None]
    )


def our_step(
    case: Case, params: Any, batch: FusionBatch, groups: EventGroups | None
) -> tuple[Callable[[], float], int]:
    """Returns (a call that does one more step and waits, peak bytes)."""
    loss = {"clm_weight": 0.9 if groups else 1.0, "fusion_weight": 0.1 if groups else 0.0}
    optimizer = make_optimizer(RATE, decay_mask=decay_mask(case.model))
    step = make_train_step(loss_function(case.model, groups, loss, None), optimizer)
    state = init_train_state(jax.tree.map(jnp.array, params), optimizer)
    program = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    memory = program.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes

    def call() -> float:
        nonlocal state
        state, metrics = program(state, batch)
        return float(metrics["loss"])

    return call, int(peak - memory.alias_size_in_bytes)


def torch_weights(model: ModelConfig, params: Any) -> dict[str, np.ndarray]:
    """Returns transformers' names and layouts of the weights of our tree."""
    layers, width = params["layers"], model.hidden_size
    weights = {
        "model.embed_tokens.weight": params["embed"]["embedding"],
        "model.norm.weight": params["final_norm"]["scale"],
        "lm_head.weight": params["head"]["kernel"].T,
    }
    for i in range(model.num_layers):
        at, attention = f"model.layers.{i}.", layers["attention"]
        for name in "qkv":
            weights[f"{at}self_attn.{name}_proj.weight"] = attention[name]["kernel"][i].reshape(width, -1).T
        weights[f"{at}self_attn.o_proj.weight"] = attention["o"]["kernel"][i].reshape(-1, width).T
        for name in ("gate", "up", "down"):
            weights[f"{at}mlp.{name}_proj.weight"] = layers["mlp"][name]["kernel"][i].T
        weights[f"{at}input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        weights[f"{at}post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
    return weights


def torch_model(case: Case, params: Any) -> torch.nn.Module:
    """Returns transformers' model with the weights of our tree, where it is to compute."""
    model = case.model
    config = transformers.LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        max_position_embeddings=model.max_positions,
        rms_norm_eps=model.norm_eps,
        use_cache=False,
    )
    found = transformers.LlamaForCausalLM(config)
    found.load_state_dict({name: torch.tensor(np.array(x)) for name, x in torch_weights(model, params).items()})
    return found.to("cuda" if case.gpu else "cpu").train()


def torch_step(case: Case, params: Any, batch: FusionBatch) -> Callable[[], float]:
    """Returns a call that does one more step of PyTorch."""
    model, device = torch_model(case, params), "cuda" if case.gpu else "cpu"
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    parts = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(parts, lr=RATE, betas=(0.9, 0.95), eps=1e-8, fused=True)
    tokens, labels = (torch.tensor(np.array(x), dtype=torch.long, device=device) for x in (batch.tokens, batch.labels))

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=case.model.dtype == "bfloat16"):
            logits = model(input_ids=tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.float().view(-1, case.model.vocab_size), labels.view(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return call


def measure(calls: Steps, rounds: int, times: dict[str, Any], after: Callable[[], None]) -> None:
    """Adds (wall seconds, processor seconds) of each round to `times[name]`, and calls `after` once a round."""
    for i in range(rounds):
        for name, call in calls.items() if i % 2 else reversed(calls.items()):
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            wall, cpu = times.setdefault(name, ([], []))
            wall.append(time.perf_counter() - start)
            cpu.append(time.process_time() - start_cpu)
        after()


def peak_share(case: Case, tokens_per_second: float) -> float | None:
    """Returns the share of one device's peak that the model's operations reach; None where it is not known.

    The peak is of products in bfloat16, so nothing is said of a model in float32.
    """
    kind = find_device_kind(jax.devices()[0].device_kind)
    if kind is None or case.model.dtype != "bfloat16":
        return None
    return tokens_per_second * flops_per_token(case.model, case.shape[1]) / kind.bf16_flops


def rows_of(case: Case, times: dict[str, Any], peaks: dict[str, int | None]) -> list[dict[str, Any]]:
    """Returns the rows of what has been measured."""
    model, tokens, rows = case.model, case.rows * case.shape[1], []
    shape = [*case.shape, model.hidden_size, model.num_layers, model.vocab_size, K]
    for name in (name for name in (TORCH, CLM, FUSION) if name in times):
        wall, cpu = times[name]
        seconds = statistics.median(wall)
        wall_ratio, cpu_ratio = (
            statistics.median(a / b for a, b in zip(base, own, strict=False))
            for base, own in zip(times[TORCH], (wall, cpu), strict=True)
        )
        row = {"name": "train_throughput", "shape": shape, "dtype": model.dtype, "implementation": name}
        row |= {"baseline": TORCH, "rounds": len(wall), "seconds": seconds, "cpu_seconds": statistics.median(cpu)}
        row |= {"threads": torch.get_num_threads(), "tokens_per_second": tokens / seconds}
        row |= {"ratio": wall_ratio if case.gpu else cpu_ratio, "wall_ratio": wall_ratio}
        row |= {"roofline": peak_share(case, tokens / seconds), "peak_bytes": peaks.get(name)}
        rows.append(row | {"device": jax.devices()[0].device_kind})
    return rows


def build(case: Case, name: str, params: Any, given: tuple[FusionBatch, EventGroups]) -> tuple[Any, int | None]:
    """Returns one of the steps and its peak bytes, where they are known before it has run."""
    batch, groups = given
    if name == TORCH:
        return torch_step(case, params, batch), None
    return our_step(case, params, batch, groups if name == FUSION else None)


def main() -> None:
    """Checks that both train alike, measures them, prints a table and writes the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    case = choose_case()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    versions |= {"numpy": np.__version__, "python": sys.version.split()[0]}
    given = make_batch(case, np.random.default_rng(0))
    params = jax.tree.map(np.asarray, init_params(case.model, jax.random.key(0)))
    times: dict[str, Any] = {}
    peaks: dict[str, int | None] = {}
    losses: dict[str, list[float]] = {}

    def save() -> None:
        if arguments.json and TORCH in times:
            rows = rows_of(case, times, peaks)
            arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")

    for names in ((TORCH,), (CLM,), (FUSION,)) if case.gpu else ((TORCH, CLM, FUSION),):
        calls: Steps = {}
        for name in names:
            calls[name], peaks[name] = build(case, name, params, given)
            losses[name] = [calls[name]() for _ in range(CHECKED)]
            if name == CLM:
                np.testing.assert_allclose(losses[CLM], losses[TORCH], rtol=case.tolerance)
        measure(calls, arguments.rounds, times, save)
        calls.clear()
        gc.collect()
        if case.gpu and TORCH in names:
            peaks[TORCH] = torch.cuda.max_memory_allocated()
            torch.cuda.empty_cache()
    save()
    print("| step | ms | CPU ms | tokens/s | ratio | ratio of wall | share of peak |\n|---|---|---|---|---|---|---|")
    for row in rows_of(case, times, peaks):
        share = "" if row["roofline"] is None else f"{row['roofline']:.2f}"
        cells = f"{row['seconds'] * 1e3:.0f}", f"{row['cpu_seconds'] * 1e3:.0f}", f"{row['tokens_per_second']:.0f}"
        print(
            "| "
            + " | ".join((row["implementation"], *cells, f"{row['ratio']:.2f}", f"{row['wall_ratio']:.2f}", share))
            + " |"
        )


if __name__ == "__main__":
    main()
