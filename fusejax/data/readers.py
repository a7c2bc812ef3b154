"""Reads the user's text, from whatever it is kept in, as a stream of documents.

| format | what | id of a document |
|---|---|---|
| `jsonl` | `.jsonl`, `.json`, `.ndjson`, each also `.gz`: one JSON object per line | `id_field`, else `<file>:<line>` |
| `parquet` | `.parquet`, read in row groups | `id_field`, else `<file>:<row>` |
| `text` | one text file, or a folder of them, recursively | path in the folder |
| `dataset` | a saved `datasets` directory, our corpus, or `name[:config]` on the hub | `id_field`, else the row |

A record holds a text, a text with trained spans, or a conversation (`fusejax.data.messages`). A folder may also hold
JSONL or parquet files only; they are read one after another. Nothing is skipped in silence: empty documents (and
conversations in which the assistant says nothing) are counted in `ReadCounts`, everything else that is wrong is an
InputError that names file and place.

Deliberately not done: remote code of hub datasets (`datasets` 5 has none), CSV, guessing encodings (text is UTF-8).
"""

__all__ = ["FORMATS", "ReadCounts", "read_documents"]

import dataclasses
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import xxhash

from fusejax.data.corpus import CorpusReader, Document
from fusejax.data.messages import Fields, messages_of
from fusejax.data.spans import character_spans, conversation
from fusejax.errors import InputError, nearest

FORMATS = ("jsonl", "parquet", "text", "dataset")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".ndjson.gz", ".json.gz")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclasses.dataclass
class ReadCounts:
    """What a reader gave and left out; complete when the reader is exhausted."""

    documents: int = 0
    bytes: int = 0
    empty: int = 0
    left_out: int = 0  # by `where`, `fold` and `skip`


@dataclasses.dataclass(frozen=True)
class _Row:
    """One record before it is checked: its place for messages, its id for want of a better one, its fields."""

    place: str
    default_id: str
    fields: dict[str, Any]
    text: str | None = None  # of a text file, which has no fields
    document: Document | None = None  # of our own corpus


def read_documents(
    source: str | os.PathLike[str],
    *,
    format: str | None = None,
    text_field: str = "text",
    spans_field: str | None = None,
    messages_field: str | None = None,
    prompt_fields: Sequence[str] = (),
    response_field: str | None = None,
    id_field: str | None = None,
    domain_field: str | None = "domain",
    split: str | None = None,
    where: Mapping[str, Any] | None = None,
    folds: int = 1,
    fold: Sequence[int] = (),
    skip: int = 0,
    limit: int | None = None,
    counts: ReadCounts | None = None,
) -> Iterator[Document]:
    """Streams the documents of a file, folder or dataset.

    Args:
      source: a path, or the name of a dataset on the Hugging Face hub.
      format: one of `FORMATS`; by default what the path's name or content says.
      text_field: the field of a record that holds the text.
      spans_field: the field with the ranges of characters that are trained (`fusejax.data.spans`); None: all are.
      messages_field: the field with a conversation (`fusejax.data.messages`), which takes the place of the text.
      prompt_fields, response_field: the fields of a question and its answer, likewise.
      id_field: the field that holds the id, a string or an integer; by default `id` where a record has it.
      domain_field: the field that holds the domain, where a record has it.
      split: for a dataset with several splits: which one.
      where: field -> the value, or a list of the values, that a record must have there to be read.
      folds, fold: deal those into `folds` parts, one after another, and read the parts `fold`; all where it is empty.
      skip: leave out the first documents of those; limit: stop after this many more.
      counts: is filled while reading.

    Returns:
      An iterator over documents in the order of the source, ids unique. What can be checked of the arguments and the
      source is checked before this returns.

    Errors: InputError for a source that is missing or unreadable, invalid UTF-8 (file and byte), broken JSON (file and
    line), a missing or non-string field (with the fields that are there), a repeated id.
    """
    if format is not None and format not in FORMATS:
        raise InputError(f"unknown format {format!r}: use one of {FORMATS}.{nearest(format, FORMATS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}: give a positive number of documents, or none for all")
    counts = counts or ReadCounts()
    rows = _rows(source, format or _guess_format(source), split)
    if where:
        rows = _chosen(rows, where, counts)
    if fold:
        rows = _dealt(rows, folds, fold, counts)
    fields = Fields(text_field, spans_field, messages_field, tuple(prompt_fields), response_field)
    documents = _documents(rows, fields, id_field, domain_field, skip, counts)
    return itertools.islice(documents, limit)


