"""An SCE merge of the 1.1B models of `merge.py`, in transformers and in our model: the largest difference of logits.

    python benchmarks/merge_logits.py [--models DIR] [--scale small] [--json FILE]

Both compute in float32 on the processor, one after the other: 5 GB of memory, 12 GB of disk. Differences are compared
with the largest logit; what is left is the order of float32 sums.
"""

import argparse
import gc
import json
import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from merge import SCALES, generate
from transformers import AutoModelForCausalLM

from fusejax.io.hf import load_hf_model
from fusejax.models import logits
from fusejax.stages.merge import command


def compare(merged: Path, length: int) -> dict[str, float]:
    """Logits of random tokens by both, and how far they are apart."""
    theirs = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    tokens = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (1, length))
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy().copy()
    del theirs
    gc.collect()
    config, params = load_hf_model(merged, dtype="float32")
    params = jax.tree.map(jnp.asarray, params)
    positions = jnp.arange(length)[None]
    found = np.asarray(logits(params, config, jnp.asarray(tokens), positions, jnp.ones_like(positions)))
    return {"largest_logit": float(np.abs(wanted).max()), "largest_difference": float(np.abs(found - wanted).max())}


def main() -> None:
    """Generates models where there are none, merges, compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="where the models are, or are generated and kept")
    parser.add_argument("--scale", choices=tuple(SCALES), default="full", help="of generated models")
    parser.add_argument("--length", type=int, default=16, help="tokens")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge-logits-", dir=arguments.models or Path.cwd()) as place:
        root = arguments.models or Path(place) / "models"
        names = [str(root / name) for name in ("base", "t1", "t2", "t3")]
        if not Path(names[-1]).is_dir():
            root.mkdir(parents=True, exist_ok=True)
            generate(root, SCALES[arguments.scale])
        out = Path(place) / "out"
        command("merge", ["--method", "sce", "--base", names[0], "--targets", *names[1:], "--out", str(out)])
        found = compare(out, arguments.length)
        shutil.rmtree(out)
    print(json.dumps(found))
    if found["largest_difference"] > 1e-4 * found["largest_logit"]:
        raise SystemExit("the logits differ")
    if arguments.json:
        row = {"name": "sce 1.0, logits", "implementation": "fusejax merge", "baseline": "transformers", **found}
        arguments.json.write_text(json.dumps({"rows": [row]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
