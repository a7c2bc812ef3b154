"""Real text that every installation of fusejax already holds: the corpus of `fusejax quickstart`.

The domains are clearly different kinds of text: `python` (code without docstrings and comments), `prose` (English from
docstrings, pydoc topics, descriptions and licences) and `c` (C and C++ headers, comments kept). `stubs` (typed
signatures) and `json` replace a domain that this installation cannot fill.

A domain is filled by taking turns: the group (package) with the fewest bytes so far gives its next file, in an order
that hashes of labels decide; the standard library, which everybody has, counts as `STDLIB_SHARE` packages. So the
sample spreads over all packages, is the same for the same environment and seed, and reads only the files that it needs.

Deliberately not done: downloads, a cache (3 MB per domain take seconds), anything outside the interpreter.
"""

__all__ = ["DOMAINS", "collect_embedded", "embedded_corpus"]

import heapq
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import xxhash

from fusejax.data.corpus import Document, split_long
from fusejax.data.embedded.extract import c_text, docstrings, document_prose, python_parts, stub_text
from fusejax.data.embedded.places import SourceFile, find_files
from fusejax.data.embedded.quality import NearDuplicates, is_readable, unseen_paragraphs
from fusejax.errors import InputError

DOMAINS = ("python", "prose", "c", "stubs", "json")
STDLIB_SHARE = 12
_WANTED = 3
_MAX_FILE = 400_000
_MAX_DOCUMENT = 48_000
_SUFFIXES = {
    "python": (".py",),
    "prose": (".py", ".md", ".rst", ".txt", "METADATA", "LICENSE", "COPYING", "NOTICE"),
    "c": (".h", ".hpp", ".cuh"),
    "stubs": (".pyi",),
    "json": (".json",),
}

Roots = Iterable[tuple[str, str | os.PathLike[str]]]


def embedded_corpus(
    *, max_bytes_per_domain: int = 3_000_000, seed: int = 0, roots: Roots | None = None
) -> dict[str, list[Document]]:
    """Collects at least three domains of text from the running interpreter; see `collect_embedded`.

    Args:
      max_bytes_per_domain: UTF-8 bytes; a domain stops within one document of it.
      seed: another seed samples other files where there are more than needed.
      roots: pairs (group, directory) to read instead of the interpreter's own directories; an empty group makes each
        entry of the directory a group.

    Returns:
      domain -> documents, sorted by id; ids are `<domain>/<package>/<path>`.
    """
    return collect_embedded(max_bytes_per_domain=max_bytes_per_domain, seed=seed, roots=roots)[0]


def collect_embedded(
    *, max_bytes_per_domain: int = 3_000_000, seed: int = 0, roots: Roots | None = None
) -> tuple[dict[str, list[Document]], Counter[str]]:
    """Like `embedded_corpus`, and says what was left out.

    A domain counts as filled with two thirds of `max_bytes_per_domain`. Where fewer than three of `python`, `prose`
    and `c` are, `stubs` and `json` stand in, then whatever holds the most, down to a tenth.

    Returns:
      (domain -> documents, counts of files by reason: `unreadable`, `not_utf8`, `too_large`, `low_quality`,
      `near_duplicate`).

    Errors: InputError when three domains cannot be filled, with the bytes that were found.
    """
    if max_bytes_per_domain < 1000:
        raise InputError(f"max_bytes_per_domain is {max_bytes_per_domain}; a domain needs at least 1000 bytes")
    collector = _Collector(find_files(roots), max_bytes_per_domain, seed, pydoc=roots is None)
    filled: dict[str, list[Document]] = {}
    found: dict[str, list[Document]] = {}
    for domain in DOMAINS:
        if len(filled) == _WANTED:
            break
        found[domain] = collector.collect(domain)
        if _size(found[domain]) >= max_bytes_per_domain * 2 // 3:
            filled[domain] = found[domain]
    for domain in sorted(found, key=lambda d: -_size(found[d])):
        if len(filled) < _WANTED and _size(found[domain]) >= max_bytes_per_domain // 10:
            filled[domain] = found[domain]
    if len(filled) < _WANTED:
        sizes = ", ".join(f"{d} {_size(found[d]):,}" for d in found)
        raise InputError(
            f"this Python holds too little text for a demonstration: {sizes} bytes; three domains of at least "
            f"{max_bytes_per_domain // 10:,} are needed. Install fusejax with its dependencies into a virtual "
            "environment (pyarrow and numpy bring C headers), or give your own text to `fusejax run`"
        )
    return {d: filled[d] for d in DOMAINS if d in filled}, collector.left_out


