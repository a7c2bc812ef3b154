"""Documents, and the corpus (artefact A0) that every later stage reads.

A corpus is a directory with one Arrow stream file per split (`train.arrow`, ...), the file that
`datasets.Dataset.from_file` maps: columns `id`, `text`, `domain`, `origin`, `layout`, all strings; `layout` says which
bytes are trained and who says them (`fusejax.data.spans`), and is empty for a plain document. It is written in batches
and read through a memory map, so neither side holds the corpus in memory.

A split is a function of the *original* document's text and of nothing else. So a document keeps its split when
others are added, removed or reordered, equal texts share a split, and the pieces of a long document never
straddle two splits: a piece carries the hash of its original in `origin`.

Deliberately not done: stratification by domain (the hash already gives every domain the same expected share),
fuzzy de-duplication of the user's own data (only the embedded corpus needs it), a manifest (the stages write it from
what `write_corpus` returns).
"""

__all__ = [
    "CorpusReader",
    "Document",
    "SplitWriter",
    "corpus_fingerprint",
    "cut_documents",
    "dedupe",
    "read_corpus",
    "split_documents",
    "split_long",
    "split_of",
    "write_corpus",
]

import bisect
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import xxhash

from fusejax.data.messages import Message
from fusejax.data.spans import Spans, Turn, clip_spans, layout_json, parse_layout
from fusejax.errors import InputError, nearest

_SCHEMA = pa.schema([(name, pa.string()) for name in ("id", "text", "domain", "origin", "layout")])
_BATCH_BYTES = 1 << 22
_SPLIT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_PARAGRAPH = re.compile(r"\n[ \t]*\n+")
_LINE = re.compile(r"\n")
_SPACE = re.compile(r"[ \t]+")


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text, with its id (unique in its corpus) and domain.

    `origin` is empty for a whole document; for a piece it is the hash of the text that it was cut from. `spans` are
    the bytes that are trained (None: all); `turns` who says what, where the document is a conversation.
    """

    id: str
    text: str
    domain: str = ""
    origin: str = ""
    spans: Spans | None = None
    turns: tuple[Turn, ...] = ()

    @property
    def n_bytes(self) -> int:
        """UTF-8 bytes of the text."""
        return len(self.text) if self.text.isascii() else len(self.text.encode())

    @property
    def trained_bytes(self) -> int:
        """UTF-8 bytes of the text that are trained."""
        return self.n_bytes if self.spans is None else sum(stop - start for start, stop in self.spans)

    @property
    def messages(self) -> list[Message]:
        """The messages of a conversation."""
        data, found = self.text.encode(), list[Message]()
        for turn in self.turns:
            said = data[turn.start : turn.stop].decode()
            found.append((turn.role, said, turn.more) if turn.more else (turn.role, said))
        return found

    @property
    def layout(self) -> str:
        """Spans and turns as they are stored."""
        return layout_json(self.spans, self.turns)

    @property
    def content_key(self) -> int:
        """The same number for documents whose texts are equal up to white space and train the same bytes."""
        return xxhash.xxh3_128_intdigest((" ".join(self.text.split()) + self.layout).encode())

    @property
    def split_key(self) -> str:
        """The hash of the original document's text: what decides the split."""
        return self.origin or xxhash.xxh3_64_hexdigest(self.text.encode())


def split_long(text: str, max_bytes: int) -> list[str]:
    """Cuts a text into pieces of at most `max_bytes` UTF-8 bytes whose concatenation is the text.

    A cut is made after the last paragraph break that fits, else after the last line break, else after the last run
    of spaces, else between two characters. A break in the first half of a piece is passed over for a finer one, so
    that no piece but the last is shorter than half of `max_bytes` (up to one character).

    Args:
      text: any text; an empty one gives no pieces.
      max_bytes: at least 4, the longest UTF-8 character.
    """
    if max_bytes < 4:
        raise InputError(f"max_bytes is {max_bytes}; one UTF-8 character may need 4 bytes: give 4 or more")
    pieces = []
    start = 0
    while start < len(text):
        end = _fitting_end(text, start, max_bytes)
        if end < len(text):
            end = _best_cut(text, start, end)
        pieces.append(text[start:end])
        start = end
    return pieces


def _fitting_end(text: str, start: int, max_bytes: int) -> int:
    """The largest end such that `text[start:end]` has at most `max_bytes` bytes."""
    window = text[start : start + max_bytes]
    encoded = window.encode()
    if len(encoded) <= max_bytes:
        return start + len(window)
    return start + len(encoded[:max_bytes].decode(errors="ignore"))


