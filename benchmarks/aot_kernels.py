"""Compiles the kernels to machine code for TPUs and an H200 that are not here, and holds them to budgets.

    pip install libtpu jax-cuda13-pjrt==$(python -c 'import jaxlib; print(jaxlib.__version__)')   # and CUDA 13's ptxas
    python benchmarks/aot_kernels.py [--json FILE] [--chips v5p,h200]

Per chip and shape: bytes of temporaries, Pallas kernels, for the H200 registers and spilled bytes. A chip
whose compiler is not installed is named and skipped. Exit code 1 where a budget is exceeded or a kernel spills.
"""

import argparse
import functools
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MOSAIC_GPU_DUMP_PTXAS", "1")

import jax
import jax.numpy as jnp

from pallas_kernels import LseGather, linear_fusion_loss, lse_gather
from pallas_kernels.fused_softmax_kl import chunk_tokens
from pallas_kernels.testing import CHIPS, aot_compile, missing_compiler

MIB = 2**20
K, TEMPERATURE = 32, 2.0
LEVEL_1 = [(2048, vocab) for vocab in (32000, 32768, 50257, 128256, 151936, 256000)]
LEVEL_2 = [(8192, 4096, 32000), (8192, 4096, 128256), (8192, 2048, 256000), (8192, 8192, 32000)]
FULL = ("v5p", "h200")  # the others compile fewer shapes


def level_1(implementation, logits, ids, g_lse, g_z):
    """The primitive and its derivative at two temperatures."""
    options = {"temperatures": (1.0, TEMPERATURE), "implementation": implementation}
    out, pull = jax.vjp(lambda x: lse_gather(x, ids, **options), logits)
    return out, pull(LseGather(g_lse, g_z))


def level_2(implementation, hidden, head, labels, ids, logprobs, rest, weights):
    """The fused loss and its gradients in one pass."""
    options = {"temperature": TEMPERATURE, "implementation": implementation}
    options["chunk"] = chunk_tokens(hidden.shape[0], head.shape[1])  # that of an accelerator, not of this machine
    call = functools.partial(linear_fusion_loss, **options)
    return jax.value_and_grad(lambda h, w: call(h, w, labels, ids, logprobs, rest, weights, weights)[0], (0, 1))(
        hidden, head
    )


def problem(shape: tuple[int, ...]) -> tuple:
    """Returns (function, abstract arguments, budget for temporaries in bytes)."""
    s = jax.ShapeDtypeStruct
    if len(shape) == 2:
        tokens, vocab = shape
        arrays = s(shape, jnp.bfloat16), s((tokens, K + 1), jnp.int32), s((tokens, 2), "f"), s((tokens, K + 1), "f")
        # Where V is no multiple of 128, XLA lays out the argument itself with the tokens innermost and copies it.
        copies = 2 * 2 * tokens * vocab if vocab % 128 else 0
        return level_1, arrays, 32 * MIB + int(1.05 * copies)
    tokens, embed, vocab = shape
    ids, floats = s((tokens, K), jnp.int32), s((tokens,), "f")
    arrays = s((tokens, embed), jnp.bfloat16), s((embed, vocab), jnp.bfloat16), s((tokens,), jnp.int32)
    # The float32 gradient of the head, a bfloat16 copy of the head, a chunk of float32 logits and bfloat16 dlogits, the
    # hidden states' gradient.
    budget = int(1.1 * ((4 + 2) * embed * vocab + (4 + 2) * chunk_tokens(tokens, vocab) * vocab + 4 * tokens * embed))
    return level_2, (*arrays, ids, s((tokens, K), "f"), floats, floats), budget


def captured(call):
    """Returns (result, what the process wrote meanwhile, native code included)."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1), os.dup(2)
        try:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            result = call()
        finally:
            os.dup2(kept[0], 1), os.dup2(kept[1], 2)
            os.close(kept[0]), os.close(kept[1])
        file.seek(0)
        return result, file.read().decode(errors="replace")


def measure(chip: str, shape: tuple[int, ...]) -> dict:
    """Compiles one shape and returns its row."""
    fn, arguments, budget = problem(shape)
    implementation = "tpu" if CHIPS[chip][0] == "tpu" else "mosaic_gpu"
    if implementation == "mosaic_gpu" and shape[-1] % 8:
        implementation = "xla"  # as the default would choose
        budget = 2**62
    start = time.perf_counter()
    compiled, log = captured(lambda: aot_compile(chip, functools.partial(fn, implementation), *arguments))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    row = {
        "name": "aot_kernels",
        "level": 1 if fn is level_1 else 2,
        "shape": list(shape),
        "device": CHIPS[chip][2],
        "implementation": implementation,
        "seconds_to_compile": round(time.perf_counter() - start, 1),
        "kernels": len(re.findall(r"custom_call_target=\"(?:tpu_custom_call|mosaic_gpu\w*)\"", text)),
        "temporary_bytes": memory.temp_size_in_bytes,
        "budget_bytes": budget if implementation != "xla" else None,
        "registers": registers or None,
        "spilled_bytes": spills if registers else None,
    }
    row["ok"] = row["temporary_bytes"] <= budget and not spills
    return row


def markdown(rows: list[dict]) -> str:
    """Returns the rows as a table."""
    lines = [
        "| chip | level | shape | kernels | temporaries, MiB | budget, MiB | registers | spilled |",
        "|---" * 8 + "|",
    ]
    for r in rows:
        shape = ", ".join(f"{n} = {x}" for n, x in zip("TV" if r["level"] == 1 else "TDV", r["shape"], strict=True))
        used = " / ".join(map(str, r["registers"])) if r["registers"] else ""
        cells = r["device"], r["level"], shape, r["kernels"], round(r["temporary_bytes"] / MIB, 1)
        budget = "" if r["budget_bytes"] is None else round(r["budget_bytes"] / MIB)
        spilled = "" if r["spilled_bytes"] is None else r["spilled_bytes"]
        lines.append("| " + " | ".join(map(str, (*cells, budget, used, spilled))) + " |")
    return "\n".join(lines)


def main() -> int:
    """Compiles every chip and shape that it can; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated, of " + ", ".join(CHIPS))
    arguments = parser.parse_args()
    rows = []
    for chip in arguments.chips.split(","):
        why = missing_compiler(chip)
        if why:
            print(f"{chip}: skipped, {why}", flush=True)
            continue
        shapes = [*LEVEL_1, *LEVEL_2] if chip in FULL else [LEVEL_1[0], LEVEL_1[3], LEVEL_2[1]]
        for shape in shapes:
            rows.append(measure(chip, shape))
            print(json.dumps(rows[-1]), flush=True)
    versions = {"jax": jax.__version__, "python": sys.version.split()[0]}
    if arguments.json:
        arguments.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n")
    print(markdown(rows))
    return 0 if all(r["ok"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
