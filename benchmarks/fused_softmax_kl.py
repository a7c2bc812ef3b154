"""Time and memory of the fused CLM and KL loss against other ways to compute it, forward and backward.

    python benchmarks/fused_softmax_kl.py [--json FILE] [--rounds N] [--minutes M]

On CPU one realistic and one tiny head, on a GPU the heads of real models; no other difference. What is measured is in
`softmax_kl_candidates.py`. All candidates of a shape run in turns in one process; times are medians. On a GPU a turn is
as many runs as take about 30 ms, started one after another, so that starting them is not what is timed.

* `roofline` is the share of what a large matmul (level 2, 6TDV; recompute 8TDV) or a large copy (level 1, 6 bytes per
  bfloat16 logit) reached in the same run. `cpu_seconds` is processor time, which other load disturbs less; on CPU
  `ratio` and `roofline` are of it.
* `temporary_bytes` and `peak_bytes` are the compiler's. `device_peak_bytes` is the most that JAX has had on the device
  so far, where this candidate raised it: the thriftiest runs first. (JAX cannot count anew.)
* `backend` is what `implementation` (None, unless the name says another) chose, `kernels` the Pallas kernels inside.
* `gradient_error` is the relative distance from the gradients of naive dense JAX. Where ours are off, that is an error.

The file is written anew after each shape, so a run that is killed keeps what it has. Each shape gets its share of the
minutes that are left: what finds no time, or is not installed, is a row with `skipped`; what fails is a row with
`error`; and there are fewer rounds where so many do not fit. `targets` is what is aimed at: `met` is null where it was
not measured. Exit code 1 where one of ours failed.
"""

import argparse
import functools
import gc
import importlib.metadata
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from softmax_kl_candidates import DTYPE, ON_GPU, Candidate, Unavailable, candidates

from pallas_kernels.fused_softmax_kl.shapes import TINY

TINY_SHAPE = (TINY.tokens, TINY.embed, TINY.vocab, TINY.topk)
if ON_GPU:
    SHAPES = [(8192, 4096, 32000, 32), (8192, 4096, 128256, 32), (8192, 32000, 32), (8192, 128256, 32), TINY_SHAPE]
else:
    SHAPES = [(2048, 512, 32000, 32), (512, 32000, 32), TINY_SHAPE]
CLOCK = "seconds" if ON_GPU else "cpu_seconds"
EVERY, BASELINE, PAPERS = "every candidate", "naive dense", "torch, papers' three dense targets"
BUILDING = 0.7  # of a shape's time; the rest is for rounds
TURN_SECONDS = 0.03


def level_of(shape: tuple[int, ...]) -> int:
    """Returns 1 for [T, V, K], 2 for [T, D, V, K]."""
    return len(shape) - 2


def weight(shape: tuple[int, ...]) -> int:
    """Returns a shape's part of the time: level 2 has twice as many candidates, and the tiny shape no targets."""
    return 1 if shape == TINY_SHAPE else 2 * level_of(shape)


def time_of(candidate: Candidate, repeats: int) -> tuple[float, float]:
    """Returns (seconds, processor seconds) of one of `repeats` runs, each started before the last has ended."""
    start, start_cpu = time.perf_counter(), time.process_time()
    for _ in range(repeats):
        out = candidate.run()
    candidate.wait(out)
    return (time.perf_counter() - start) / repeats, (time.process_time() - start_cpu) / repeats


def turn(seconds: float) -> int:
    """Returns how many runs of so many seconds make a turn."""
    return max(1, min(50, int(TURN_SECONDS / seconds))) if ON_GPU else 1


