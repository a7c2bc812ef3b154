"""prepare: read documents, cut long ones, drop duplicates, split, and keep them as artefact A0."""

__all__ = [
    "EMBEDDED",
    "Sample",
    "corpus_from_documents",
    "described_sources",
    "embedded_documents",
    "prepare",
    "read_source",
    "read_sources",
    "read_text",
    "sample_documents",
    "select",
]

import contextlib
import dataclasses
import importlib.metadata
import itertools
import sys
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from fusejax.config import CorpusConfig, TextSource
from fusejax.data.corpus import CorpusReader, Document, SplitWriter, cut_documents, split_of, write_corpus
from fusejax.data.embedded import embedded_corpus
from fusejax.data.readers import ReadCounts, read_documents
from fusejax.errors import InputError
from fusejax.io.manifest import Manifest, atomic_directory, file_checksum, fingerprint_of, write_manifest
from fusejax.io.progress import beat, say
from fusejax.stages.context import Run, finished

EMBEDDED = "embedded"  # as a path: text that the Python installation itself holds


def prepare(run: Run) -> Manifest:
    """Makes the corpus of a run, or returns the manifest of the one that stands."""
    corpus = run.config.corpus
    seed = run.config.split_seed
    settings = {"corpus": _described(corpus), "seed": seed}
    done = finished(run.corpus_dir, kind="corpus", settings=settings, parents={})
    if done:
        return done
    run.replace_stale(run.corpus_dir)
    return corpus_from_documents(run.corpus_dir, read_text(corpus), corpus, seed=seed, settings=settings)


def read_text(
    corpus: CorpusConfig, *, open_source: Callable[[TextSource], Iterator[Document]] | None = None
) -> dict[str, Iterator[Document]]:
    """The documents of each split as a configuration gives them, read when they are asked for."""
    names = ("train", "valid", "test")
    return {name: read_sources(getattr(corpus, name), open_source or read_source) for name in names}


def corpus_from_documents(
    directory: Path,
    documents: Mapping[str, Iterable[Document]],
    corpus: CorpusConfig,
    *,
    seed: int,
    settings: Mapping[str, Any],
) -> Manifest:
    """Cuts, de-duplicates, splits and writes documents given per split; empty valid or test come from train.

    Documents are read once, and a batch of them is held at a time; of the others, hashes.
    """
    caps = {"train": corpus.max_train_bytes, "valid": corpus.max_eval_bytes, "test": corpus.max_eval_bytes}
    dropped: list[int] = [0]
    with atomic_directory(directory) as temporary:
        with contextlib.ExitStack() as stack:
            writers = {
                name: stack.enter_context(SplitWriter(temporary, name if cap is None else f"{name}-uncapped"))
                for name, cap in caps.items()
            }
            samples = {name: Sample(cap) for name, cap in caps.items() if cap is not None}
            for name, document in select(documents, corpus, seed=seed, dropped=dropped):
                writers[name].add(document)
                if name in samples:
                    samples[name].add(document)
        facts = {name: writers[name].facts for name in caps}
        for name, sample in samples.items():
            kept = sample.kept()
            found = (d for d, keep in zip(CorpusReader(writers[name].path), kept, strict=True) if keep)
            facts |= write_corpus(temporary, {name: found})
            writers[name].path.unlink()
        _refuse_empty(facts, {name: writer.count for name, writer in writers.items()})
        manifest = write_manifest(
            temporary, kind="corpus", settings=settings, facts={"splits": facts, "duplicates": dropped[0]}
        )
    sizes = ", ".join(f"{name} {f['documents']} documents {f['bytes'] / 1e6:.2f} MB" for name, f in facts.items())
    say(f"corpus: {sizes}; {dropped[0]} duplicates dropped")
    return manifest


def select(
    documents: Mapping[str, Iterable[Document]], corpus: CorpusConfig, *, seed: int, dropped: list[int]
) -> Iterator[tuple[str, Document]]:
    """Yields (split, piece) of all documents; adds the number of duplicates to `dropped[0]`.

    Held-out documents go first, so that a duplicate in train is the one that is dropped, and so that it is known
    whether there are any before train is split.
    """
    seen: set[int] = set()
    count = {"test": 0, "valid": 0, "train": 0}
    for given in count:
        shares = {
            "valid": 0.0 if count["valid"] else corpus.valid_fraction,
            "test": 0.0 if count["test"] else corpus.test_fraction,
        }
        for document in documents[given]:
            beat()
            if not document.text:
                continue
            if (key := document.content_key) in seen:
                dropped[0] += 1
                continue
            seen.add(key)
            count[given] += 1
            name = split_of(document, **shares, seed=seed) if given == "train" else given
            for piece in cut_documents([document], max_bytes=corpus.max_document_bytes):
                yield name, piece


