"""Time and memory of the fused CLM and KL loss against other ways to compute it, forward and backward.

    python benchmarks/fused_softmax_kl.py [--json FILE] [--rounds N]

On CPU one realistic and one tiny head, on a GPU the heads of real models; no other difference. All implementations of a
shape run in turns in one process; times are medians, bytes are the compiler's. `roofline` is the share of what a large
matmul (level 2, 6TDV; recompute 8TDV) or a large copy (level 1, 6 bytes per bfloat16 logit) reached in the same run.
`cpu_seconds` is processor time, which other load disturbs less; on CPU `ratio` and `roofline` are of it. PyTorch takes
part where it is installed (and, on a GPU, built for it): the papers' dense targets, three of them chosen from by their
cross-entropy, and a chunked loss.
"""

import argparse
import functools
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pallas_kernels import linear_fused_softmax_kl, linear_fusion_loss, lse_gather
from pallas_kernels.fused_softmax_kl import event_divergence
from pallas_kernels.fused_softmax_kl.shapes import TINY

TAU, CLM_WEIGHT, KL_WEIGHT = 2.0, 0.9, 0.1
ON_GPU = jax.default_backend() == "gpu"
DTYPE = jnp.bfloat16 if ON_GPU else jnp.float32
LEVEL_2 = [(8192, 4096, 32000, 32), (8192, 4096, 128256, 32)] if ON_GPU else [(2048, 512, 32000, 32)]
LEVEL_2 = [*LEVEL_2, (TINY.tokens, TINY.embed, TINY.vocab, TINY.topk)]
LEVEL_1 = [(8192, 32000, 32), (8192, 128256, 32)] if ON_GPU else [(512, 32000, 32)]