def ceilings() -> tuple[float, float]:
    """Returns (bytes/s of a large copy, operations/s of a large matmul); on CPU per processor second."""
    n = 8192 if ON_GPU else 2048
    a = jax.random.normal(jax.random.key(0), (n, n), DTYPE)
    big = jnp.zeros((2**28 if ON_GPU else 2**25,), DTYPE)
    copy, matmul = jax.jit(lambda x: x + 1), jax.jit(lambda x: x @ x)
    found = []
    for call, operand in ((copy, big), (matmul, a)):
        candidate = Candidate(functools.partial(call, operand), jax.block_until_ready, None, {})
        time_of(candidate, 1)
        repeats = turn(time_of(candidate, 1)[0])
        found.append(statistics.median(time_of(candidate, repeats)[0 if ON_GPU else 1] for _ in range(5)))
    return 2 * big.nbytes / found[0], 2 * n**3 / found[1]


def said(error: Exception) -> str:
    """Returns an exception in a line or two."""
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def blank(shape: tuple[int, ...], name: str) -> dict[str, Any]:
    """Returns the row of a candidate of which nothing is known yet."""
    unknown = "seconds", "cpu_seconds", "rounds", "ratio", "roofline", "temporary_bytes", "peak_bytes"
    unknown = *unknown, "device_peak_bytes", "backend", "kernels", "build_seconds", "loss", "gradient_error"
    known = {"name": f"fused_softmax_kl level {level_of(shape)}", "shape": list(shape), "implementation": name}
    known |= {"baseline": BASELINE, "device": jax.devices()[0].device_kind}
    return known | dict.fromkeys((*unknown, "error", "skipped"))


def device_peak() -> int:
    """Returns the most bytes that JAX has had on the device since the process began, 0 where no one counts."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def ours(name: str) -> bool:
    """Returns whether a failure of so named a candidate is ours."""
    return name.startswith("ours") or name == EVERY


def build(shape: tuple[int, ...], seconds: float) -> tuple[dict[str, dict], dict[str, tuple[Candidate, float]]]:
    """Compiles and runs once what fits; returns (name -> row, name -> (candidate, seconds of a run))."""
    end, rows, ready = time.monotonic() + seconds, {}, {}
    try:
        builders = candidates(shape)
    except Exception as error:
        return {EVERY: blank(shape, EVERY) | {"error": said(error)}}, {}
    for name, make in builders.items():
        row = rows[name] = blank(shape, name)
        if time.monotonic() >= end:
            row["skipped"] = "no time was left"
            continue
        start, peak = time.monotonic(), device_peak()
        try:
            candidate = make()
            row |= candidate.facts
            row["loss"] = candidate.wait(candidate.run())
            row["device_peak_bytes"] = after if (after := device_peak()) > peak else None
            row["build_seconds"] = time.monotonic() - start
            ready[name] = candidate, time_of(candidate, 1)[0]
        except Unavailable as why:
            row["skipped"] = str(why)
        except Exception as error:  # out of memory, a kernel that does not compile: the others go on
            row["error"] = said(error)
    return rows, ready


def take_turns(rows: dict[str, dict], ready: dict[str, tuple[Candidate, float]], rounds: int, seconds: float) -> None:
    """Writes the times of all that is ready into the rows, in as many rounds as fit."""
    repeats = {name: turn(once) for name, (_, once) in ready.items()}
    expected = sum(once * repeats[name] for name, (_, once) in ready.items())
    fitting = max(1, min(rounds, int(seconds / expected))) if ready else 0
    if 0 < fitting < rounds:
        print(f"only {fitting} of {rounds} rounds fit the time", flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ready}
    for number in range(fitting):
        # There and back: who comes after naive dense finds the memory torn down, a tenth of a second on CPU.
        for name in [name for name in list(ready)[:: 1 - number % 2 * 2] if rows[name]["error"] is None]:
            try:
                times[name].append(time_of(ready[name][0], repeats[name]))
            except Exception as error:
                rows[name]["error"] = said(error)
    for name, found in times.items():
        if found:
            wall, cpu = zip(*found, strict=True)
            rows[name] |= {"seconds": statistics.median(wall), "cpu_seconds": min(cpu), "rounds": len(found)}


@jax.jit
def distance(found: tuple, expected: tuple) -> jax.Array:
    """Returns the relative Frobenius distance of two sets of arrays."""
    pairs = [(x.astype(jnp.float32), y.astype(jnp.float32)) for x, y in zip(found, expected, strict=True)]
    return jnp.sqrt(sum(((x - y) ** 2).sum() for x, y in pairs) / sum((y**2).sum() for _, y in pairs))


def compare_gradients(rows: dict[str, dict], ready: dict[str, tuple[Candidate, float]], tolerance: float) -> None:
    """Writes into the rows how far the gradients are from the baseline's, and the error where ours are off."""
    expected = None
    for name in dict.fromkeys((BASELINE, *ready)):
        row, candidate = rows.get(name), ready.get(name, (None,))[0]
        if candidate is None or candidate.gradients is None or row["error"] or "CLM only" in name:
            continue
        try:
            found = candidate.gradients(candidate.run())
            expected = found if name == BASELINE else expected
            row["gradient_error"] = None if expected is None else float(distance(found, expected))
        except Exception as error:
            row["error"] = said(error)
        if ours(name) and row["gradient_error"] is not None and not row["gradient_error"] <= tolerance:
            row["error"] = f"the gradients are {row['gradient_error']:.2g} from the baseline's, more than {tolerance}"


