"""Strong and weak scaling of the compiled training step from 1 to 512 faked devices.

    python benchmarks/scaling.py [--json FILE] [--markdown FILE] [--most 512]

Llama-2-7B on H100 nodes of 8 (a fast link inside, a network between), rows of 2048 tokens, one row per device and
micro-batch. Strong: 512 rows per step whatever the devices. Weak: 8 rows per device. Layouts: `fsdp` shards over all
devices; `hybrid` shards over the 8 of a node and copies between nodes (data). Bytes and operations are read from the
partitioned program, one compilation per point; efficiency is `fusejax.parallel.costs` applied to them: tokens per
second and device, over those of one device that had the memory. Nothing is timed but the compilation.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=512"

from fusejax.config import RunConfig
from fusejax.parallel.device_kinds import DEVICE_KINDS
from fusejax.stages.plan import preset_run
from fusejax.stages.plan_child import plan

RESULTS = Path(__file__).parent.parent / "docs" / "results"
POINTS = {
    ("strong", "fsdp"): (1, 2, 8, 64, 512),
    ("strong", "hybrid"): (64, 512),
    ("weak", "fsdp"): (1, 8, 64, 512),
    ("weak", "hybrid"): (64, 512),
}
STRONG_ROWS, WEAK_ROWS, NODE = 512, 8, 8
KIND = "H100-80G"


_OPENING = """# Scaling of the compiled step

Made by `python benchmarks/scaling.py`: Llama-2-7B, rows of 2048 tokens, one row per device and micro-batch, bfloat16,
full rematerialisation, H100 nodes of 8 (450 GB/s inside, 50 GB/s per device between nodes). Bytes are counted in the
program that XLA partitions for that many faked devices; times are the model of `fusejax/parallel/costs.py`. No such
machine was used. *Efficiency* is tokens per second and device over those of one device that had the memory, with
collectives behind the computation; *without overlap* with none of them there. It is above 100 % where more devices
share what one does alone in every micro-batch: adding gradients to their sum, 16 bytes per parameter.

How bytes grow. A micro-batch gathers every layer's parameters twice (forward, and again for the backward pass, where
they are not kept) and scatters their gradients once, in bfloat16: 3 * 2 bytes * parameters * (n - 1) / n per device,
whatever the number of tokens. So a token costs `6 * parameters * (n - 1) / n / 2048` bytes with one row at a time: it
grows from n = 1 to a few, then stays; more rows per micro-batch (less accumulation) divide it. `hybrid` gathers inside
a node only and sends gradients between nodes. The head is gathered once per step; its gradient is scattered in
float32 in every micro-batch. The embedding stays where it is stored: its columns are exchanged for rows, as many bytes
as the residual stream has, forward and back.