def draw(tokens: int, vocab: int, k: int) -> tuple[np.ndarray, ...]:
    """Returns (labels [T], ids [T, K], logprobs [T, K], rest [T]); ids distinct within a row."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(k + 1), tokens).astype(np.float32)
    ids = (rng.integers(0, vocab, (tokens, 1)) + np.arange(k) * (vocab // (k + 1))) % vocab
    return rng.integers(0, vocab, tokens).astype(np.int32), ids.astype(np.int32), np.log(p[:, :k]), np.log(p[:, k])


def dense(ids: np.ndarray, logprobs: np.ndarray, vocab: int) -> np.ndarray:
    """Returns the target as the papers store it, [T, V] float32."""
    out = np.zeros((len(ids), vocab), np.float32)
    np.put_along_axis(out, ids, np.exp(logprobs), axis=1)
    return out


def naive(logits, labels, target):
    """CLM and KL (no tail event) from two dense log-softmaxes, as one writes them first."""
    logits = logits.astype(jnp.float32)
    clm = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)
    target = target.astype(jnp.float32)
    log_p = jnp.where(target > 0, jnp.log(jnp.where(target > 0, target, 1.0)), 0.0)
    kl = (target * (log_p - jax.nn.log_softmax(logits / TAU))).sum(-1)
    return CLM_WEIGHT * clm.mean() + KL_WEIGHT * kl.mean()


def sparse(logits, labels, ids, logprobs):
    """The same from log-sum-exps and gathered logits, left to XLA and automatic differentiation."""
    logits = logits.astype(jnp.float32)
    clm = jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    log_q = jnp.take_along_axis(logits, ids, axis=-1) / TAU - jax.nn.logsumexp(logits / TAU, axis=-1)[:, None]
    return CLM_WEIGHT * clm.mean() + KL_WEIGHT * (jnp.exp(logprobs) * (logprobs - log_q)).sum(-1).mean()


def primitive(logits, labels, ids, logprobs, rest, implementation=None):
    """Ours at level 1: the primitive on whole logits."""
    both = jnp.concatenate([labels[:, None], ids], axis=1)
    rows = lse_gather(logits, both, temperatures=(1.0, TAU), implementation=implementation)
    slots = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    targets = slots, logprobs[:, None], rest[:, None], jnp.ones((len(ids), 1), bool)
    kl = event_divergence(rows.z[:, 1:], rows.lse[:, 1], *targets, tail="zero", temperature=TAU)
    return CLM_WEIGHT * (rows.lse[:, 0] - rows.z[:, 0]).mean() + KL_WEIGHT * kl.mean()


def one_pass(hidden, head, labels, ids, logprobs, rest, **options):
    """Ours at level 2, gradients in the forward scan."""
    ones = jnp.ones(len(labels), jnp.float32) / len(labels)
    call = functools.partial(linear_fusion_loss, temperature=TAU, tail="zero", **options)
    return call(hidden, head, labels, ids, logprobs, rest, CLM_WEIGHT * ones, KL_WEIGHT * ones)[0]


def recompute(hidden, head, labels, ids, logprobs, rest, **options):
    """Ours at level 2 for any cotangent."""
    call = functools.partial(linear_fused_softmax_kl, temperature=TAU, tail="zero", **options)
    out = call(hidden, head, labels, ids, logprobs, rest, jnp.ones(len(labels)))
    return CLM_WEIGHT * out.clm.mean() + KL_WEIGHT * out.kl.mean()


def compiled(fn: Callable, arguments: tuple, differentiate: tuple[int, ...]) -> tuple[Callable, int, int]:
    """Returns (a call that waits and returns the loss, temporary bytes, peak bytes)."""
    program = jax.jit(jax.value_and_grad(fn, differentiate)).lower(*arguments).compile()
    memory = program.memory_analysis()
    peak = memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes
    return lambda: float(jax.block_until_ready(program(*arguments))[0]), memory.temp_size_in_bytes, peak


def candidates_1(tokens: int, vocab: int, k: int) -> dict[str, tuple]:
    """Returns name -> (call, temporary bytes, peak bytes) from given logits."""
    logits = jax.random.normal(jax.random.key(0), (tokens, vocab), jnp.bfloat16)
    labels, ids, logprobs, rest = (jnp.asarray(x) for x in draw(tokens, vocab, k))
    target = jnp.asarray(dense(np.asarray(ids), np.asarray(logprobs), vocab), jnp.bfloat16)
    make = functools.partial(compiled, differentiate=(0,))
    out = {
        "naive dense": make(naive, (logits, labels, target)),
        "optax CLM only": make(
            lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z.astype(jnp.float32), y).mean(),
            (logits, labels),
        ),
        "sparse XLA": make(sparse, (logits, labels, ids, logprobs)),
        "ours xla": make(functools.partial(primitive, implementation="xla"), (logits, labels, ids, logprobs, rest)),
    }
    if ON_GPU:
        out["ours"] = make(primitive, (logits, labels, ids, logprobs, rest))
    return out


def candidates_2(tokens: int, embed: int, vocab: int, k: int) -> dict[str, tuple]:
    """Returns name -> (call, temporary bytes, peak bytes) from hidden states and head."""
    keys = jax.random.split(jax.random.key(0))
    hidden = jax.random.normal(keys[0], (tokens, embed), DTYPE)
    head = (jax.random.normal(keys[1], (embed, vocab)) * embed**-0.5).astype(DTYPE)
    labels, ids, logprobs, rest = (jnp.asarray(x) for x in draw(tokens, vocab, k))
    target = jnp.asarray(dense(np.asarray(ids), np.asarray(logprobs), vocab), DTYPE)
    make = functools.partial(compiled, differentiate=(0, 1))

    def whole(loss):
        return lambda h, w, *rest: loss(jnp.matmul(h, w, preferred_element_type=jnp.float32), *rest)

    ours = hidden, head, labels, ids, logprobs, rest
    out = {
        "naive dense": make(whole(naive), (hidden, head, labels, target)),
        "optax CLM only": make(
            whole(lambda z, y: optax.softmax_cross_entropy_with_integer_labels(z, y).mean()), (hidden, head, labels)
        ),
        "sparse XLA": make(whole(sparse), (hidden, head, labels, ids, logprobs)),
        "ours level 1": make(whole(primitive), ours),
        "ours recompute": make(recompute, ours),
        "ours CLM only": make(one_pass, (hidden, head, labels, ids[:, :0], logprobs[:, :0], rest)),
        "ours one-pass": make(one_pass, ours),
    }
    if ON_GPU:
        out["ours one-pass, xla"] = make(functools.partial(one_pass, implementation="xla"), ours)
        out["ours one-pass, bf16 logits"] = make(functools.partial(one_pass, logits_dtype="bfloat16"), ours)
    out |= tokamax_candidate(hidden, head, labels)
    return out | torch_candidates(*(np.asarray(x, np.float32) for x in (hidden, head)), labels, ids, logprobs)


def tokamax_candidate(hidden, head, labels) -> dict[str, tuple]:
    """Returns tokamax's fused cross-entropy (it has no divergence), or nothing and a line that says why."""
    if importlib.util.find_spec("tokamax") is None:
        print("no row for tokamax: it is not installed", flush=True)
        return {}
    import tokamax

    def loss(h, w, y):
        return tokamax.linear_softmax_cross_entropy_loss(h, y, w, reduction="mean")

    try:
        return {"tokamax CLM only": compiled(loss, (hidden, head, labels), (0, 1))}
    except Exception as error:  # whatever it raises where it cannot serve is the answer
        print(f"no row for tokamax: {type(error).__name__}: {str(error).splitlines()[0][:120]}", flush=True)
        return {}