def _best_cut(text: str, start: int, end: int) -> int:
    """The end of the last paragraph, line or word in the second half of `text[start:end]`, else `end`."""
    half = start + (end - start + 1) // 2
    for pattern in (_PARAGRAPH, _LINE, _SPACE):
        cuts = [m.end() for m in pattern.finditer(text, half, end)]
        if cuts:
            return cuts[-1]
    return end


def cut_documents(documents: Iterable[Document], *, max_bytes: int) -> Iterator[Document]:
    """Replaces each document longer than `max_bytes` UTF-8 bytes by pieces with ids `<id>#<n>`, text unchanged.

    Spans are cut with the text, and pieces without any are left out. Conversations stay whole: the later half of one
    is another conversation.
    """
    for document in documents:
        if document.turns or document.n_bytes <= max_bytes:
            yield document
            continue
        key, at = document.split_key, 0
        for number, piece in enumerate(split_long(document.text, max_bytes)):
            start, at = at, at + len(piece.encode())
            spans = None if document.spans is None else clip_spans(document.spans, start, at)
            if spans is None or spans:
                yield Document(f"{document.id}#{number}", piece, document.domain, key, spans)


def dedupe(documents: Iterable[Document], *, on_drop: Callable[[Document], None] | None = None) -> Iterator[Document]:
    """Keeps the first of the documents whose texts are equal up to white space, and whose trained bytes are the same.

    Args:
      documents: read once, in order.
      on_drop: called with every document that is dropped, so that the caller can count them.
    """
    seen: set[int] = set()
    for document in documents:
        if (key := document.content_key) not in seen:
            seen.add(key)
            yield document
        elif on_drop is not None:
            on_drop(document)


def split_documents(
    documents: Iterable[Document], *, valid: float = 0.05, test: float = 0.05, seed: int = 0
) -> dict[str, list[Document]]:
    """Sorts documents into `train`, `valid` and `test` by a hash of the original document.

    Args:
      documents: whole ones or pieces; the pieces of one document go to one split.
      valid: expected share of documents in `valid`, in [0, 1).
      test: expected share in `test`; `valid + test` stays below 1.
      seed: another seed gives another, equally stable, split.

    Returns:
      The three lists, each in the order of the input.
    """
    splits: dict[str, list[Document]] = {"train": [], "valid": [], "test": []}
    if valid < 0 or test < 0 or valid + test >= 1:
        raise InputError(f"the shares valid={valid} and test={test} must be >= 0 with a sum below 1, or train is empty")
    for document in documents:
        splits[split_of(document, valid=valid, test=test, seed=seed)].append(document)
    return splits


def split_of(document: Document, *, valid: float, test: float, seed: int) -> str:
    """Returns the split of one document; see `split_documents`."""
    draw = xxhash.xxh3_64_intdigest(document.split_key.encode(), seed=seed) / 2**64
    return "test" if draw < test else "valid" if draw < test + valid else "train"


def corpus_fingerprint(documents: Iterable[Document]) -> str:
    """A hash of ids, texts and domains in order: equal for equal corpora whatever the file format or library."""
    state = xxhash.xxh3_128()
    for document in documents:
        _update(state, document)
    return state.hexdigest()


def _update(state: Any, document: Document) -> None:
    layout = [document.layout] if document.layout else []
    for field in (document.id, document.text, document.domain, document.origin, *layout):
        data = field.encode()
        state.update(len(data).to_bytes(8, "little"))
        state.update(data)