def rows_of(shape: tuple[int, ...], rounds: int, limits: tuple[float, float], seconds: float) -> list[dict]:
    """Measures the candidates of one shape within about so many seconds."""
    end = time.monotonic() + seconds
    rows, ready = build(shape, BUILDING * seconds)
    take_turns(rows, ready, rounds, end - time.monotonic())
    narrow = level_of(shape) == 1 or jnp.bfloat16 == DTYPE
    compare_gradients(rows, ready, 2e-2 if narrow else 1e-3)
    base = rows.get(BASELINE, {}).get(CLOCK)
    for name, row in rows.items():
        if row[CLOCK] is None:
            continue
        if level_of(shape) == 1:
            ideal = 6 * shape[0] * shape[1] / limits[0]
        else:
            ideal = (8 if "recompute" in name else 6) * shape[0] * shape[1] * shape[2] / limits[1]
        row["roofline"], row["ratio"] = ideal / row[CLOCK], quotient(row[CLOCK], base)
    return list(rows.values())


def quotient(a: float | None, b: float | None) -> float | None:
    """Returns a / b, or None where one is missing."""
    return None if a is None or not b else a / b


def targets(rows: list[dict]) -> list[dict]:
    """Returns what is aimed at, `{"name", "value", "bound", "met"}` for every shape but the tiny one."""
    good = {(tuple(row["shape"]), row["implementation"]): row for row in rows if row["error"] is None}
    found = []

    def figure(shape: tuple, name: str, key: str = CLOCK) -> float | None:
        return good[shape, name][key] if (shape, name) in good else None

    def add(name: str, shape: tuple, value: float | None, bound: float, *, at_least: bool = False) -> None:
        met = None if value is None else bool(value >= bound if at_least else value <= bound)
        name = f"{name}, at {'least' if at_least else 'most'}, {list(shape)}"
        found.append({"name": name, "value": value, "bound": bound, "met": met})

    for shape in (s for s in SHAPES if s != TINY_SHAPE):
        mine, base = figure(shape, "ours one-pass"), figure(shape, BASELINE)
        if ON_GPU and level_of(shape) == 1:
            name, share = "level 1, share of copy bandwidth at 6 bytes per logit", figure(shape, "ours", "roofline")
            add(name, shape, share, 0.80, at_least=True)
        elif ON_GPU:
            share = figure(shape, "ours one-pass", "roofline")
            add("one pass, share of the matmul roofline", shape, share, 0.75, at_least=True)
            others = [figure(of, name) for of, name in good if of == shape and "CLM only" in name]
            best = min((seconds for seconds in others if seconds), default=None)
            add("one pass, time to the best CLM only", shape, quotient(mine, best), 1.05)
        elif level_of(shape) == 2:
            temporary = (figure(shape, name, "temporary_bytes") for name in ("ours one-pass", BASELINE))
            add("one pass, temporaries to naive dense", shape, quotient(*temporary), 1 / 14)
            add("one pass, time to naive dense", shape, quotient(mine, base), 0.70)
            add("one pass, time to the papers' targets in torch", shape, quotient(mine, figure(shape, PAPERS)), 0.35)
    return found


