"""How long training stands still for a checkpoint: written in the background, and waited for.

    python benchmarks/checkpoint_stall.py [--megabytes 200] [--json FILE]

The state is of float32 leaves of 10 MB. A step donates it, as the train step does; seconds are those of `save` alone,
the median of some. The checksum of every leaf is part of both.
"""

import argparse
import importlib.metadata
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.io.checkpoint import StateWriter

SAVES = 4


def stall(state: dict, *, background: bool) -> list[float]:
    """Returns the seconds of each `save`."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 1.0001, tree), donate_argnums=0)
    seconds = []
    with tempfile.TemporaryDirectory() as directory, StateWriter(directory, background=background) as writer:
        for number in range(SAVES + 1):
            state = jax.block_until_ready(step(state))
            began = time.perf_counter()
            writer.save(number, state)
            seconds.append(time.perf_counter() - began)
            writer.wait()
    return seconds[1:]  # the first compiles the checksums


def main() -> None:
    """Measures both and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    leaves = max(1, given.megabytes // 10)

    def state() -> dict:
        draws = (np.random.default_rng(i).normal(size=(2500, 1000)) for i in range(leaves))
        return {f"w{i}": jnp.asarray(x, jnp.float32) for i, x in enumerate(draws)}

    waited = statistics.median(stall(state(), background=False))
    behind = statistics.median(stall(state(), background=True))
    row = {
        "name": "checkpoint_stall",
        "shape": f"{leaves} x 10 MB float32",
        "implementation": "in the background",
        "baseline": "waited for",
        "seconds": behind,
        "baseline_seconds": waited,
        "peak_bytes": 2 * leaves * 10_000_000,
        "ratio": waited / behind,
        "roofline": None,
        "device": f"{jax.default_backend()} {platform.machine()}",
    }
    print(f"save of {row['shape']}: {behind:.3f} s in the background, {waited:.3f} s waited for")
    if given.json:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "orbax-checkpoint", "numpy")}
        given.json.write_text(json.dumps({"rows": [row], "versions": versions}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
