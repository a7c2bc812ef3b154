"""Which source is the best of a document: the papers' cross-entropy per own token against bits per byte.

    python benchmarks/source_choice.py [--json FILE] [--bytes N]

Four models of one shape are trained on the same text and differ only in their tokenizers (`FUSEJAX_DATA`, default
`../shared/data`: novels). A fair score finds them about equally good; a score that compares tokenizers finds one the
best nearly everywhere. Per held-out document, and per window of 256 bytes:

* `differ`: share where the winner by cross-entropy per own token is not the winner by bits per byte.
* `wins`: share that each model wins by either score.
* `cost_bits_per_byte`: bits per byte of the chosen models less those of the best choice, over all documents.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fusejax.alignment.parity.fusion import window_metric
from fusejax.config import RunConfig
from fusejax.data.corpus import read_corpus
from fusejax.distributions.weighing import window_bits_per_byte
from fusejax.stages.capture import describe
from fusejax.stages.context import Run
from fusejax.stages.evaluate import score_texts
from fusejax.stages.run import run_stages

DATA = Path(os.environ.get("FUSEJAX_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
TOKENIZERS = {
    "byte_bpe 512": ("byte_bpe", 512),
    "byte_bpe 2048": ("byte_bpe", 2048),
    "unigram 1024": ("unigram", 1024),
    "spm_bpe 4096": ("spm_bpe", 4096),
}
CONTEXT = 256


def config(place: Path, size: int) -> RunConfig:
    """A run of which only the models and the text are made."""
    corpus = DATA / "corpora" / "gutenberg"
    shape = {"hidden_size": 96, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2}
    models = [
        {
            "name": name.replace(" ", "-"),
            "model": str(place / "models" / name.replace(" ", "-")),
            "pretrain": {
                "shape": shape,
                "tokenizer": {"kind": kind, "vocab_size": vocab},
                "text": [{"path": str(corpus / "train.jsonl.gz"), "domain": "prose", "skip": 20}],
                "max_bytes": size,
                "max_document_bytes": 1024,
                "seq_len": CONTEXT,
                "batch_size": 4,
                "seed": 0,
            },
        }
        for name, (kind, vocab) in TOKENIZERS.items()
    ]
    return RunConfig.model_validate(
        {
            "output": str(place / "run"),
            "target": models[0],
            "sources": models,
            "corpus": {
                "train": [{"path": str(corpus / "train.jsonl.gz"), "domain": "prose", "limit": 20}],
                "test": [{"path": str(corpus / "test.jsonl.gz"), "domain": "prose"}],
                "max_document_bytes": 1024,
                "max_eval_bytes": 150_000,
            },
        }
    )


def scores(run: Run) -> list[list[Any]]:
    """[S][documents] of each model's score of each held-out document."""
    documents = read_corpus(run.corpus_dir, "test")[:]
    texts = [document.text for document in documents]
    return [
        list(
            score_texts(
                describe(run, ref), run.tokenizer(ref), texts, context=CONTEXT, batch_tokens=4096, label=ref.name
            ).documents
        )
        for ref in run.config.sources
    ]


def compare(found: list[list[Any]], window_bytes: int | None) -> dict[str, Any]:
    """Winners by both scores over documents or windows."""
    bits, tokens, sizes = [], [], []
    for document in zip(*found, strict=True):
        n = document[0].n_bytes
        rows = [(d.byte_ends, d.realised_logprob, n) for d in document]
        bits.append(np.stack([window_bits_per_byte(*row, window_bytes=window_bytes) for row in rows]))
        tokens.append(np.stack([window_metric(*row, window_bytes=window_bytes) for row in rows]))
        width = window_bytes or n
        sizes.append(np.minimum(width, n - width * np.arange(bits[-1].shape[1])))
    bit, token, size = np.concatenate(bits, 1), np.concatenate(tokens, 1), np.concatenate(sizes)
    by_bits, by_token, every = bit.argmin(0), token.argmin(0), np.arange(bit.shape[1])
    count = len(found)
    return {
        "windows": int(bit.shape[1]),
        "differ": float((by_bits != by_token).mean()),
        "wins_by_bits_per_byte": (np.bincount(by_bits, minlength=count) / bit.shape[1]).tolist(),
        "wins_by_token_ce": (np.bincount(by_token, minlength=count) / bit.shape[1]).tolist(),
        "cost_bits_per_byte": float(((bit[by_token, every] - bit.min(0)) * size).sum() / size.sum()),
        "cost_of_one_model": float((((bit - bit.min(0)) * size).sum(1) / size.sum()).min()),
    }


def main() -> None:
    """Trains, scores, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("--bytes", type=int, default=400_000, help="text that each model is trained on")
    given = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"{DATA} is not here: set FUSEJAX_DATA to a directory with corpora/gutenberg")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        made = config(Path(place), given.bytes)
        run_stages(made, ("pretrain", "prepare"))
        found = scores(Run(made))
    totals = {
        name: sum(d.nll_nats for d in documents) / (np.log(2) * sum(d.n_bytes for d in documents))
        for name, documents in zip(TOKENIZERS, found, strict=True)
    }
    result = {
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "numpy": np.__version__},
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "seconds": round(time.monotonic() - start, 1),
        "models": list(TOKENIZERS),
        "bits_per_byte": totals,
        "nats_per_token": {
            name: sum(d.nll_nats for d in documents) / sum(len(d.realised_logprob) for d in documents)
            for name, documents in zip(TOKENIZERS, found, strict=True)
        },
        "documents": compare(found, None),
        "windows of 256 bytes": compare(found, 256),
    }
    print(json.dumps(result, indent=1))
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