def _size(documents: Iterable[Document]) -> int:
    return sum(document.n_bytes for document in documents)


class _Collector:
    """Reads, filters and samples files; a Python file is parsed once for both of its domains."""

    def __init__(self, files: list[SourceFile], max_bytes: int, seed: int, *, pydoc: bool):
        self._files, self._max_bytes, self._seed, self._pydoc = files, max_bytes, seed, pydoc
        self._docstrings: dict[str, str] = {}
        self.left_out: Counter[str] = Counter()

    def collect(self, domain: str) -> list[Document]:
        """Fills one domain up to the cap, sorted by id."""
        near, paragraphs, total = NearDuplicates(), set[int](), 0
        documents: list[Document] = []
        turns = _Turns(self._candidates(domain), self._seed)
        for group, label, read in turns:
            if total >= self._max_bytes:
                break
            text = read()
            if domain == "prose":
                text = unseen_paragraphs(text, paragraphs)
            if len(text) > _MAX_DOCUMENT:
                text = split_long(text, _MAX_DOCUMENT)[0]
            if not text:
                continue
            if not is_readable(text):
                self.left_out["low_quality"] += 1
            elif not near.admit(text):
                self.left_out["near_duplicate"] += 1
            else:
                documents.append(Document(f"{domain}/{label}", text, domain))
                total += documents[-1].n_bytes
                turns.took(group, documents[-1].n_bytes)
        return sorted(documents, key=lambda d: d.id)

    def _candidates(self, domain: str) -> Iterator[tuple[str, str, Callable[[], str]]]:
        """(group, label, reader of the domain's text) for every file that may belong to the domain."""
        if domain == "prose" and self._pydoc:
            yield from _pydoc_topics()
        for file in self._files:
            name = os.path.basename(file.path)
            if name.endswith(_SUFFIXES[domain]) or (domain == "prose" and name.startswith(_SUFFIXES[domain])):
                yield file.group, file.label, lambda file=file: self._extract(domain, file)

    def _extract(self, domain: str, file: SourceFile) -> str:
        if file.suffix == ".py":
            if domain == "python":
                code, self._docstrings[file.label] = python_parts(self._read(file))
                return code
            known = self._docstrings.pop(file.label, None)
            return known if known is not None else docstrings(self._read(file))
        text = self._read(file)
        if file.path.endswith("METADATA"):
            text = text.partition("\n\n")[2]  # the description follows the header fields
        return {"prose": document_prose, "c": c_text, "stubs": stub_text, "json": str.strip}[domain](text)

    def _read(self, file: SourceFile) -> str:
        """The file as UTF-8 with line feeds, or an empty string, counted."""
        try:
            if os.path.getsize(file.path) > _MAX_FILE:
                self.left_out["too_large"] += 1
                return ""
            with open(file.path, encoding="utf-8-sig") as handle:
                text = handle.read()
        except UnicodeDecodeError:
            self.left_out["not_utf8"] += 1
            return ""
        except OSError:
            self.left_out["unreadable"] += 1
            return ""
        return "" if "\0" in text else text


class _Turns:
    """Iterates over candidates so that the group with the fewest weighted bytes is next."""

    def __init__(self, candidates: Iterable[tuple[str, str, Callable[[], str]]], seed: int):
        queues: dict[str, list[tuple[int, str, Callable[[], str]]]] = {}
        for group, label, read in candidates:
            queues.setdefault(group, []).append((xxhash.xxh3_64_intdigest(label.encode(), seed=seed), label, read))
        self._queues = {group: sorted(queue, key=lambda e: e[:2], reverse=True) for group, queue in queues.items()}
        self._taken: dict[str, float] = dict.fromkeys(self._queues, 0.0)

    def took(self, group: str, n_bytes: int) -> None:
        """Books the bytes that the last candidate of a group gave."""
        self._taken[group] += n_bytes / (STDLIB_SHARE if group == "stdlib" else 1)

    def __iter__(self) -> Iterator[tuple[str, str, Callable[[], str]]]:
        heap = [(0.0, group) for group in sorted(self._queues)]
        while heap:
            _, group = heapq.heappop(heap)
            _, label, read = self._queues[group].pop()
            yield group, label, read
            if self._queues[group]:
                heapq.heappush(heap, (self._taken[group], group))


def _pydoc_topics() -> Iterator[tuple[str, str, Callable[[], str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package the documentation apart
        return
    for name in sorted(topics):
        yield "pydoc", f"pydoc/{name}", lambda name=name: document_prose(topics[name])
