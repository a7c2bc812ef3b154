"""Plans of Llama-2-7B and Mistral-7B on four machines that are not here, beside what the devices' compilers say.

    python benchmarks/plan_golden.py [--json FILE] [--markdown FILE] [--only a100,v5e]

FuseLLM's step: 128 rows of 2048 tokens, bfloat16, full rematerialisation, one row per device and micro-batch. Writes
docs/results/plan_golden.{json,md} by default. Where libtpu, or jax-cuda13-pjrt with ptxas on the PATH, is installed,
each plan is also compiled for the device: `ratio` is predicted memory over what its compiler states; elsewhere the
figure of the last time is kept while the program takes the same for the processor. A test holds predictions to the
committed ones within 2 %.
"""

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=256"

import jax

from fusejax.models.presets import PRESETS
from fusejax.parallel.device_kinds import DEVICE_KINDS
from fusejax.stages.plan import preset_run
from fusejax.stages.plan_child import USABLE, plan, work
from fusejax.stages.plan_memory import predict
from fusejax.stages.plan_program import Shape, compile_on_host
from fusejax.stages.plan_text import bytes_text, render

RESULTS = Path(__file__).parent.parent / "docs" / "results"
MODELS = ("llama-2-7b", "mistral-7b")
MACHINES = {
    "8 x A100-40G": ("A100-40G", {"data": 1, "fsdp": 8, "tensor": 1}),
    "8 x H100-80G": ("H100-80G", {"data": 1, "fsdp": 8, "tensor": 1}),
    "v5e-64": ("v5e", {"data": 1, "fsdp": 64, "tensor": 1}),
    "v5p-256": ("v5p", {"data": 1, "fsdp": 128, "tensor": 2}),  # 128 rows: one for two chips
}
KINDS = ("A100-40G", "A100-80G", "H100-80G", "H200", "B200", "v4", "v5e", "v5p", "v6e", "v7x")
TOKENS = 1_500_000_000  # MiniPile, roughly


_OPENING = """# Plans of 7B models

Made by `python benchmarks/plan_golden.py`. FuseLLM's step (128 rows of 2048 tokens, bfloat16 with float32 parameters,
moments and gradients, full rematerialisation, one row per device and micro-batch). *Predicted* is the sum of
[plan](../plan.md), *device's compiler* what XLA for that device states without the device, *processor's compiler* what
the same program takes where bfloat16 is computed in float32. Speed is predicted; nothing was run on these machines.
For TPUs the prediction leaves out attention scores, which their kernel does not hold, and lets share memory what their
compiler lets share it (`fusejax/stages/plan_memory.py`); for GPUs it adds up.
Processor seconds are of both compilers; without the device's a plan takes 8 to 10.
"""
_COLUMNS = (
    *("model", "machine", "mesh", "predicted", "device's compiler", "ratio", "processor's compiler", "fits"),
    *("tokens/s", "MFU", "sent per device and step", "processor seconds"),
)


def measure(model: str, machine: str, compiler: str) -> dict:
    """Returns one row."""
    kind, mesh = MACHINES[machine]
    began = time.perf_counter(), time.process_time()
    found = plan(preset_run(model, mesh), mesh, kind=DEVICE_KINDS[kind], compiler=compiler, tokens=TOKENS)
    compilers = found.pop("compilers")
    stated = next((c["argument_bytes"] + c["temporary_bytes"] for name, c in compilers.items() if name != "cpu"), None)
    host = compilers["cpu"]["argument_bytes"] + compilers["cpu"]["temporary_bytes"]
    return {
        "name": "plan",
        "shape": [model, machine],
        "implementation": "predicted",
        "baseline": found["memory_source"] if stated else None,
        "seconds": round(time.perf_counter() - began[0], 1),
        "cpu_seconds": round(time.process_time() - began[1], 1),
        "peak_bytes": found["predicted_bytes"],
        "ratio": round(found["predicted_bytes"] / stated, 4) if stated else None,
        "roofline": found["mfu"],
        "device": kind,
        "compiler_bytes": stated,
        "host_compiler_bytes": host,
        "plan": found,
    }


