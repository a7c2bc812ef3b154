"""Merging a generated Llama of 1.1B parameters (bf16, base and 3 targets): processor seconds, wall and memory.

    python benchmarks/merge.py [--scale small] [--json FILE] [--mergekit PATH/TO/mergekit-yaml] [--dir DIR]

Needs 12 GB of disk, which it frees (`--models DIR` keeps the models there for the next call). Every merge is one call
of the command line in a process of its own, page cache warm, with 2 threads for wall seconds; what is compared with
mergekit runs once more with 1 for processor seconds (two busy hyperthreads inflate them), the others do not.
`peak_bytes` is the largest anonymous memory (RssAnon) seen, `bound_bytes` what it may be: twice the largest matrix for
every input, and 200 MB. Where mergekit is not given, its published seconds stand in (0.1.5, 2 cores, the same shapes;
one thread for processor seconds), and the row says so. With `--json FILE` the table is also written beside it, as
`.md`; both grow with every method.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import yaml

from fusejax.io.stream_write import TensorWriter

CASES = {  # name -> arguments, how many targets, mergekit's method and parameters, its published CPU s and RssAnon
    "linear": (["--method", "linear"], 3, {}, (16.7, 2.7e9)),
    "task_arithmetic": (["--method", "task_arithmetic"], 3, {}, (16.4, 3.6e9)),
    "linear to a checkpoint": (["--method", "linear", "--format", "checkpoint"], 3, {}, None),
    "slerp": (["--method", "slerp", "--t", "0.4"], 1, {"t": 0.4}, (27.4, 2.5e9)),
    "sce 1.0": (["--method", "sce"], 3, {"select_topk": 1.0}, (49.8, 2.9e9)),
    "sce 0.1": (["--method", "sce", "--select-topk", "0.1"], 3, {"select_topk": 0.1}, (187.9, 3.0e9)),
    "ties 0.6": (["--method", "ties", "--density", "0.6"], 3, {"density": 0.6}, (211.9, 3.6e9)),
    "varm": (["--method", "varm"], 3, {}, None),
    "nuslerp": (["--method", "nuslerp"], 2, {}, None),
    "multislerp": (["--method", "multislerp"], 3, {}, None),
    "karcher": (["--method", "karcher"], 3, {}, None),
    "dare_linear": (["--method", "dare_linear", "--density", "0.6"], 3, {}, None),
    "dare_ties": (["--method", "dare_ties", "--density", "0.6"], 3, {}, None),
    "breadcrumbs": (["--method", "breadcrumbs", "--density", "0.6"], 3, {}, None),
    "breadcrumbs_ties": (["--method", "breadcrumbs_ties", "--density", "0.6"], 3, {}, None),
    "model_stock": (["--method", "model_stock"], 3, {}, None),
    "nearswap": (["--method", "nearswap"], 1, {}, None),
    "arcee_fusion": (["--method", "arcee_fusion"], 1, {}, None),
    "ram": (["--method", "ram", "--variant", "ramplus_tl"], 3, {}, None),
    "passthrough": (["--method", "passthrough"], 1, {}, None),
    "della": (["--method", "della", "--density", "0.6"], 3, {}, None),
    "della_linear": (["--method", "della_linear", "--density", "0.6", "--variant", "mergekit"], 3, {}, None),
}
COMPARED = ("linear", "task_arithmetic", "slerp", "sce 1.0", "sce 0.1", "ties 0.6")  # with mergekit
QUIET = ("--no-write-model-card", "--no-copy-tokenizer")  # the models have none
TARGETS = {"linear": 3.0, "sce 1.0": 5.0, "sce 0.1": 8.0, "ties 0.6": 8.0}
SCALES = {
    "full": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4, "vocab_size": 32000},
    "medium": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
               "num_key_value_heads": 4, "vocab_size": 16000},
    "small": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
              "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip


def shapes(scale: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes of the model."""
    width, mlp, vocab = scale["hidden_size"], scale["intermediate_size"], scale["vocab_size"]
    narrow = width // scale["num_attention_heads"] * scale["num_key_value_heads"]
    layer = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (narrow, width), "self_attn.v_proj": (narrow, width), "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width), "mlp.down_proj": (width, mlp),
    }  # fmt: skip
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, width)}
    for i in range(scale["num_hidden_layers"]):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return found | {"model.norm.weight": (width,), "lm_head.weight": (vocab, width)}


