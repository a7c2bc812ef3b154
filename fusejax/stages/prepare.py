"""prepare: read documents, cut long ones, drop duplicates, split, and keep them as artefact A0."""

__all__ = ["EMBEDDED", "corpus_from_documents", "embedded_documents", "prepare", "sample_documents"]

import dataclasses
import importlib.metadata
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from fusejax.config import CorpusConfig, TextSource
from fusejax.data.corpus import Document, cut_documents, dedupe, read_corpus, split_documents, write_corpus
from fusejax.data.embedded import embedded_corpus
from fusejax.data.readers import read_documents
from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, Manifest, atomic_directory, file_checksum, fingerprint_of, write_manifest
from fusejax.io.progress import say
from fusejax.stages.context import Run, finished

EMBEDDED = "embedded"  # as a path: text that the Python installation itself holds


def prepare(run: Run) -> Manifest:
    """Makes the corpus of a run, or returns the manifest of the one that stands."""
    corpus = run.config.corpus
    settings = {"corpus": _described(corpus), "seed": run.config.seed}
    done = finished(run.corpus_dir, kind="corpus", settings=settings, parents={})
    if done:
        return done
    run.replace_stale(run.corpus_dir)
    return corpus_from_documents(run.corpus_dir, _read_all(corpus), corpus, seed=run.config.seed, settings=settings)


def planned_documents(run: Run) -> Sequence[Document]:
    """The training documents that `prepare` keeps, or would keep, without writing anything."""
    if (run.corpus_dir / MANIFEST).is_file():
        return read_corpus(run.corpus_dir, "train")
    return _select(_read_all(run.config.corpus), run.config.corpus, seed=run.config.seed)[0]["train"]


def _read_all(corpus: CorpusConfig) -> dict[str, list[Document]]:
    return {name: _read(getattr(corpus, name)) for name in ("train", "valid", "test")}


def corpus_from_documents(
    directory: Path,
    documents: Mapping[str, Iterable[Document]],
    corpus: CorpusConfig,
    *,
    seed: int,
    settings: Mapping[str, Any],
) -> Manifest:
    """Cuts, de-duplicates, splits and writes documents given per split; empty valid or test come from train."""
    cut, dropped = _select(documents, corpus, seed=seed)
    with atomic_directory(directory) as temporary:
        facts = write_corpus(temporary, cut)
        manifest = write_manifest(
            temporary, kind="corpus", settings=settings, facts={"splits": facts, "duplicates": dropped}
        )
    sizes = ", ".join(f"{name} {f['documents']} documents {f['bytes'] / 1e6:.2f} MB" for name, f in facts.items())
    say(f"corpus: {sizes}; {dropped} duplicates dropped")
    return manifest


def _select(
    documents: Mapping[str, Iterable[Document]], corpus: CorpusConfig, *, seed: int
) -> tuple[dict[str, list[Document]], int]:
    """The documents of each split, and how many duplicates were dropped."""
    dropped = 0

    def count(_: Document) -> None:
        nonlocal dropped
        dropped += 1

    # Held-out documents go first, so that a duplicate in train is the one that is dropped.
    given = [(name, d) for name in ("test", "valid", "train") for d in documents[name] if d.text]
    owner = {id(d): name for name, d in given}
    splits: dict[str, list[Document]] = {"train": [], "valid": [], "test": []}
    for document in dedupe([d for _, d in given], on_drop=count):
        splits[owner[id(document)]].append(document)
    missing_valid, missing_test = not splits["valid"], not splits["test"]
    if missing_valid or missing_test:
        drawn = split_documents(
            splits["train"],
            valid=corpus.valid_fraction if missing_valid else 0.0,
            test=corpus.test_fraction if missing_test else 0.0,
            seed=seed,
        )
        splits = {name: drawn[name] if drawn[name] else splits[name] for name in splits} | {"train": drawn["train"]}
    caps = {"train": corpus.max_train_bytes, "valid": corpus.max_eval_bytes, "test": corpus.max_eval_bytes}
    cut = {
        name: _capped(list(cut_documents(found, max_bytes=corpus.max_document_bytes)), caps[name])
        for name, found in splits.items()
    }
    for name in ("train", "test"):
        if not cut[name]:
            counts = ", ".join(f"{len(found)} in {split}" for split, found in splits.items())
            raise InputError(
                f"the {name} split is empty (documents before the caps in bytes: {counts}). Give more documents in "
                "`corpus.train`, `corpus.test` of its own, or larger `max_train_bytes` and `max_eval_bytes`"
            )
    return cut, dropped


def _read(sources: Iterable[TextSource]) -> list[Document]:
    found: list[Document] = []
    taken: set[str] = set()
    for number, source in enumerate(sources):
        if source.path == EMBEDDED:
            found += itertools.chain.from_iterable(embedded_documents(source.limit_bytes).values())
            continue
        documents = read_documents(
            source.path,
            format=source.format,
            text_field=source.text_field,
            split=source.split,
            limit=source.limit,
        )
        for document in documents:
            # Ids are unique within a source; its domain, else also its number, makes them so within the corpus.
            name = f"{source.domain}/{document.id}"
            name = f"{source.domain}:{number}/{document.id}" if name in taken else name
            taken.add(name)
            found.append(dataclasses.replace(document, id=name, domain=source.domain))
    return found


@lru_cache(maxsize=1)
def embedded_documents(max_bytes: int) -> dict[str, list[Document]]:
    """The text that this Python installation holds, by domain; read once per process."""
    return embedded_corpus(max_bytes_per_domain=max_bytes)


def _described(corpus: CorpusConfig) -> dict[str, Any]:
    """What determines the documents: the configuration, with what files hold in place of where they lie."""
    described = corpus.model_dump(mode="json")
    for name in ("train", "valid", "test"):
        for entry in described[name]:
            entry["path"] = _content(entry["path"])
    return described


def _content(source: str) -> str:
    """The name and checksum of a file or folder (names become ids of documents); a hub name as it is."""
    path = Path(source)
    if source == EMBEDDED:
        return f"{EMBEDDED}@{_installation()}"
    if path.is_file():
        return f"{path.name}@{file_checksum(path)}"
    if path.is_dir():
        listing = [(str(p.relative_to(path)), file_checksum(p)) for p in sorted(path.rglob("*")) if p.is_file()]
        return f"folder@{fingerprint_of(listing)}"
    return source


def _installation() -> str:
    """The Python and the packages whose text is embedded."""
    found = sorted({(str(d.name), str(d.version)) for d in importlib.metadata.distributions()})
    return fingerprint_of([sys.version, found])


def sample_documents(documents: Iterable[Document]) -> list[Document]:
    """Orders documents by a hash of their ids: a first part of them is a sample that spreads over all."""
    return sorted(documents, key=lambda d: (xxhash.xxh3_64_intdigest(d.id.encode(), seed=1), d.id))


def _capped(documents: list[Document], max_bytes: int | None) -> list[Document]:
    """Keeps a sample of up to `max_bytes` of text of each domain, in the order given."""
    if max_bytes is None:
        return documents
    used: dict[str, int] = {}
    kept = set()
    for document in sample_documents(documents):
        size = used.get(document.domain, 0) + document.n_bytes
        if size <= max_bytes:
            used[document.domain] = size
            kept.add(document.id)
    return [document for document in documents if document.id in kept]