def keep_compiler(row: dict, before: list[dict]) -> None:
    """Keeps what a device's compiler said of the same prediction where it is not installed this time."""
    for old in before:
        moved = abs(old["host_compiler_bytes"] / row["host_compiler_bytes"] - 1)
        same = old["shape"] == row["shape"] and moved < 1e-3
        if same and old["compiler_bytes"] and not row["compiler_bytes"]:
            row |= {key: old[key] for key in ("baseline", "compiler_bytes")}
            row["ratio"] = round(row["peak_bytes"] / row["compiler_bytes"], 4)


def every_kind() -> list[dict]:
    """Returns the predicted speed of Llama-2-7B's step on 64 devices of every kind: one program, many devices."""
    mesh = {"data": 1, "fsdp": 64, "tensor": 1}
    config, model = preset_run(MODELS[0], mesh), PRESETS[MODELS[0]]
    shape = Shape.of(config, model, mesh)
    host = compile_on_host(shape)
    rows = []
    for name in KINDS:
        kind = DEVICE_KINDS[name]
        found, memory = work(shape, kind, host), predict(shape, tpu=kind.is_tpu).total
        rate = {key: found["tokens_per_second"][key] for key in ("expected", "without_overlap")}
        rows.append({"device": name, "mfu": found["mfu"], "seconds": found["seconds_per_step"], **rate})
        rows[-1] |= {"predicted_bytes": memory, "fits": memory <= USABLE * kind.hbm_bytes}
    return rows


def kinds_markdown(rows: list[dict]) -> list[str]:
    """Returns the table of `every_kind`."""
    lines = ["\n## llama-2-7b on 64 devices of every kind (fsdp 64), predicted\n"]
    lines += ["| device | tokens/s | without overlap | MFU | compute, memory, communication, s | memory | fits |"]
    lines += ["|---" * 7 + "|"]
    for row in rows:
        parts = ", ".join(f"{row['seconds'][key]:.3g}" for key in ("compute", "memory", "communication"))
        cells = [row["device"], f"{row['expected']:,.0f}", f"{row['without_overlap']:,.0f}", f"{row['mfu']:.1%}", parts]
        cells += [bytes_text(row["predicted_bytes"]), "yes" if row["fits"] else "no"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def markdown(rows: list[dict], kinds: list[dict], versions: dict) -> str:
    """Returns the table and every plan in full."""
    lines = [_OPENING, "| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for row in rows:
        p = row["plan"]
        mesh = ", ".join(f"{axis} {size}" for axis, size in p["mesh"].items() if size > 1)
        cells = [*row["shape"], mesh, bytes_text(row["peak_bytes"])]
        cells += [bytes_text(row["compiler_bytes"]) if row["compiler_bytes"] else "", row["ratio"] or ""]
        cells += [bytes_text(row["host_compiler_bytes"]), "yes" if p["fits"] else "no"]
        cells += [f"{p['tokens_per_second']['expected']:,.0f}", f"{p['mfu']:.1%}", bytes_text(p["collective_bytes"])]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['cpu_seconds']:.0f} s"])) + " |")
    lines += kinds_markdown(kinds)
    lines.append(f"\n{', '.join(f'{name} {version}' for name, version in versions.items())}.")
    for row in rows:
        lines += [f"\n## {row['shape'][0]} on {row['shape'][1]}\n", "```text", render(row["plan"]), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Plans everything, prints a line each, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "plan_golden.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "plan_golden.md")
    parser.add_argument("--compiler", choices=("auto", "cpu"), default="auto", help="cpu: no device's compiler")
    parser.add_argument("--only", default="", help="parts of names of machines, by commas")
    arguments = parser.parse_args()
    wanted = [m for m in MACHINES if any(part.lower() in m.lower() for part in arguments.only.split(","))]
    before = json.loads(arguments.json.read_text())["rows"] if arguments.json.is_file() else []
    rows = []
    for machine in wanted:
        for model in MODELS:
            rows.append(measure(model, machine, arguments.compiler))
            keep_compiler(rows[-1], before)
            print(json.dumps({key: value for key, value in rows[-1].items() if key != "plan"}), flush=True)
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    kinds = every_kind()
    arguments.json.write_text(json.dumps({"versions": versions, "rows": rows, "kinds": kinds}, indent=1) + "\n")
    arguments.markdown.write_text(markdown(rows, kinds, versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