def generate(root: Path, scale: dict[str, int]) -> None:
    """Writes base, t1, t2, t3: Gaussian changes of rms 3e-4, 6e-4, 1.2e-3 times a log-normal factor per tensor."""
    import ml_dtypes

    rng = np.random.default_rng(0)
    pool = rng.standard_normal(2**22, dtype=np.float32)
    specs = {name: (shape, "bfloat16") for name, shape in shapes(scale).items()}
    config = scale | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 2048, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    writers = []
    for name in ("base", "t1", "t2", "t3"):
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps(config))
        writers.append(TensorWriter(root / name, specs))
    for name, (shape, _) in specs.items():
        size = int(np.prod(shape))
        factors = np.array([3e-4, 6e-4, 1.2e-3]) * rng.lognormal(0, 0.5, 3)
        for start in range(0, size, len(pool) // 2):
            count = min(len(pool) // 2, size - start)
            draws = [pool[at : at + count] for at in rng.integers(0, len(pool) - count, 4)]
            base = 0.02 * draws[0] + (1 if len(shape) == 1 else 0)
            for writer, values in zip(
                writers, [base, *(base + f * d for f, d in zip(factors, draws[1:], strict=True))], strict=True
            ):
                writer.write(name, start * 2, values.astype(ml_dtypes.bfloat16))
    for writer in writers:
        writer.finish()


def run(command: list[str]) -> tuple[float, float, int]:
    """Runs a command; returns wall seconds, processor seconds and the peak of anonymous memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                return
            lines = [line for line in status.splitlines() if line.startswith("RssAnon")]
            if lines:
                peak[0] = max(peak[0], int(lines[0].split()[1]) * 1024)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime, peak[0]


def ours(models: list[Path], words: list[str], count: int, out: Path, threads: int) -> tuple[float, float, int]:
    """One merge by `fusejax merge`."""
    command = [sys.executable, "-m", "fusejax", "merge", *words, "--base", str(models[0]), "--targets"]
    try:
        return run([*command, *map(str, models[1 : count + 1]), "--out", str(out), "--threads", str(threads)])
    finally:
        shutil.rmtree(out, ignore_errors=True)


def theirs(
    tool: str, models: list[Path], name: str, count: int, parameters: dict, out: Path
) -> tuple[float, float, int]:
    """The same merge by mergekit."""
    method = name.split()[0]
    recipe = {
        "merge_method": method, "dtype": "bfloat16", "parameters": parameters,
        "models": [{"model": str(path), **({} if method in ("sce", "slerp") else {"parameters": {"weight": 1.0}})}
                   for path in models[1 : count + 1]],
    }  # fmt: skip
    if method != "linear":
        recipe["base_model"] = str(models[0])
    if method == "slerp":
        recipe["models"].append({"model": str(models[0])})
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    try:
        return run(["env", "OMP_NUM_THREADS=1", tool, str(path), str(out), "-j", "1", *QUIET])
    finally:
        shutil.rmtree(out, ignore_errors=True)


HEADER = """\
| method | CPU s | wall s, 2 threads | anonymous MB | bound MB | mergekit: CPU s | anonymous MB | CPU ratio | memory ratio |
|---|---|---|---|---|---|---|---|---|"""  # noqa: E501


def line(row: dict) -> str:
    """A row as Markdown."""
    cells = [
        row["name"], f"{row['cpu_seconds']:.1f}", f"{row['seconds']:.1f}", f"{row['peak_bytes'] / 1e6:.0f}",
        f"{row['bound_bytes'] / 1e6:.0f}" + ("" if row["within_bound"] else " EXCEEDED"),
    ]  # fmt: skip
    if row["baseline"]:
        mark = "" if "measured" in row["baseline"] else " (published)"
        cells += [f"{row['baseline_cpu_seconds']:.1f}{mark}", f"{row['baseline_peak_bytes'] / 1e6:.0f}"]
        cells += [f"{row['ratio']:.1f}", f"{row['memory_ratio']:.1f}"]
    return f"| {' | '.join(cells + ['-'] * (9 - len(cells)))} |"


def measure(arguments: argparse.Namespace, root: Path) -> None:
    """Measures every case; prints a line for each."""
    scale = SCALES[arguments.scale]
    models = [(arguments.models or root) / name for name in ("base", "t1", "t2", "t3")]
    if not models[-1].is_dir():
        print(f"generating {arguments.scale} models in {models[0].parent}", file=sys.stderr, flush=True)
        models[0].parent.mkdir(parents=True, exist_ok=True)
        generate(models[0].parent, scale)
    sizes = [int(np.prod(shape)) for shape in shapes(scale).values()]
    rows: list[dict] = []
    kept = json.loads(arguments.json.read_text())["rows"] if arguments.update else []
    print(HEADER, flush=True)
    for name in arguments.only or CASES:
        words, count, settings, published = CASES[name]
        wall, cpu, peak = ours(models, words, count, root / "out", 2)
        if name in (*COMPARED, "varm"):
            _, cpu, peak1 = ours(models, words, count, root / "out", 1)
            peak = max(peak, peak1)
        baseline, source = published, "published"
        if arguments.mergekit and name in COMPARED:
            _, their_cpu, their_peak = theirs(arguments.mergekit, models, name, count, settings, root / "out")
            baseline, source = (their_cpu, their_peak), "measured"
        elif arguments.scale != "full":
            baseline = None
        ratio, memory = (baseline[0] / cpu, baseline[1] / peak) if baseline else (None, None)
        told = f"mergekit 0.1.5 ({source})" if baseline else None
        uses_base = name.split()[0] not in ("linear", "karcher", "passthrough")
        bound = 2 * 2 * max(sizes) * (count + uses_base) + 200 * 10**6
        within = peak <= bound
        rows.append({
            "name": name, "shape": [sum(sizes), count], "implementation": "fusejax merge", "seconds": wall,
            "cpu_seconds": cpu, "peak_bytes": peak, "bound_bytes": bound, "within_bound": within,
            "baseline": told,
            "baseline_cpu_seconds": baseline and baseline[0], "baseline_peak_bytes": baseline and baseline[1],
            "ratio": ratio, "memory_ratio": memory, "target_ratio": TARGETS.get(name), "roofline": 1.6 / cpu,
            "device": platform.processor() or platform.machine(),
        })  # fmt: skip
        print(line(rows[-1]), flush=True)
        if arguments.json:
            measured = {row["name"]: row for row in (*kept, *rows)}
            write([measured[name] for name in CASES if name in measured], arguments.json)


def write(rows: list[dict], path: Path) -> None:
    """Writes rows and versions as JSON, and as a table beside it."""
    versions = {name: version(name) for name in ("jax", "numpy")} | {"python": platform.python_version()}
    path.write_text(json.dumps({"versions": versions, "rows": rows}, indent=2) + "\n")
    told = f"Written by `python benchmarks/merge.py` (see there) on {platform.machine()}, {os.cpu_count()} processors, "
    told += ", ".join(f"{name} {number}" for name, number in versions.items())
    path.with_suffix(".md").write_text("\n".join([HEADER.split("  #")[0], *map(line, rows), "", told]) + "\n")


def main() -> None:
    """Generates, measures, cleans up and writes the rows where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument(
        "--scale", choices=tuple(SCALES), default="full", help="full: 1.1B; medium: 80M; small: for a test"
    )
    parser.add_argument("--mergekit", help="mergekit-yaml to measure beside it; default: its published numbers")
    parser.add_argument("--dir", type=Path, help="where the models are generated; not in memory (default: here)")
    parser.add_argument("--models", type=Path, help="where the models are, or are generated and kept")
    parser.add_argument("--update", action="store_true", help="keep what the JSON file says of other methods")
    parser.add_argument("--only", nargs="+", choices=tuple(CASES), help="some of the cases")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-benchmark-", dir=arguments.dir or Path.cwd()) as root:
        measure(arguments, Path(root))


if __name__ == "__main__":
    main()