def _chosen(rows: Iterator[_Row], where: Mapping[str, Any], counts: ReadCounts) -> Iterator[_Row]:
    """The rows with the wanted values; every row must have the fields."""
    wanted = {field: list(value) if isinstance(value, list | tuple) else [value] for field, value in where.items()}
    for row in rows:
        for field in wanted:
            if field not in row.fields:
                found = sorted(map(str, row.fields))
                hint = nearest(field, found)
                raise InputError(f"{row.place}: `where` asks for field {field!r}; the fields are {found}.{hint}")
        if all(row.fields[field] in values for field, values in wanted.items()):
            yield row
        else:
            counts.left_out += 1


def _dealt(rows: Iterator[_Row], folds: int, fold: Sequence[int], counts: ReadCounts) -> Iterator[_Row]:
    """The rows of some of `folds` parts: neighbours, such as chapters of one book, go to different ones."""
    for number, row in enumerate(rows):
        if number % folds in fold:
            yield row
        else:
            counts.left_out += 1


def _guess_format(source: str | os.PathLike[str]) -> str:
    path = Path(source)
    name = path.name.lower()
    if path.is_dir():
        saved = any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json"))
        return "dataset" if saved or any(path.glob("*.arrow")) else "folder"
    if name.endswith(_JSON_SUFFIXES):
        return "jsonl"
    if name.endswith(".parquet"):
        return "parquet"
    return "text" if path.exists() or not _HUB_NAME.fullmatch(str(source)) else "dataset"


def _rows(source: str | os.PathLike[str], format: str, split: str | None) -> Iterator[_Row]:
    path = Path(source)
    if format == "dataset":
        return _saved_rows(path, split) if path.exists() else _hub_rows(str(source), split)
    if not path.exists():
        raise InputError(f"{source} does not exist: give a file, a folder or a dataset's name")
    if split is not None:
        raise InputError(f"split={split!r} was given, but {source} is not a dataset with splits: leave it out")
    if not path.is_dir():
        return _file_rows(path, path.name, format)
    files = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path))
    if format == "folder":
        kinds = {_guess_format(p) for p in files}
        format = kinds.pop() if len(kinds) == 1 else "text"
    elif format != "text":
        files = [p for p in files if _guess_format(p) == format]
    if not files:
        raise InputError(f"{source} holds no {'' if format == 'folder' else format + ' '}files: give a folder of text")
    return itertools.chain.from_iterable(_file_rows(p, p.relative_to(path).as_posix(), format) for p in files)


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _file_rows(path: Path, name: str, format: str) -> Iterator[_Row]:
    readers = {"jsonl": _json_rows, "parquet": _parquet_rows, "text": _text_rows}
    try:
        yield from readers[format](path, name)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): check that it is whole and that you may read it") from error


def _text_rows(path: Path, name: str) -> Iterator[_Row]:
    yield _Row(str(path), name, {}, _decode(path.read_bytes(), path, 0).removeprefix("\ufeff"))


def _decode(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {offset + error.start}. Convert it, "
            f"for example with `iconv -f latin1 -t utf8`, or leave it out"
        ) from error


def _json_rows(path: Path, name: str) -> Iterator[_Row]:
    offset = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path}:{number}"
            text = _decode(line, path, offset).removeprefix("\ufeff" if number == 1 else "")
            offset += len(line)
            if not text.strip():
                continue
            try:
                value = json.loads(text)
            except json.JSONDecodeError as error:
                hint = " A file with one JSON array is not JSON lines." if number == 1 else ""
                raise InputError(f"{place}: broken JSON, {error.msg} at column {error.colno}.{hint}") from error
            if not isinstance(value, dict):
                raise InputError(
                    f"{place}: got a JSON {type(value).__name__}, expected one object per line: "
                    f'write it as {{"text": ...}} lines'
                )
            yield _Row(place, f"{name}:{number}", value)


