"""capture: run every source over the training text and keep its top-k distributions (artefact A1)."""

__all__ = ["capture", "capture_identity", "open_writer", "scorer"]

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from fusejax.config import ModelRef
from fusejax.data.corpus import read_corpus
from fusejax.io.manifest import Manifest, read_manifest
from fusejax.io.models import LoadedModel
from fusejax.io.progress import progress, say
from fusejax.io.store import Record, RecordWriter
from fusejax.io.tokenizer_probe import probe_tokenizer
from fusejax.io.tokenizers import check_vocabulary
from fusejax.sources.capture import capture_shard, record_of
from fusejax.stages.context import Run, finished


def scorer(
    model: LoadedModel, *, top_k: int, valid_vocab: int | None = None, mesh: Mapping[str, int] | None = None
) -> Callable[..., Any]:
    """Returns the jitted forward pass: [B, T] int32 arrays -> (realised logprob [B, T], TopK [B, T, K] or None).

    Ids from `valid_vocab` on are padding of the model's vocabulary and get no probability. On a mesh, parameters
    and rows are split over its devices; B is then a multiple of data * fsdp.
    """
    import jax

    from fusejax.models import param_table, score_tokens
    from fusejax.parallel import batch_sharding, make_mesh, param_shardings

    score = partial(score_tokens, cfg=model.config, k=top_k, valid_vocab=valid_vocab)
    if not mesh or all(size == 1 for size in mesh.values()):
        params, rows, score = jax.device_put(model.params), None, jax.jit(score)
    else:
        made = make_mesh(data=mesh["data"], fsdp=mesh["fsdp"], tensor=mesh["tensor"])
        params = jax.device_put(model.params, param_shardings(param_table(model.config), made))
        rows, score = batch_sharding(made), jax.jit(partial(score, mesh=made))

    def run(tokens: Any, labels: Any, positions: Any, segment_ids: Any) -> Any:
        arrays = {"tokens": tokens, "labels": labels, "positions": positions, "segment_ids": segment_ids}
        return score(params, **{name: jax.device_put(array, rows) for name, array in arrays.items()})

    return run


def _row_multiple(mesh: Mapping[str, int] | None) -> int:
    return mesh["data"] * mesh["fsdp"] if mesh else 1


def capture(run: Run) -> dict[str, Manifest]:
    """Captures every participant of the run; finished ones are skipped."""
    return {name: _capture_one(run, name, ref) for name, ref in run.participants.items()}


def capture_identity(run: Run, ref: ModelRef) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and parents of a source's artefact: what determines its content."""
    options = run.config.capture
    context = min(options.context, _limit(run, ref))
    settings = {
        "split": "train",
        "top_k": options.top_k,
        "context": context,
        "batch_tokens": max(options.batch_tokens, context),
        "codec": options.codec,
        "compute_dtype": options.compute_dtype,
        "tokenizer": run.tokenizer(ref).fingerprint,
    }
    corpus = read_manifest(run.corpus_dir, kind="corpus")
    return settings, {"corpus": corpus.fingerprint, "model": run.fingerprint(ref)}


def open_writer(run: Run, name: str, ref: ModelRef) -> RecordWriter:
    """The writer of a source's artefact; it keeps the shards that are in place."""
    settings, parents = capture_identity(run, ref)
    options = run.config.capture
    return RecordWriter(
        run.captured_dir(name),
        kind="captured",
        settings=settings,
        parents=parents,
        shard_size=options.shard_size,
        codec=options.codec,
    )


def _capture_one(run: Run, name: str, ref: ModelRef) -> Manifest:
    options = run.config.capture
    settings, parents = capture_identity(run, ref)
    directory = run.captured_dir(name)
    stored = settings | {"shard_size": options.shard_size}
    if done := finished(directory, kind="captured", settings=stored, parents=parents):
        return done
    run.replace_stale(directory)
    tokenizer = run.tokenizer(ref)
    if note := probe_tokenizer(tokenizer):
        say(f"capture {name}: {note}")
    model = run.model(ref, compute_dtype=options.compute_dtype)
    check_vocabulary(tokenizer, model.config.vocab_size, str(run.model_path(ref)))
    documents = read_corpus(run.corpus_dir, "train")
    writer = open_writer(run, name, ref)
    top_k, mesh = min(options.top_k, tokenizer.vocab_size), run.config.mesh.model_dump()
    score = scorer(model, top_k=top_k, valid_vocab=tokenizer.vocab_size, mesh=mesh)
    shards = range(-(-len(documents) // options.shard_size))
    missing = [shard for shard in shards if not writer.has(shard)]
    start = time.monotonic()
    with progress(f"capture {name}", total=sum(document.n_bytes for document in documents), unit="bytes") as bar:
        bar.start_at(sum(_bytes(documents, s, options.shard_size) for s in shards if s not in set(missing)))
        for number in missing:
            shard = documents[number * options.shard_size : (number + 1) * options.shard_size]
            encoded = tokenizer.encode_batch([document.text for document in shard])
            captured = capture_shard(
                score,
                encoded,
                top_k=top_k,
                context=settings["context"],
                batch_tokens=settings["batch_tokens"],
                row_multiple=_row_multiple(mesh),
            )
            writer.seek(number)
            for document, tokens, found in zip(shard, encoded, captured, strict=True):
                writer.write(Record(document.id, *record_of(tokens, found)))
            writer.flush()
            bar.update(sum(document.n_bytes for document in shard))
    return writer.finish(facts={"documents": len(documents), "seconds": time.monotonic() - start})


def _bytes(documents: Any, shard: int, size: int) -> int:
    return sum(documents[i].n_bytes for i in range(shard * size, min((shard + 1) * size, len(documents))))


def _limit(run: Run, ref: ModelRef) -> int:
    from fusejax.io.models import open_config

    return open_config(run.model_path(ref)).max_positions
