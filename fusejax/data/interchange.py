"""Distributions in the layout that others keep them in: parquet with list columns, one row per document.

    doc_id string | header string (JSON) | tokens, labels, byte_ends list<int32> | topk_ids list<list<int32>> |
    topk_logprobs list<list<float>> | residual_logprob, realised_logprob list<float>

Any parquet with tokens, ids and log-probabilities can be read; other column names are given. What is missing is
derived where that is exact: labels are the tokens shifted by one, the residual is what the entries leave, byte ends
come from the text and its tokenizer, whose ids must be the tokens. What cannot be derived is refused.

Deliberately not done: layouts that are not documented (a guess would be silently wrong), and logits without their
normaliser, from which no residual can be had.
"""

__all__ = ["COLUMNS", "export_parquet", "read_parquet"]

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusejax.errors import InputError
from fusejax.io.store import Record
from fusejax.io.tokenizers import Tokenizer

COLUMNS = (
    "doc_id", "text", "tokens", "labels", "byte_ends", "topk_ids", "topk_logprobs", "residual_logprob",
    "realised_logprob",
)  # fmt: skip
_NEEDED = ("tokens", "topk_ids", "topk_logprobs")
_OVERFULL = 1e-3  # entries may sum to this much more than 1, by rounding


def export_parquet(records: Iterable[Record], path: Path, *, rows_per_group: int = 64) -> int:
    """Writes records (of any stored kind) as one parquet file and returns how many.

    Args:
      records: all with the same arrays; a `RecordReader` is one.
      path: the file, replaced where it exists.
      rows_per_group: documents per row group.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    writer: pq.ParquetWriter | None = None
    count, pending = 0, []
    try:
        for record in records:
            pending.append(record)
            count += 1
            if len(pending) == rows_per_group:
                writer, pending = _write(writer, temporary, pending), []
        if pending:
            writer = _write(writer, temporary, pending)
        if writer is None:
            raise InputError("there are no records to export")
        writer.close()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _write(writer: pq.ParquetWriter | None, path: Path, records: list[Record]) -> pq.ParquetWriter:
    columns: dict[str, Any] = {
        "doc_id": pa.array([record.doc_id for record in records]),
        "header": pa.array([json.dumps(record.header, ensure_ascii=False) for record in records]),
    }
    for name in records[0].arrays:
        columns[name] = _nested([record.arrays[name] for record in records])
    table = pa.table(columns)
    writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
    writer.write_table(table)
    return writer


def _nested(arrays: list[np.ndarray]) -> Any:
    """A list column of arrays of one dtype; each axis of an array is one level of lists."""
    values = pa.array(np.concatenate([array.reshape(-1) for array in arrays]))
    for axis in range(arrays[0].ndim - 1, 0, -1):
        width = arrays[0].shape[axis]
        count = sum(int(np.prod(array.shape[:axis], dtype=np.int64)) for array in arrays)
        values = pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * width), values)
    ends = np.cumsum([0, *(len(array) for array in arrays)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), values)


def read_parquet(
    path: Path, *, columns: Mapping[str, str] | None = None, tokenizer: Tokenizer | None = None
) -> Iterator[Record]:
    """Yields captured records (artefact A1) of a parquet file of top-k distributions.

    Args:
      path: one row per document; row t of the ids tells what follows token t.
      columns: our name of `COLUMNS` -> the file's, where they differ.
      tokenizer: gives the byte ends from the column `text` where the file has none.

    Raises:
      InputError: a column is missing and cannot be derived, rows disagree in length, or probabilities exceed 1.
    """
    if unknown := sorted(set(columns or {}) - set(COLUMNS)):
        raise InputError(f"no columns {unknown} in a captured record; known: {', '.join(COLUMNS)}")
    file = pq.ParquetFile(path)
    names = {name: (columns or {}).get(name, name) for name in COLUMNS}
    present = {ours: theirs for ours, theirs in names.items() if theirs in file.schema_arrow.names}
    missing = [names[name] for name in _NEEDED if name not in present]
    if "byte_ends" not in present and ("text" not in present or tokenizer is None):
        missing.append(f"{names['byte_ends']} (or {names['text']}, with a tokenizer)")
    if missing:
        raise InputError(f"{path} has no column {', '.join(missing)}; it has {', '.join(file.schema_arrow.names)}")
    number = 0
    for batch in file.iter_batches(batch_size=64, columns=list(present.values())):
        for row in batch.to_pylist():
            given = {ours: row[theirs] for ours, theirs in present.items() if row[theirs] is not None}
            yield _record(given, tokenizer, f"{path}, row {number}", str(number))
            number += 1


def _record(row: dict[str, Any], tokenizer: Tokenizer | None, where: str, doc_id: str) -> Record:
    """The record of one row, with what is missing derived."""
    whole = np.asarray(row["tokens"], np.int32)
    ids = _rectangle(row["topk_ids"], -1, where).astype(np.int32)
    logprobs = _rectangle(row["topk_logprobs"], -np.inf, where).astype(np.float32)
    tokens, labels = (whole, np.asarray(row["labels"], np.int32)) if "labels" in row else (whole[:-1], whole[1:])
    count = len(tokens)
    if ids.shape != logprobs.shape or not count <= len(ids) <= count + 1 or len(labels) != count:
        raise InputError(
            f"{where}: {count} positions, {len(labels)} labels, ids {ids.shape}, log-probabilities {logprobs.shape}; "
            "expected a row of ids and of log-probabilities for every token that is followed by another"
        )
    ids, logprobs = ids[:count], np.where(ids[:count] >= 0, logprobs[:count], -np.inf).astype(np.float32)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    mass = np.exp(logprobs.astype(np.float64)).sum(axis=1)
    if np.any(~np.isfinite(mass)) or mass.max(initial=0) > 1 + _OVERFULL:
        raise InputError(f"{where}: probabilities sum to {mass.max()}; expected log-probabilities in nats, not logits")
    with np.errstate(divide="ignore"):
        residual = np.log(np.maximum(1 - mass, 0))
    found = {
        "tokens": tokens,
        "labels": labels,
        "byte_ends": _byte_ends(row, tokenizer, tokens, where),
        "topk_ids": ids,
        "topk_logprobs": logprobs,
        "residual_logprob": np.asarray(row.get("residual_logprob", residual), np.float32)[:count],
        "realised_logprob": _realised(row, ids, logprobs, labels, where),
    }
    uneven = [name for name, array in found.items() if len(array) != count]
    if uneven:
        raise InputError(f"{where}: {', '.join(uneven)} should have {count} values, one per position")
    n_bytes = len(row["text"].encode()) if "text" in row else int(found["byte_ends"].max(initial=0))
    header = {"n_bytes": n_bytes, "nll_nats": float(-found["realised_logprob"].astype(np.float64).sum())}
    return Record(str(row.get("doc_id", doc_id)), header, found)


def _rectangle(rows: list[list[Any]], fill: float, where: str) -> np.ndarray:
    """[N, K] of lists of numbers; shorter ones are filled up."""
    if any(row is None for row in rows):
        raise InputError(f"{where}: a position has no entries at all (null); give an empty list")
    width = max(map(len, rows), default=1)
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows], np.float64).reshape(len(rows), width)


def _byte_ends(row: dict[str, Any], tokenizer: Tokenizer | None, tokens: np.ndarray, where: str) -> np.ndarray:
    if "byte_ends" in row:
        return np.asarray(row["byte_ends"], np.int32)[: len(tokens)]
    if tokenizer is None:
        raise InputError(f"{where}: no byte ends, and no tokenizer to find them with")
    for end in (True, False):
        encoded = tokenizer.encode(row["text"], end=end)
        if np.array_equal(encoded.tokens, tokens):
            return np.asarray(encoded.byte_ends, np.int32)
    raise InputError(
        f"{where}: the tokenizer in {tokenizer.directory} gives other tokens for the text than the file holds; "
        "use the tokenizer that the distributions were made with"
    )


def _realised(row: dict[str, Any], ids: np.ndarray, logprobs: np.ndarray, labels: np.ndarray, where: str) -> np.ndarray:
    """[N] log-probability of each label, from the file or from the entries, where every label is one of them."""
    if "realised_logprob" in row:
        return np.asarray(row["realised_logprob"], np.float32)[: len(labels)]
    found = ids == labels[:, None]
    if absent := int((~found.any(axis=1)).sum()):
        raise InputError(
            f"{where}: {absent} of {len(labels)} labels are not among the entries, so their log-probability is not "
            "known; give the column realised_logprob"
        )
    return logprobs[np.arange(len(labels)), found.argmax(axis=1)]