def _parquet_rows(path: Path, name: str) -> Iterator[_Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield _Row(f"{path} row {number}", f"{name}:{number}", fields)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from error


def _saved_rows(path: Path, split: str | None) -> Iterator[_Row]:
    """Rows of a directory that `datasets` saved, or of a corpus that `write_corpus` wrote."""
    import datasets

    if not path.is_dir():
        raise InputError(f"{path} is not a directory of a saved dataset: give the directory, or another format")
    if not any((path / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json")):
        available = sorted(p.stem for p in path.glob("*.arrow"))
        return _corpus_rows(path, _choose_split(str(path), available, split))
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"{path} is not a readable saved dataset: {error}") from error
    if isinstance(data, dict):
        data = data[_choose_split(str(path), [str(name) for name in data], split)]
    return _dataset_rows(data, str(path))


def _corpus_rows(path: Path, split: str) -> Iterator[_Row]:
    for document in CorpusReader(path / f"{split}.arrow"):
        fields = {f: getattr(document, f) for f in ("id", "text", "domain")}
        yield _Row(f"{path} {split}", document.id, fields, document=document)


def _hub_rows(name: str, split: str | None) -> Iterator[_Row]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(repository, config or None, streaming=True)
    except Exception as error:
        reason = str(error).split("\n")[0]
        raise InputError(
            f"{name!r} is neither a path here nor a dataset that can be loaded ({type(error).__name__}: {reason}). "
            "For a file: check the path. For a hub dataset: check the name, the network and HF_HUB_OFFLINE, or "
            "download it where there is a network and give the directory"
        ) from error
    return _dataset_rows(data[_choose_split(name, [str(key) for key in data], split)], name)


def _choose_split(name: str, available: list[str], split: str | None) -> str:
    if split is None and len(available) == 1:
        return available[0]
    if split not in available:
        got = "none was chosen" if split is None else f"{split!r} is not one of them"
        raise InputError(f"{name} has the splits {available}, {got}: give split=")
    return split


def _dataset_rows(data: Any, name: str) -> Iterator[_Row]:
    for number, fields in enumerate(data):
        yield _Row(f"{name} row {number}", str(number), fields)


def _documents(
    rows: Iterator[_Row],
    fields: Fields,
    id_field: str | None,
    domain_field: str | None,
    skip: int,
    counts: ReadCounts,
) -> Iterator[Document]:
    seen: dict[int, int] = {}  # hashes of ids that records name, and the records' numbers
    for number, row in enumerate(rows, 1):
        found = _content(row, fields)
        if found is None:
            counts.empty += 1
            continue
        name = _identifier(row, id_field)
        if name != row.default_id:  # those differ by themselves
            earlier = seen.setdefault(xxhash.xxh3_128_intdigest(name.encode("utf-8", "replace")), number)
            if earlier != number:
                raise InputError(
                    f"{row.place}: the id {name!r} was already used, by record {earlier}: make the ids unique"
                )
        if skip:
            skip, counts.left_out = skip - 1, counts.left_out + 1
            continue
        domain = row.fields.get(domain_field) if domain_field else None
        document = dataclasses.replace(found, id=name, domain=domain if isinstance(domain, str) else "")
        counts.documents += 1
        counts.bytes += document.n_bytes
        yield document


def _content(row: _Row, names: Fields) -> Document | None:
    """What a record says, without a name; None: nothing."""
    if names.messages is not None or names.response is not None:
        messages = messages_of(row.fields, names, row.place)
        text, turns, spans = conversation(messages)
        return Document("", text, spans=spans, turns=turns) if messages else None
    text = _text(row, names.text)
    if not text.strip():
        return None
    if names.spans is None:
        return row.document or Document("", text)
    if names.spans not in row.fields:
        found = sorted(map(str, row.fields))
        raise InputError(f"{row.place}: no field {names.spans!r} with spans; the fields are {found}")
    spans = character_spans(text, row.fields[names.spans], row.place)
    return Document("", text, spans=spans) if spans else None


def _text(row: _Row, field: str) -> str:
    if row.text is not None:
        return row.text
    found = sorted(map(str, row.fields))
    if field not in row.fields:
        raise InputError(
            f"{row.place}: no field {field!r}; the fields are {found}. Name the right one with text_field."
            f"{nearest(field, found)}"
        )
    text = row.fields[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InputError(f"{row.place}: field {field!r} holds a {type(text).__name__}, expected a string of text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{row.place}: field {field!r} holds half of a surrogate pair at character {error.start}, which is not "
            "UTF-8 text: write the whole character"
        ) from error
    return text


def _identifier(row: _Row, field: str | None) -> str:
    value = row.fields.get(field or "id")
    if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
        return str(value)
    if field is None or row.text is not None:
        return row.default_id
    raise InputError(
        f"{row.place}: field {field!r} gives no id (got {value!r}); the fields are {sorted(map(str, row.fields))}. "
        "Expected a string or an integer"
    )