class SplitWriter:
    """Writes the documents of one split, a batch of them in memory; the file is complete or absent.

    Used as a context manager; `facts` are known when it has ended without an error.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str):
        if not _SPLIT_NAME.fullmatch(name):
            raise InputError(f"the split name {name!r} cannot be a file name: use letters, digits, '-' and '_'")
        self.path = Path(directory) / f"{name}.arrow"
        self.facts: dict[str, Any] = {}
        self.count = 0
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        self._state, self._domains, self._ids = xxhash.xxh3_128(), {}, set()
        self._batch: list[Document] = []
        self._batch_bytes = 0

    def __enter__(self) -> "SplitWriter":
        self._sink = pa.OSFile(str(self._temporary), "wb")
        self._writer = pa.ipc.new_stream(self._sink, _SCHEMA)
        return self

    def add(self, document: Document) -> None:
        """Adds a document, whose id no other of the split may have; its text and its spans may not be empty."""
        key = xxhash.xxh3_128_intdigest(document.id.encode())  # a corpus has more ids than memory should hold
        if key in self._ids:
            raise InputError(f"two documents have the id {document.id!r}: ids must be unique within a split")
        if not document.text:
            raise InputError(f"document {document.id!r} is empty: leave it out before the corpus is written")
        if document.spans == ():
            raise InputError(
                f"document {document.id!r} has no trained bytes: leave it out before the corpus is written"
            )
        self._ids.add(key)
        size = document.n_bytes
        entry = self._domains.setdefault(document.domain, {"documents": 0, "bytes": 0})
        entry["documents"] += 1
        entry["bytes"] += size
        if document.spans is not None:
            entry["trained_bytes"] = entry.get("trained_bytes", 0) + document.trained_bytes
        _update(self._state, document)
        self._batch.append(document)
        self._batch_bytes += size
        self.count += 1
        if self._batch_bytes >= _BATCH_BYTES:
            self._write_batch()

    def _write_batch(self) -> None:
        if self._batch:
            columns = [pa.array([getattr(d, name) for d in self._batch], pa.string()) for name in _SCHEMA.names]
            self._writer.write_batch(pa.record_batch(columns, schema=_SCHEMA))
        self._batch, self._batch_bytes = [], 0

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._write_batch()
            self._writer.close()
            self._sink.close()
            if kind is None:
                os.replace(self._temporary, self.path)
                self.facts = self._facts()
        finally:
            self._temporary.unlink(missing_ok=True)

    def _facts(self) -> dict[str, Any]:
        return {
            "file": self.path.name,
            "documents": self.count,
            "bytes": sum(entry["bytes"] for entry in self._domains.values()),
            "file_bytes": self.path.stat().st_size,
            "checksum": _file_checksum(self.path),
            "fingerprint": self._state.hexdigest(),
            "domains": {name: self._domains[name] for name in sorted(self._domains)},
        }


def write_corpus(directory: str | os.PathLike[str], splits: Mapping[str, Iterable[Document]]) -> dict[str, Any]:
    """Writes each split as `<directory>/<split>.arrow`; a split is complete or absent.

    Args:
      directory: made when absent.
      splits: name -> documents, each read once. Ids must be unique within a split and no text may be empty.

    Returns:
      What a manifest needs: `{split: {file, documents, bytes, file_bytes, checksum, fingerprint, domains}}`; `bytes`
      are UTF-8 bytes of text, `checksum` is the XXH3-64 of the file, `domains` maps a domain to documents and bytes.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    writers = {name: SplitWriter(root, name) for name in splits}
    for name, documents in splits.items():
        with writers[name] as writer:
            for document in documents:
                writer.add(document)
    return {name: writer.facts for name, writer in writers.items()}


def _file_checksum(path: Path) -> str:
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            state.update(chunk)
    return state.hexdigest()


class CorpusReader(Sequence[Document]):
    """The documents of one split, by index, through a memory map."""

    def __init__(self, path: str | os.PathLike[str]):
        try:
            with pa.memory_map(str(path)) as source:
                self._batches = pa.ipc.open_stream(source).read_all().to_batches()
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{path} is not a readable Arrow stream ({error}): run `fusejax prepare` again") from error
        if any(batch.schema.names != _SCHEMA.names for batch in self._batches):
            raise InputError(
                f"{path} has the columns {self._batches[0].schema.names}, expected {_SCHEMA.names}: it was not written "
                "by write_corpus; read it with read_documents"
            )
        self._ends = []
        for batch in self._batches:
            self._ends.append(batch.num_rows + (self._ends[-1] if self._ends else 0))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def places(self, ids: Iterable[str]) -> dict[str, int]:
        """Returns the indices of documents by id, without making the others; ids that are not there are left out."""
        wanted, found = set(ids), {}
        for batch, end in zip(self._batches, self._ends, strict=True):
            for row, name in enumerate(batch.column("id").to_pylist()):
                if name in wanted:
                    found[name] = end - batch.num_rows + row
        return found

    @overload
    def __getitem__(self, index: int) -> Document: ...
    @overload
    def __getitem__(self, index: slice) -> list[Document]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[number] - self._batches[number].num_rows)
        name, text, domain, origin, layout = (column[row].as_py() for column in self._batches[number].columns)
        return Document(name, text, domain, origin, *parse_layout(layout))


def read_corpus(directory: str | os.PathLike[str], split: str) -> CorpusReader:
    """Opens one split of a corpus that `write_corpus` wrote.

    Errors: InputError when the directory or the split is missing (the splits that are there are named) or when the
    file is damaged.
    """
    path = Path(directory) / f"{split}.arrow"
    if not path.is_file():
        found = sorted(p.stem for p in Path(directory).glob("*.arrow"))
        hint = f"it holds {found}.{nearest(split, found)}" if found else "it holds no corpus: run `fusejax prepare`"
        raise InputError(f"{directory} has no split {split!r}: {hint}")
    return CorpusReader(path)
