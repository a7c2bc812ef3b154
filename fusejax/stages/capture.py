"""capture: run every source over the training text and keep its top-k distributions (artefact A1)."""

__all__ = ["capture", "capture_identity", "capture_settings", "chat_settings", "describe"]

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusejax.config import ModelRef
from fusejax.data.corpus import Document, read_corpus
from fusejax.data.encoding import DocumentEncoder
from fusejax.io.manifest import Manifest, read_manifest
from fusejax.io.progress import beat, progress, say
from fusejax.io.store import Record
from fusejax.io.tokenizer_probe import probe_tokenizer
from fusejax.io.tokenizers import check_vocabulary
from fusejax.parallel.processes import is_first, process_count
from fusejax.sources.capture import capture_shard, record_of
from fusejax.sources.open import Source, describe_source, jax_score, open_source
from fusejax.stages.capture_size import documents_per_shard, nominal_entries
from fusejax.stages.context import Run, finished
from fusejax.stages.import_distributions import content_of, import_distributions
from fusejax.stages.together import close_together, own_mesh, own_shards, shared_writer

_BATCH = 256  # documents encoded at a time


def _row_multiple(mesh: Mapping[str, int] | None) -> int:
    return mesh["data"] * mesh["fsdp"] if mesh else 1


def capture(run: Run) -> dict[str, Manifest]:
    """Captures every participant of the run; finished ones are skipped."""
    return {name: _capture_one(run, name, ref) for name, ref in run.participants.items()}


def describe(run: Run, ref: ModelRef) -> Source:
    """What computes a source of a run, and what identifies it."""
    if ref.distributions is not None:
        identity = content_of(ref.distributions)
        return Source(ref.model, run.model_path(ref), "imported", identity=identity)
    return describe_source(
        run.model_path(ref),
        name=ref.model,
        backend=ref.backend,
        url=ref.url,
        revision=ref.revision,
        trust_remote_code=ref.trust_remote_code,
    )


def capture_identity(run: Run, ref: ModelRef, source: Source) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and parents of a source's artefact: what determines its content."""
    corpus = read_manifest(run.corpus_dir, kind="corpus")
    return capture_settings(run, ref, source), {"corpus": corpus.fingerprint, "model": source.fingerprint}


def capture_settings(run: Run, ref: ModelRef, source: Source) -> dict[str, Any]:
    """How a source is captured; its weights are not read."""
    options = run.config.capture
    context = min(options.context, source.max_positions or options.context)
    return (
        {
            "split": "train",
            "top_k": options.top_k,
            "context": context,
            "batch_tokens": max(options.batch_tokens, context),
            "codec": options.codec,
            "compute_dtype": options.compute_dtype,
            "tokenizer": run.tokenizer(ref).fingerprint,
            "shard_size": _shard_size(run),
        }
        | chat_settings(run, ref)
        | _import_settings(ref)
    )


def _import_settings(ref: ModelRef) -> dict[str, Any]:
    given = ref.distributions
    return {} if given is None else {"distributions": given.model_dump(mode="json", exclude={"path"})}


def chat_settings(run: Run, ref: ModelRef, key: str = "chat_template") -> dict[str, str]:
    """What identifies a model's chat template, where the corpus has conversations."""
    template = run.encoder(ref).template
    return {} if template is None else {key: template.fingerprint}


def _shard_size(run: Run) -> int:
    options = run.config.capture
    if options.shard_size is not None:
        return options.shard_size
    text = read_manifest(run.corpus_dir, kind="corpus").facts["splits"]["train"]
    entries = nominal_entries(run)
    return documents_per_shard(text["documents"], text["bytes"], top_k=entries, codec=options.codec)


def _open(run: Run, ref: ModelRef, source: Source, *, context: int) -> tuple[Callable[..., Any], int]:
    """The function that scores a source, and the number that its rows must be a multiple of."""
    tokenizer, options = run.tokenizer(ref), run.config.capture
    if source.vocab_size is not None:
        check_vocabulary(tokenizer, source.vocab_size, str(source.directory))
    sizes = {"top_k": options.entries(tokenizer.vocab_size), "valid_vocab": tokenizer.vocab_size}
    if source.backend == "jax":
        model, mesh = run.model(ref, compute_dtype=options.compute_dtype), run.config.mesh.model_dump()
        return jax_score(model, **sizes, mesh=own_mesh(mesh)), _row_multiple(mesh)
    return open_source(source, **sizes, context=context, compute_dtype=options.compute_dtype), 1


def _capture_one(run: Run, name: str, ref: ModelRef) -> Manifest:
    options, source, directory = run.config.capture, describe(run, ref), run.captured_dir(name)
    settings, parents = capture_identity(run, ref, source)
    context, shard_size = settings["context"], settings["shard_size"]
    if done := finished(directory, kind="captured", settings=settings, parents=parents):
        return done
    if ref.distributions is not None:
        return import_distributions(run, name, ref, settings=settings, parents=parents)
    tokenizer, encoder = run.tokenizer(ref), run.encoder(ref)
    if note := probe_tokenizer(tokenizer):
        say(f"capture {name}: {note}")
    score, row_multiple = _open(run, ref, source, context=context)
    documents = read_corpus(run.corpus_dir, "train")
    identity = {"settings": settings, "parents": parents, "shard_size": shard_size, "codec": options.codec}
    writer = shared_writer(run, directory, kind="captured", **identity)
    count = -(-len(documents) // shard_size)
    shards = own_shards(range(count))
    missing = [shard for shard in shards if not writer.has(shard)]
    start = time.monotonic()
    with progress(f"capture {name}", total=sum(_bytes(documents, s, shard_size) for s in shards), unit="bytes") as bar:
        bar.start_at(sum(_bytes(documents, s, shard_size) for s in shards if s not in set(missing)))
        for number in missing:
            shard = documents[number * shard_size : (number + 1) * shard_size]
            encoded = encoder.encode_batch(shard)
            captured = capture_shard(
                score,
                encoded,
                top_k=options.entries(tokenizer.vocab_size),
                context=context,
                batch_tokens=settings["batch_tokens"],
                row_multiple=row_multiple,
                shares=process_count() if row_multiple > 1 else 1,
                names=[document.id for document in shard],
                on_batch=lambda _: beat(),
            )
            writer.seek(number)
            for document, tokens, found in zip(shard, encoded, captured, strict=True):
                writer.write(Record(document.id, *record_of(tokens, found)))
            writer.flush()
            bar.update(sum(document.n_bytes for document in shard))
    facts = {"documents": len(documents), "seconds": time.monotonic() - start}
    facts["unpredicted_bytes"] = _unpredicted_bytes(encoder, documents)
    return close_together(writer, count, facts=lambda _: facts)


def _unpredicted_bytes(encoder: DocumentEncoder, documents: Sequence[Document]) -> int:
    """Bytes of first tokens, which nothing predicts where the tokenizer has no start token."""
    if encoder.tokenizer.start_id is not None or not is_first():
        return 0
    total = 0
    for first in range(0, len(documents), _BATCH):
        part = encoder.encode_batch(documents[first : first + _BATCH])
        beat()
        total += sum(int(found.byte_ends[0]) if len(found.byte_ends) else found.n_bytes for found in part)
    return total


def _bytes(documents: Any, shard: int, size: int) -> int:
    return sum(documents[i].n_bytes for i in range(shard * size, min((shard + 1) * size, len(documents))))