def torch_candidates(hidden, head, labels, ids, logprobs) -> dict[str, tuple]:
    """Returns the PyTorch losses of the same problem, or nothing where PyTorch cannot run here."""
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch
    from torch.nn import functional

    if ON_GPU and not torch.cuda.is_available():
        return {}
    device, dtype = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
    h, w = (torch.tensor(x, device=device, dtype=dtype, requires_grad=True) for x in (hidden, head))
    y, at = (torch.tensor(np.asarray(x), device=device).long() for x in (labels, ids))
    p = torch.tensor(np.exp(np.asarray(logprobs)), device=device)
    one = torch.zeros(len(hidden), head.shape[1], device=device).scatter_(1, at, p).bfloat16()
    three = torch.stack([one, one.roll(1, 0), one.roll(2, 0)])

    def finish(loss) -> float:
        loss.backward()
        h.grad = w.grad = None
        return float(loss.detach())

    def both(z, label, target):
        clm = functional.cross_entropy(z, label, reduction="sum")
        kl = functional.kl_div(functional.log_softmax(z / TAU, -1), target.float(), reduction="sum")
        return (CLM_WEIGHT * clm + KL_WEIGHT * kl) / len(hidden)

    def papers() -> float:
        score = torch.stack([-torch.log(t.gather(1, y[:, None]).float() + 1e-9)[:, 0] for t in three])
        index = score.argmin(0)[None, :, None].expand(1, *one.shape)
        return finish(both((h @ w).float(), y, three.gather(0, index)[0]))

    def chunked() -> float:
        total = 0.0
        for i in range(0, len(hidden), 256):
            part = slice(i, i + 256)
            loss = both((h[part] @ w).float(), y[part], one[part])
            loss.backward()
            total += float(loss.detach())
        h.grad = w.grad = None
        return total

    return {"torch, papers' three dense targets": (papers, None, None), "torch, chunks of 256": (chunked, None, None)}