How memory falls. *State x n*, n being fsdp, is 1.00 where it falls as 1 / fsdp exactly. *Total x n* is not 1, and
grows, because of what no axis but `tensor` divides: the activations of a device's own rows, one layer's gathered
weights with what its backward pass needs, the gathered head (bfloat16) and its gradient of a micro-batch (float32),
before they are scattered. *Undivided* is all that is neither state nor a gradient of the step. With strong scaling to
as many devices as rows, accumulation ends and its second set of gradients with it.
"""


def points(most: int) -> list[tuple[str, str, int]]:
    """Returns (scaling, layout, devices)."""
    return [(scaling, layout, n) for (scaling, layout), counts in POINTS.items() for n in counts if n <= most]


def measure(scaling: str, layout: str, devices: int) -> dict:
    """Compiles one point for that many of the faked devices, and returns its row."""
    mesh = {"data": 1, "fsdp": devices, "tensor": 1}
    if layout == "hybrid":
        mesh |= {"data": devices // NODE, "fsdp": NODE}
    rows = STRONG_ROWS if scaling == "strong" else WEAK_ROWS * devices
    values = preset_run("llama-2-7b", mesh).model_dump(mode="json")
    values["train"] |= {"batch_size": rows, "accumulation": rows // devices}
    config = RunConfig.model_validate(values | {"mesh": mesh})
    began = time.perf_counter()
    found = plan(config, mesh, kind=DEVICE_KINDS[KIND], compiler="cpu", tokens=10**9)
    time_of = found["seconds_per_step"]
    memory = found["per_device_bytes"]
    return {
        "name": f"scaling_{scaling}_{layout}",
        "shape": [devices, rows, 2048],
        "implementation": "predicted",
        "baseline": "one device",
        "seconds": round(time.perf_counter() - began, 1),
        "peak_bytes": memory["total"],
        "state_bytes": memory["params"] + memory["optimizer"],
        "undivided_bytes": memory["activations"] + memory["temporaries"] - found["memory_items"]["gradients"],
        "sent_bytes": found["collective_bytes"],
        "sent_bytes_per_token": round(found["collective_bytes"] * devices / (rows * 2048)),
        "collectives": found["collectives"],
        "step_seconds": time_of["expected"],
        "communication_seconds": time_of["communication"],
        "busy_seconds": time_of["compute"] + time_of["memory"],
        "tokens_per_second_per_device": round(found["tokens_per_second"]["expected"] / devices, 1),
        "tokens_per_second_per_device_without_overlap": round(
            found["tokens_per_second"]["without_overlap"] / devices, 1
        ),
        "roofline": found["mfu"],
        "device": KIND,
    }


def markdown(rows: list[dict], versions: dict) -> str:
    """Returns a table per scaling and layout."""
    lines = [_OPENING]
    for name in dict.fromkeys(row["name"] for row in rows):
        group = [row for row in rows if row["name"] == name]
        lines += [
            f"\n## {name.replace('_', ', ').replace('scaling, ', '').capitalize()}\n",
            "| devices | rows | memory per device, GiB | state, GiB | undivided, GiB | state x n | total x n "
            "| sent per device and step, GiB | sent per token, KiB | communication / busy, s | tokens/s per device "
            "| efficiency | without overlap |",
            "|---:" * 13 + "|",
        ]
        for row in group:
            cells = [row["shape"][0], row["shape"][1], f"{row['peak_bytes'] / 2**30:.2f}"]
            cells += [f"{row['state_bytes'] / 2**30:.2f}", f"{row['undivided_bytes'] / 2**30:.2f}"]
            # hybrid divides by the devices of a node alone
            ways = min(row["shape"][0], NODE) if row["name"].endswith("hybrid") else row["shape"][0]
            cells += [f"{row[key] * ways / rows[0][key]:.2f}" for key in ("state_bytes", "peak_bytes")]
            cells += [f"{row['sent_bytes'] / 2**30:.1f}"]
            cells += [f"{row['sent_bytes_per_token'] / 1024:.0f}"]
            cells += [f"{row['communication_seconds']:.2f} / {row['busy_seconds']:.2f}"]
            cells += [f"{row['tokens_per_second_per_device']:,.0f}", f"{row['ratio']:.1%}"]
            lines.append("| " + " | ".join(map(str, [*cells, f"{row['ratio_without_overlap']:.1%}"])) + " |")
    lines.append(f"\n{', '.join(f'{name} {version}' for name, version in versions.items())}.")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measures every point, prints a line each, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / "scaling.json")
    parser.add_argument("--markdown", type=Path, default=RESULTS / "scaling.md")
    parser.add_argument("--most", type=int, default=512, help="devices at most")
    arguments = parser.parse_args()
    versions = {"jax": importlib.metadata.version("jax"), "python": platform.python_version()}
    rows = []
    for point in points(arguments.most):
        row = measure(*point)
        first = rows[0] if rows else row
        for suffix in ("", "_without_overlap"):
            rate = row[f"tokens_per_second_per_device{suffix}"]
            row[f"ratio{suffix}"] = round(rate / first["tokens_per_second_per_device"], 4)
        rows.append(row)
        print(json.dumps({key: value for key, value in row.items() if key != "collectives"}), flush=True)
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
        arguments.markdown.write_text(markdown(rows, versions))
    return 0


if __name__ == "__main__":
    sys.exit(main())
