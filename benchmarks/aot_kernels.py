"""Compiles the kernels to machine code for TPUs and an H200 that are not here, and holds them to budgets.

    v=$(python -c 'import jaxlib; print(jaxlib.__version__)')
    pip install libtpu jax-cuda13-pjrt==$v && pip install --no-deps jax-cuda13-plugin==$v
    pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*'   # or another ptxas of CUDA 13; it must be on the PATH
    python benchmarks/aot_kernels.py [--json FILE] [--chips v5p,h200] [--allow-missing]

Per chip and shape: Pallas kernels, bytes of temporaries, for the H200 registers and spilled bytes. Every program is
compiled in a process of its own, because a kernel that a process has compiled before is not compiled, nor reported by
ptxas, again. A row is good if

* the temporaries are within 1.1 times what `needed` adds up, which leaves no room for one more array of the size of the
  logits (level 1) or of a chunk's logits (level 2);
* it holds the kernels expected, and ptxas reported registers and no spills for each of those of the H200;
* at level 2, no array of the program holds the logits of all tokens.

Exit code 1 where a row is not good, or where the compiler of a chip is not installed; `--allow-missing` goes on without
such a chip and says so in the JSON. Where nothing was compiled, no JSON is written and the exit code is 1.
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp

from pallas_kernels import LseGather, linear_fusion_loss, lse_gather
from pallas_kernels.fused_softmax_kl.tiling import chunk_tokens, pad_to
from pallas_kernels.testing import CHIPS, aot_compile, missing_compiler

MIB = 2**20
K, TEMPERATURE, HEADROOM = 32, 2.0, 1.1
FACTS = "facts: "  # what the compiling process says at the end of its log
KERNELS = 2  # forward and backward
COMPILERS = ("jax", "jaxlib", "libtpu", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")


class Case(NamedTuple):
    """One program: `lse_gather` (level 1) or, with `embed`, `linear_fusion_loss` (level 2), and the gradients."""

    tokens: int
    vocab: int
    embed: int = 0
    gathered: int = K + 1  # ids per row, the label's included

    @property
    def level(self) -> int:
        return 2 if self.embed else 1

    @property
    def chunk(self) -> int:
        return chunk_tokens(self.tokens, self.vocab)  # that of an accelerator, not of this machine


# 256 ids are what `fusejax` allows the events of a position (`loss.max_members`), 512 twice that.
LEVEL_1 = [Case(2048, vocab) for vocab in (32000, 32768, 50257, 128256, 151936, 256000)]
# No two dimensions are alike, else `whole_logits` could take the head for the logits.
LEVEL_2 = [Case(8192, 32000, 4096), Case(8192, 128256, 4096), Case(8192, 256000, 2048), Case(16384, 32000, 8192)]
EVENTS = [case._replace(gathered=g) for case in (LEVEL_1[0], LEVEL_2[0]) for g in (257, 513)]
FULL = ("v5p", "h200")  # the others compile fewer shapes


def cases(chip: str) -> list[Case]:
    """Returns the programs to compile for a chip."""
    return [*LEVEL_1, *LEVEL_2, *EVENTS] if chip in FULL else [LEVEL_1[0], LEVEL_1[3], LEVEL_2[1]]


def implementation(chip: str, case: Case) -> str:
    """Returns what `implementation=None` would choose there."""
    if CHIPS[chip][0] == "tpu":
        return "tpu"
    return "xla" if case.vocab % 8 else "mosaic_gpu"


def level_1(implementation, logits, ids, g_lse, g_z):
    """The primitive and its derivative at two temperatures."""
    options = {"temperatures": (1.0, TEMPERATURE), "implementation": implementation}
    out, pull = jax.vjp(lambda x: lse_gather(x, ids, **options), logits)
    return out, pull(LseGather(g_lse, g_z))


def level_2(implementation, chunk, hidden, head, labels, ids, event, logprobs, rest, weights):
    """The fused loss and its gradients in one pass."""
    options = {"temperature": TEMPERATURE, "implementation": implementation, "chunk": chunk, "event": event}
    call = functools.partial(linear_fusion_loss, **options)
    return jax.value_and_grad(lambda h, w: call(h, w, labels, ids, logprobs, rest, weights, weights)[0], (0, 1))(
        hidden, head
    )


def program(chip: str, case: Case) -> tuple:
    """Returns (function, abstract arguments)."""
    s, (tokens, vocab, embed, gathered), name = jax.ShapeDtypeStruct, case, implementation(chip, case)
    if case.level == 1:
        arrays = s((tokens, vocab), jnp.bfloat16), s((tokens, gathered), jnp.int32)
        return functools.partial(level_1, name), (*arrays, s((tokens, 2), "f"), s((tokens, gathered), "f"))
    ids, floats = s((tokens, gathered - 1), jnp.int32), s((tokens,), "f")
    arrays = s((tokens, embed), jnp.bfloat16), s((embed, vocab), jnp.bfloat16), s((tokens,), jnp.int32)
    return functools.partial(level_2, name, case.chunk), (*arrays, ids, ids, s((tokens, K), "f"), floats, floats)


def needed(chip: str, case: Case) -> dict[str, int]:
    """Returns what the temporaries have to hold, name -> bytes; results are not temporaries."""
    tokens, vocab, embed, gathered = case
    lanes = 128
    parts = {
        "the kernels' own": 8 * MIB,
        "four arrays [T, G], G padded to the lanes of a TPU": 4 * 4 * tokens * pad_to(gathered, lanes),
    }
    if case.level == 1:
        if CHIPS[chip][0] == "tpu" and vocab % lanes:  # else the compiler lays out arguments as the kernel wants them
            return parts | {"logits and gradient, laid out anew": 2 * 2 * tokens * vocab}
        return parts
    parts |= {
        "gradient of the head, float32": 4 * embed * vocab,
        "logits of a chunk, float32": 4 * case.chunk * vocab,
        "their gradient, bfloat16": 2 * case.chunk * vocab,
        "hidden states of a chunk": 2 * case.chunk * embed,
    }
    if chip == "h200" and 4 * case.chunk <= 2 * embed:
        del parts["logits of a chunk, float32"]  # they lie where the result, the bfloat16 gradient of the head, will be
    if chip == "7x":
        parts["copy of the head"] = 2 * embed * vocab
    return parts


def whole_logits(text: str, case: Case) -> list[str]:
    """Returns the arrays of a compiled program that hold a number for every token and every row of the head."""
    arrays = set(re.findall(r"\b[a-z]\w*\[[\d,]+\]", text))
    sizes = {array: [int(n) for n in array[array.index("[") + 1 : -1].split(",")] for array in arrays}
    whole = case.tokens * case.vocab
    return sorted(a for a, size in sizes.items() if case.vocab in size and math.prod(size) == whole)


def compile_here(chip: str, case: Case) -> dict:
    """Compiles one program in this process and returns what the compiler says of it."""
    function, arguments = program(chip, case)
    start = time.perf_counter()
    compiled = aot_compile(chip, function, *arguments)
    text = compiled.as_text()
    return {
        "seconds_to_compile": round(time.perf_counter() - start, 1),
        "kernels": len(re.findall(r"custom_call_target=\"(?:tpu_custom_call|mosaic_gpu\w*)\"", text)),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "whole_logits": whole_logits(text, case),
    }


def compile_apart(chip: str, case: Case) -> str:
    """Compiles one program in a process of its own and returns the log, which ends with the facts."""
    command = [sys.executable, __file__, "--one", chip, *map(str, case)]
    environment = os.environ | {"MOSAIC_GPU_DUMP_PTXAS": "1", "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    return done.stdout.decode(errors="replace")


def judged(chip: str, case: Case, log: str) -> dict:
    """Returns the row of a program from the log of its compilation; `problems` says what is wrong with it."""
    kind, budget = implementation(chip, case), int(HEADROOM * sum(needed(chip, case).values()))
    row = {
        "name": "aot_kernels",
        "level": case.level,
        "shape": [case.tokens, *([case.embed] if case.embed else []), case.vocab],
        "gathered": case.gathered,
        "device": CHIPS[chip][2],
        "implementation": kind,
        "seconds_to_compile": None,
        "kernels": None,
        "temporary_bytes": None,
        "budget_bytes": budget,
        "registers": None,
        "spilled_bytes": None,
    }
    said = [line.removeprefix(FACTS) for line in log.splitlines() if line.startswith(FACTS)]
    if not said:
        lines = log.strip().splitlines() or ["nothing was said"]
        why = next((line for line in reversed(lines) if "Error" in line), lines[-1])
        return row | {"ok": False, "problems": [f"it does not compile: {why[:300]}"]}
    facts = json.loads(said[-1])
    whole, problems = facts.pop("whole_logits"), []
    row |= facts
    if row["temporary_bytes"] > budget:
        problems.append(f"temporaries of {row['temporary_bytes']} bytes, over the budget of {budget}")
    if kind != "xla" and row["kernels"] != KERNELS:
        problems.append(f"{row['kernels']} kernels, expected {KERNELS}")
    if case.level == 2 and whole:
        problems.append("holds the logits of all tokens: " + ", ".join(whole))
    if kind == "mosaic_gpu":
        row["registers"] = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
        spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
        if min(len(row["registers"]), len(spills)) < KERNELS:
            problems.append(
                f"ptxas reported {len(row['registers'])} kernels' registers and {len(spills)} kernels' spills"
            )
        else:
            row["spilled_bytes"] = sum(int(n) for pair in spills for n in pair)
            problems += [f"spills {row['spilled_bytes']} bytes"] if row["spilled_bytes"] else []
    return row | {"ok": not problems, "problems": problems}


def markdown(rows: list[dict]) -> str:
    """Returns the rows as a table, and what is wrong with them below it."""
    head = "chip", "level", "shape", "kernels", "temporaries, MiB", "budget, MiB", "registers", "spilled", "good"
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for r in rows:
        names = ("TV" if r["level"] == 1 else "TDV") + "G"
        shape = ", ".join(f"{n} = {x}" for n, x in zip(names, [*r["shape"], r["gathered"]], strict=True))
        sizes = ("" if r[key] is None else round(r[key] / MIB, 1) for key in ("temporary_bytes", "budget_bytes"))
        used, spilled = " / ".join(map(str, r["registers"] or [])), r["spilled_bytes"]
        cells = r["device"], r["level"], shape, r["kernels"], *sizes, used, spilled, "yes" if r["ok"] else "NO"
        lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    bad = [
        f"* {r['device']}, {r['shape']}, G = {r['gathered']}: {'; '.join(r['problems'])}" for r in rows if not r["ok"]
    ]
    return "\n".join([*lines, *([""] if bad else []), *bad])


def version(name: str) -> str | None:
    """Returns the version of an installed package."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(words: list[str] | None = None) -> int:
    """Compiles every chip and shape asked for; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file to write the rows to")
    parser.add_argument("--chips", default=",".join(CHIPS), help="comma-separated, of " + ", ".join(CHIPS))
    parser.add_argument("--allow-missing", action="store_true", help="go on without chips that have no compiler here")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)  # a chip and a case, for a process of its own
    arguments = parser.parse_args(words)
    if arguments.one:
        chip, *sizes = arguments.one
        print(FACTS + json.dumps(compile_here(chip, Case(*map(int, sizes)))), flush=True)
        return 0
    chips = arguments.chips.split(",")
    if unknown := set(chips) - set(CHIPS):
        parser.error(f"unknown chips: {', '.join(sorted(unknown))}; choose of {', '.join(CHIPS)}")
    missing = {chip: why for chip in chips if (why := missing_compiler(chip))}
    for chip, why in missing.items():
        print(f"{chip}: cannot be compiled for, {why}", file=sys.stderr)
    if missing and (not arguments.allow_missing or len(missing) == len(set(chips))):
        print("nothing was compiled, nothing was written; --allow-missing goes on with the others", file=sys.stderr)
        return 1
    rows = []
    for chip in (c for c in chips if c not in missing):
        for case in cases(chip):
            rows.append(judged(chip, case, compile_apart(chip, case)))
            print(json.dumps(rows[-1]), flush=True)
    print(markdown(rows))
    if arguments.json:
        versions = {name: installed for name in COMPILERS if (installed := version(name))}
        versions["python"] = sys.version.split()[0]
        arguments.json.write_text(json.dumps({"versions": versions, "skipped": missing, "rows": rows}, indent=1) + "\n")
    return 0 if all(r["ok"] for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