def line(row: dict) -> str:
    """Returns a row as one line of a Markdown table."""
    cells = [row["name"][-1], row["shape"], row["implementation"], row["backend"] or ""]
    if row["seconds"] is None:
        return "| " + " | ".join(map(str, [*cells, row["error"] or row["skipped"]])) + " |"
    cells += [f"{row['seconds'] * 1e3:.2f}", f"{row['cpu_seconds'] * 1e3:.1f}"]
    for key, scale, digits in ("ratio", 1, 2), ("temporary_bytes", 2**20, 0), ("device_peak_bytes", 2**20, 0):
        cells.append("" if row[key] is None else f"{row[key] / scale:.{digits}f}")
    error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
    cells += [f"{row['roofline']:.0%}", f"{row['loss']:.5f}", error]
    return "| " + " | ".join(map(str, cells)) + " |" + (f" {row['error']}" if row["error"] else "")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of what takes part, where it is installed."""
    found = {"python": sys.version.split()[0]}
    for name in ("jax", "jaxlib", "jax-cuda13-plugin", "numpy", "optax", "torch", "tokamax"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(path: Path, report: dict) -> None:
    """Writes the report in one step: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(part, path)


def main(words: list[str] | None = None) -> int:
    """Measures every shape, prints a table, writes the rows and returns the exit code."""
    start = time.monotonic()
    default = Path("runs") / f"fused_softmax_kl_{jax.default_backend()}.json"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=default, help=f"file to write to (default: {default})")
    parser.add_argument("--rounds", type=int, default=20 if ON_GPU else 5, help="at most (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=7.0, help="for everything (default: %(default)s)")
    arguments = parser.parse_args(words)
    limits, kind = ceilings(), jax.devices()[0].device_kind
    ceiling = {"copy_bytes_per_second": limits[0], "matmul_flops_per_second": limits[1]}
    report: dict[str, Any] = {"versions": versions(), "device": kind, "ceilings": ceiling, "rows": []}
    print(f"copy {limits[0] / 1e9:.0f} GB/s, matmul {limits[1] / 1e12:.2f} TFLOP/s, {kind}, {versions()}")
    heads = "level", "shape", "implementation", "backend", "ms", "CPU ms", "ratio", "temporaries, MiB"
    heads = *heads, "most on device, MiB", "roofline", "loss", "gradient error"
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|", flush=True)
    for i, shape in enumerate(SHAPES):
        left = start + 60 * arguments.minutes - time.monotonic()
        share = left * weight(shape) / sum(map(weight, SHAPES[i:]))
        rows = rows_of(shape, arguments.rounds, limits, max(share, 0.0))
        print("\n".join(map(line, rows)), flush=True)
        report["rows"] += rows
        report |= {"targets": targets(report["rows"]), "complete": i + 1 == len(SHAPES)}
        write(arguments.json, report)
        gc.collect()
        if ON_GPU and "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()
    print("\n| target | value | bound | met |\n|---|---|---|---|")
    for target in report["targets"]:
        value = "not measured" if target["value"] is None else f"{target['value']:.3f}"
        print(f"| {target['name']} | {value} | {target['bound']:.3f} | {target['met']} |")
    failed = [row for row in report["rows"] if row["error"] and ours(row["implementation"])]
    for row in failed:
        print(f"FAILED: {row['shape']}, {row['implementation']}: {row['error']}")
    print(f"{arguments.json}, {time.monotonic() - start:.0f} seconds")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