def timed(calls: dict[str, Callable], rounds: int) -> dict[str, tuple[float, float, float]]:
    """Returns name -> (median seconds, median processor seconds, value), the calls taking turns."""
    value = {name: call() for name, call in calls.items()}
    wall, cpu = {name: [] for name in calls}, {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            call()
            wall[name].append(time.perf_counter() - start)
            cpu[name].append(time.process_time() - start_cpu)
    return {name: (statistics.median(wall[name]), min(cpu[name]), value[name]) for name in calls}


def ceilings() -> tuple[float, float]:
    """Returns (bytes/s of a large copy, operations/s of a large matmul); on CPU per processor second."""
    n = 8192 if ON_GPU else 2048
    a = jax.random.normal(jax.random.key(0), (n, n), DTYPE)
    big = jnp.zeros((2**29 if ON_GPU else 2**25,), DTYPE)
    copy, matmul = jax.jit(lambda x: x + 1), jax.jit(lambda x: x @ x)
    calls = {"copy": lambda: copy(big).block_until_ready(), "matmul": lambda: matmul(a).block_until_ready()}
    result = timed({k: lambda c=c: (c(), 0.0)[1] for k, c in calls.items()}, 5)
    clock = 0 if ON_GPU else 1
    return 2 * big.nbytes / result["copy"][clock], 2 * n**3 / result["matmul"][clock]


def rows_of(level: int, shape: tuple[int, ...], rounds: int, limits: tuple[float, float]) -> list[dict]:
    """Measures every implementation of one shape."""
    found = (candidates_1 if level == 1 else candidates_2)(*shape)
    result = timed({name: entry[0] for name, entry in found.items()}, rounds)
    base, rows = result["naive dense"], []
    for name, (call, temporary, peak) in found.items():
        del call
        seconds, cpu, value = result[name]
        if level == 1:
            ideal = 6 * shape[0] * shape[1] / limits[0]
        else:
            ideal = (8 if "recompute" in name else 6) * shape[0] * shape[1] * shape[2] / limits[1]
        rows.append(
            {
                "name": f"fused_softmax_kl level {level}",
                "shape": list(shape),
                "implementation": name,
                "baseline": "naive dense",
                "seconds": seconds,
                "cpu_seconds": cpu,
                "ratio": seconds / base[0] if ON_GPU else cpu / base[1],
                "temporary_bytes": temporary,
                "peak_bytes": peak,
                "roofline": ideal / (seconds if ON_GPU else cpu),
                "loss": value,
                "device": jax.devices()[0].device_kind,
            }
        )
        print(line(rows[-1]), flush=True)
    return rows


def line(row: dict) -> str:
    """Returns a row as one line of a Markdown table."""
    temporary = "" if row["temporary_bytes"] is None else f"{row['temporary_bytes'] / 2**20:.0f}"
    cells = row["name"][-1], row["shape"], row["implementation"], f"{row['seconds'] * 1e3:.1f}"
    more = f"{row['cpu_seconds'] * 1e3:.0f}", f"{row['ratio']:.2f}", temporary, f"{row['roofline']:.0%}"
    return "| " + " | ".join(map(str, (*cells, *more, f"{row['loss']:.5f}"))) + " |"


def main() -> None:
    """Measures every shape, prints a table and writes the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--rounds", type=int, default=20 if ON_GPU else 5)
    arguments = parser.parse_args()
    limits = ceilings()
    print(f"copy {limits[0] / 1e9:.0f} GB/s, matmul {limits[1] / 1e12:.2f} TFLOP/s, {jax.devices()[0].device_kind}")
    print("| level | shape | implementation | ms | CPU ms | ratio | temporaries, MiB | roofline | loss |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = [r for shape in LEVEL_2 for r in rows_of(2, shape, arguments.rounds, limits)]
    rows += [r for shape in LEVEL_1 for r in rows_of(1, shape, arguments.rounds, limits)]
    versions = {"jax": jax.__version__, "numpy": np.__version__, "python": sys.version.split()[0]}
    ceiling = {"copy_bytes_per_second": limits[0], "matmul_flops_per_second": limits[1]}
    if arguments.json:
        text = json.dumps({"versions": versions, "ceilings": ceiling, "rows": rows}, indent=1)
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
