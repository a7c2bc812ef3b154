"""capture: run every source over the training text and keep its top-k distributions (artefact A1)."""

__all__ = ["capture", "scorer"]

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fusejax.config import ModelRef
from fusejax.data.corpus import read_corpus
from fusejax.io.manifest import Manifest, read_manifest
from fusejax.io.models import LoadedModel
from fusejax.io.progress import progress
from fusejax.io.store import Record, RecordWriter
from fusejax.io.tokenizers import check_vocabulary
from fusejax.sources.capture import capture_shard, record_of
from fusejax.stages.context import Run, finished


def scorer(model: LoadedModel, *, top_k: int, valid_vocab: int | None = None) -> Callable[..., Any]:
    """Returns the jitted forward pass: [B, T] int32 arrays -> (realised logprob [B, T], TopK [B, T, K] or None).

    Ids from `valid_vocab` on are padding of the model's vocabulary and get no probability.
    """
    import jax

    from fusejax.models import score_tokens

    params = jax.device_put(model.params)
    score = jax.jit(partial(score_tokens, cfg=model.config, k=top_k, valid_vocab=valid_vocab))
    return lambda tokens, labels, positions, segment_ids: score(
        params, tokens=tokens, labels=labels, positions=positions, segment_ids=segment_ids
    )


def capture(run: Run) -> dict[str, Manifest]:
    """Captures every participant of the run; finished ones are skipped."""
    return {name: _capture_one(run, name, ref) for name, ref in run.participants.items()}


def _capture_one(run: Run, name: str, ref: ModelRef) -> Manifest:
    options = run.config.capture
    corpus = read_manifest(run.corpus_dir, kind="corpus")
    tokenizer = run.tokenizer(ref)
    context = min(options.context, _limit(run, ref))
    settings = {
        "split": "train",
        "top_k": options.top_k,
        "context": context,
        "batch_tokens": max(options.batch_tokens, context),
        "dtype": options.dtype,
        "compute_dtype": options.compute_dtype,
        "tokenizer": tokenizer.fingerprint,
    }
    parents = {"corpus": corpus.fingerprint, "model": run.fingerprint(ref)}
    directory = run.captured_dir(name)
    stored = settings | {"shard_size": options.shard_size}
    if done := finished(directory, kind="captured", settings=stored, parents=parents):
        return done
    run.replace_stale(directory)
    documents = read_corpus(run.corpus_dir, "train")
    model = run.model(ref, compute_dtype=options.compute_dtype)
    check_vocabulary(tokenizer, model.config.vocab_size, str(run.model_path(ref)))
    writer = RecordWriter(directory, kind="captured", settings=settings, parents=parents, shard_size=options.shard_size)
    score = scorer(model, top_k=min(options.top_k, tokenizer.vocab_size), valid_vocab=tokenizer.vocab_size)
    total = sum(document.n_bytes for document in documents)
    positions, start = 0, time.monotonic()
    with progress(f"capture {name}", total=total, unit="bytes") as bar:
        bar.start_at(sum(documents[i].n_bytes for i in range(writer.resume_at)))
        for first in range(writer.resume_at, len(documents), options.shard_size):
            shard = documents[first : first + options.shard_size]
            encoded = tokenizer.encode_batch([document.text for document in shard])
            captured = capture_shard(
                score,
                encoded,
                top_k=min(options.top_k, tokenizer.vocab_size),
                context=context,
                batch_tokens=settings["batch_tokens"],
                dtype=options.dtype,
            )
            for document, tokens, found in zip(shard, encoded, captured, strict=True):
                header, arrays = record_of(tokens, found)
                writer.write(Record(document.id, header, arrays))
                positions += len(tokens.tokens)
            bar.update(sum(document.n_bytes for document in shard))
    facts = {"documents": len(documents), "positions": positions, "seconds": time.monotonic() - start}
    return writer.finish(facts=facts | {"bytes_per_position": writer.bytes_written / max(positions, 1)})


def _limit(run: Run, ref: ModelRef) -> int:
    from fusejax.io.models import open_config

    return open_config(run.model_path(ref)).max_positions