def _refuse_empty(facts: Mapping[str, Mapping[str, Any]], uncapped: Mapping[str, int]) -> None:
    for name in ("train", "test"):
        if not facts[name]["documents"]:
            counts = ", ".join(f"{count} in {split}" for split, count in uncapped.items())
            raise InputError(
                f"the {name} split is empty (documents before the caps in bytes: {counts}). Give more documents in "
                "`corpus.train`, `corpus.test` of its own, or larger `max_train_bytes` and `max_eval_bytes`"
            )


def read_sources(
    sources: Sequence[TextSource], open_source: Callable[[TextSource], Iterator[Document]] | None = None
) -> Iterator[Document]:
    """The documents of sources one after another, with domains, and ids that are unique among them."""
    open_source = open_source or read_source
    domains = [source.domain for source in sources if source.path != EMBEDDED]
    taken: set[int] = set()
    for number, source in enumerate(sources):
        if source.path == EMBEDDED:
            yield from itertools.chain.from_iterable(embedded_documents(source.limit_bytes).values())
            continue
        several = len(domains) > 1 and (None in domains or domains.count(source.domain) > 1)
        others: dict[str, int] = {}
        for document in open_source(source):
            domain = source.domain or _domain(document)
            if document.domain not in ("", domain):
                others[document.domain] = others.get(document.domain, 0) + 1
            # Ids are unique within a source; its domain, else also its number, makes them so within the corpus.
            name = f"{domain}/{document.id}"
            if several:
                key = xxhash.xxh3_128_intdigest(name.encode())
                name = f"{domain}:{number}/{document.id}" if key in taken else name
                taken.add(key)
            yield dataclasses.replace(document, id=name, domain=domain)
        if others:
            shown = ", ".join(f"{name!r} ({count} documents)" for name, count in sorted(others.items())[:5])
            say(f"{source.path}: domain {source.domain!r} of the configuration takes the place of the records' {shown}")


def _domain(document: Document) -> str:
    if document.domain == "mean":
        raise InputError(
            f"document {document.id!r} says that its domain is 'mean', which is the results table's mean over domains; "
            "set `domain` of its source, or rename it in the data"
        )
    return document.domain or "text"


def read_source(source: TextSource, counts: ReadCounts | None = None) -> Iterator[Document]:
    """The documents of one source, as it holds them."""
    return read_documents(
        source.path,
        format=source.format,
        text_field=source.text_field,
        spans_field=source.spans_field,
        messages_field=source.messages_field,
        prompt_fields=source.prompt_fields,
        response_field=source.response_field,
        split=source.split,
        where=source.where,
        folds=source.folds,
        fold=source.fold,
        skip=source.skip,
        limit=source.limit,
        counts=counts,
    )


@lru_cache(maxsize=1)
def embedded_documents(max_bytes: int) -> dict[str, list[Document]]:
    """The text that this Python installation holds, by domain; read once per process."""
    return embedded_corpus(max_bytes_per_domain=max_bytes)


def _described(corpus: CorpusConfig) -> dict[str, Any]:
    """What determines the documents: the configuration, with what files hold in place of where they lie."""
    described = corpus.model_dump(mode="json", exclude={"chat_template", "seed"})
    for name in ("train", "valid", "test"):
        described[name] = described_sources(getattr(corpus, name))
    return described


def described_sources(sources: Sequence[TextSource]) -> list[dict[str, Any]]:
    """What determines the documents of sources; options that choose nothing are left out, as before there were any."""
    described = [source.model_dump(mode="json") for source in sources]
    for entry in described:
        entry["path"] = _content(entry["path"])
        unchosen = [option for option in ("where", "fold", "skip") if not entry[option]]
        for option in unchosen + ["folds"] * ("fold" in unchosen):
            del entry[option]
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
    return sorted(documents, key=lambda d: (_rank(d), d.id))


class Sample:
    """Which of the documents of a split are kept: up to a number of bytes of each domain, spread over all."""

    def __init__(self, max_bytes: int):
        self._max_bytes = max_bytes
        self._ranks, self._sizes, self._domains = array("Q"), array("Q"), array("I")
        self._numbers: dict[str, int] = {}  # of the domains

    def add(self, document: Document) -> None:
        """Counts a document, in the order of the split."""
        self._ranks.append(_rank(document))
        self._sizes.append(document.n_bytes)
        self._domains.append(self._numbers.setdefault(document.domain, len(self._numbers)))

    def kept(self) -> list[bool]:
        """Whether each document is kept."""
        used, kept = [0] * len(self._numbers), [False] * len(self._ranks)
        for index in sorted(range(len(self._ranks)), key=self._ranks.__getitem__):
            size = used[self._domains[index]] + self._sizes[index]
            if size <= self._max_bytes:
                used[self._domains[index]], kept[index] = size, True
        return kept


def _rank(document: Document) -> int:
    return xxhash.xxh3_64_intdigest(document.id.encode(), seed=1)
