"""What survives of a real source's distributions: tails of top-k, and positions inside a source token.

    python benchmarks/alignment_information.py [--json FILE] [--documents N]

stories3M (4,096 pieces) is the source, stories260K (512 pieces) the target, on TinyStories' test part
(`FUSEJAX_DATA`, default `../shared/data`). Both distributions are known in full here, so the loss of storing K
entries, of naming them by common symbols and of conditioning on part of a token can be told exactly.

* `tail`: mean relative error of the gradient with respect to the target's logits, against the divergence from the
  source's whole distribution over symbols, at aligned positions.
* `conditioned`: at positions inside a source token, the probability outside the kept events ("rest") and
  KL(whole conditional || stored and conditioned), by how the stored residual is scaled; `by_kept`: that KL by the
  stored mass that begins with the bytes read, from which the threshold is chosen.
"""

import argparse
import gzip
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.alignment import Conditioner, align_positions, coarse_map
from fusejax.io.hf import load_hf_model
from fusejax.io.tokenizers import Tokenizer, load_tokenizer
from fusejax.models import logits

DATA = Path(os.environ.get("FUSEJAX_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SOURCE, TARGET = "stories3M", "stories260K"
LENGTH, MAX_BYTES = 512, 850
TAILS = ("renormalize", "both renormalized", "zero", "bucket")


class Model:
    """A model with its tokenizer that gives whole distributions."""

    def __init__(self, name: str) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(DATA / "models" / name)
        self._cfg, params = load_hf_model(DATA / "models" / name)
        self._params = jax.tree.map(jnp.asarray, params)
        self._logits = jax.jit(lambda p, *batch: jax.nn.log_softmax(logits(p, self._cfg, *batch).astype(jnp.float32)))

    def __call__(self, tokens: Any) -> Any:
        """Log-probabilities [N, V] float64 of a document of N tokens."""
        row = np.zeros((1, LENGTH), np.int32)
        row[0, : len(tokens)] = tokens
        segments = (np.arange(LENGTH) < len(tokens)).astype(np.int32)[None]
        found = self._logits(self._params, row, np.arange(LENGTH, dtype=np.int32)[None], segments)
        return np.asarray(found[0, : len(tokens), : self.tokenizer.vocab_size], np.float64)


def by_symbol(probability: Any, symbols: Any, size: int) -> Any:
    """Sums [n, V] probabilities per symbol, [n, size + 1]; the last column is what has no symbol."""
    table = np.zeros((len(symbols), size + 1))
    table[np.arange(len(symbols)), np.where(symbols >= 0, symbols, size)] = 1
    return probability @ table


def gradient(p: Any, q_tokens: Any, symbols: Any, keep: Any, tail: str) -> Any:
    """d loss / d logits [n, V]: events are the symbols in `keep` [n, S] and what `tail` makes of the others."""
    size = p.shape[1] - 1
    q = by_symbol(q_tokens, symbols, size)
    kept, rest_p, rest_q = np.where(keep, p, 0), np.where(keep, 0, p).sum(1), np.where(keep, 0, q).sum(1)
    if tail in ("renormalize", "both renormalized"):
        kept, rest_p = kept / kept.sum(1, keepdims=True), np.zeros_like(rest_p)
    if tail == "zero":
        rest_p = np.zeros_like(rest_p)
    inside = np.divide(kept, q, out=np.zeros_like(q), where=q > 1e-300)
    outside = np.divide(rest_p, rest_q, out=np.zeros_like(rest_q), where=rest_q > 1e-300)
    ratio = np.where(keep, inside, outside[:, None])
    total = kept.sum(1, keepdims=True) + rest_p[:, None]
    column = np.where(symbols >= 0, symbols, size)
    if tail == "both renormalized":
        among = np.where(keep, q, 0).sum(1, keepdims=True)
        return q_tokens * np.where(keep[:, column], total / among - ratio[:, column], 0)
    return q_tokens * (total - ratio[:, column])


def tails(p: Any, q_tokens: Any, symbols: Any, k: int) -> dict[str, float]:
    """Mean relative gradient errors of each tail policy with the k most likely symbols stored."""
    everything = np.ones(p.shape, bool)
    whole = gradient(p, q_tokens, symbols, everything, "bucket")
    order = np.argsort(-p[:, :-1], axis=1)[:, :k]
    keep = np.zeros(p.shape, bool)
    np.put_along_axis(keep, order, True, axis=1)
    norm = np.linalg.norm(whole, axis=1)
    return {
        tail: float(np.mean(np.linalg.norm(gradient(p, q_tokens, symbols, keep, tail) - whole, axis=1) / norm))
        for tail in TAILS
    }


def stored(logprobs: Any, labels: Any, ends: Any, k: int) -> dict[str, Any]:
    """A captured record with the k most likely tokens."""
    ids = np.argsort(-logprobs, axis=1)[:, :k]
    top = np.take_along_axis(logprobs, ids, axis=1)
    residual = (
        np.log(np.maximum(1 - np.exp(top).sum(1), 1e-12)) if k < logprobs.shape[1] else np.full(len(top), -np.inf)
    )
    record = {"labels": labels, "byte_ends": ends, "topk_ids": ids.astype(np.int32), "topk_logprobs": top}
    return record | {"residual_logprob": residual}


class Unscaled(Conditioner):
    """A conditioner that keeps the whole stored residual."""

    def _residual_share(self, span: Any) -> Any:
        return np.ones(len(span))


def divergence(truth: Any, found: Any) -> tuple[Any, Any, Any]:
    """KL over the stored events and the rest, [n]; the true rest; the stored rest."""
    size = truth.shape[1] - 1
    kl, true_rest, rest = [], [], np.exp(found.residual_logprob.astype(np.float64))
    for row, ids, logprobs, outside in zip(truth, found.ids, found.logprobs, rest, strict=True):
        ids, logprobs = ids[ids >= 0], logprobs[ids >= 0]
        p = np.append(row[ids], max(row[: size + 1].sum() - row[ids].sum(), 0))
        q = np.append(np.exp(logprobs.astype(np.float64)), outside)
        used = p > 0
        kl.append(float((p[used] * (np.log(p[used]) - np.log(np.maximum(q[used], 1e-12)))).sum()))
        true_rest.append(p[-1])
    return np.array(kl), np.array(true_rest), rest


def run(documents: int, k: int) -> list[dict[str, Any]]:
    source, target = Model(SOURCE), Model(TARGET)
    vocab_map = coarse_map(source.tokenizer, target.tokenizer)
    size = target.tokenizer.vocab_size
    with gzip.open(DATA / "corpora" / "tinystories" / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"].encode()[:MAX_BYTES].decode("utf-8", "ignore") for line in lines]
    counts = np.zeros(source.tokenizer.vocab_size)
    for encoded in source.tokenizer.encode_batch(texts[documents:]):
        counts += np.bincount(encoded.labels, minlength=counts.size)
    shared = (source.tokenizer, target.tokenizer, vocab_map)
    options = {"counts": counts, "threshold": 0.0}
    conditioners = {"unigram share": Conditioner(*shared, **options), "unscaled": Unscaled(*shared, **options)}
    p_rows, q_rows, results, positions, dropped = [], [], {name: [] for name in conditioners}, 0, 0
    for text in texts[:documents]:
        theirs, ours = source.tokenizer.encode(text), target.tokenizer.encode(text)
        if max(len(theirs.tokens), len(ours.tokens)) > LENGTH:
            continue
        logp, logq = source(theirs.tokens), target(ours.tokens)
        index = align_positions(theirs.byte_ends, ours.byte_ends)
        paired = index >= 0
        p_rows.append(by_symbol(np.exp(logp[index[paired]]), vocab_map.symbol_of_source, size))
        q_rows.append(np.exp(logq[paired]))
        positions, dropped = positions + len(index), dropped + int((~paired).sum())
        whole = conditioners["unigram share"](
            stored(logp, theirs.labels, theirs.byte_ends, logp.shape[1]), ours.byte_ends, index
        )
        truth = np.zeros((len(whole.rows), size + 1))
        for row, ids, logprobs in zip(truth, whole.topk.ids, whole.topk.logprobs, strict=True):
            row[ids[ids >= 0]] = np.exp(logprobs[ids >= 0].astype(np.float64))
        truth[:, -1] = np.exp(whole.topk.residual_logprob)
        record = stored(logp, theirs.labels, theirs.byte_ends, k)
        for name, conditioner in conditioners.items():
            found = conditioner(record, ours.byte_ends, index)
            results[name].append(np.stack([*divergence(truth, found.topk), found.kept], axis=1))
    p, q = np.concatenate(p_rows), np.concatenate(q_rows)
    shape = {"documents": documents, "positions": positions, "aligned": len(p), "inside_a_source_token": dropped}
    rows: list[dict[str, Any]] = []
    for entries in (10, 64):
        rows.append(
            {"name": "tail", "shape": shape | {"k": entries}} | tails(p, q, vocab_map.symbol_of_target, entries)
        )
    for name, parts in results.items():
        kl, true_rest, rest, kept = np.concatenate(parts).T
        bands = {f">= {low}": float(kl[kept >= low].mean()) for low in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)}
        shares = {f">= {low}": float((kept >= low).mean()) for low in (0.0, 0.02, 0.05, 0.1, 0.2, 0.5)}
        means = {"kl_nats": float(kl.mean()), "true_rest": float(true_rest.mean()), "stored_rest": float(rest.mean())}
        rows.append({"name": f"conditioned, residual {name}", "shape": shape | {"k": k}} | means)
        rows[-1] |= {"kl_by_kept": bands, "share_by_kept": shares}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--documents", type=int, default=24)
    given = parser.parse_args()
    if not DATA.is_dir():
        parser.exit(0, f"no models at {DATA}; set FUSEJAX_DATA\n")
    rows = run(given.documents, 10)
    for row in rows:
        print(json.dumps(row))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        versions = {"python": platform.python_version(), "numpy": np.__version__, "jax": jax.__version__}
        given.json.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
