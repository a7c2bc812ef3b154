"""The layouts in which other projects keep top-k distributions: MaxText's records and DistillKit's sparse rows.

* MaxText (`save_top_k_teacher_logits`): array_record files of `tf.train.Example`, one per sequence, `inputs [T]`,
  `top_k_logits [T * K]`, `top_k_indices [T * K]` and, where asked for, `targets`, `inputs_position`,
  `inputs_segmentation` and `targets_segmentation` [T]. Values are logits without their normaliser: they give
  log-probabilities of the entries alone, and what lies outside is not known. What we export are log-probabilities,
  which are logits too (their normaliser is 0); read with `normalized=True` they come back whole.
* DistillKit (offline teacher datasets): parquet, one row per sequence, `input_ids`, and for every position that
  predicts either `token_ids` and `top_values` (log-probabilities), or `compressed_logprobs` and `bytepacked_indices`:
  bytes as its `logprob_compressor` settings say. Log-probabilities are of the whole vocabulary, so the mass outside
  is known.

Neither keeps the log-probability of a label that is not among the entries. Then it is estimated by an equal share of
the mass outside (`labels_estimated` in the record's header counts them), or refused.

Deliberately not done: DistillKit's legacy compression, packed rows of several documents.
"""

__all__ = [
    "Compression",
    "Sparse",
    "export_distillkit",
    "export_maxtext",
    "read_distillkit",
    "read_maxtext",
    "sparse_of_record",
]

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fusejax.data.interchange_example import decode_example, encode_example
from fusejax.errors import InputError
from fusejax.io.array_records import read_array_record, write_array_record
from fusejax.io.store import Record

_DTYPES = {"float16": np.dtype("<f2"), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype("<f4")}
_DTYPES["float64"] = np.dtype("<f8")
_EXAMPLE = ("inputs", "top_k_logits", "top_k_indices")


class Sparse(NamedTuple):
    """Top-k distributions along one token sequence, as others keep them; N positions predict."""

    tokens: np.ndarray  # [N + 1] int32, the whole sequence
    ids: np.ndarray  # [N, K] int32, -1: unused
    logprobs: np.ndarray  # [N, K] float32
    where: str  # for messages


class Compression(NamedTuple):
    """DistillKit's `logprob_compressor` settings, by its names."""

    d: int  # vocabulary size
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: Sequence[int | str] = ()
    term_dtype: str = "float32"
    residual_bins: Sequence[Mapping[str, Any]] = ()
    delta_encoding: bool = True
    error_diffusion: bool = False  # of the writer alone
    normalize_t: bool = False


def sparse_of_record(record: Record) -> Sparse:
    """Returns a captured record (A1) as a whole sequence and its distributions."""
    arrays = record.arrays
    tokens = np.append(arrays["tokens"], arrays["labels"][-1:]).astype(np.int32)
    return Sparse(tokens, arrays["topk_ids"], arrays["topk_logprobs"], f"document {record.doc_id!r}")


def export_maxtext(records: Iterable[Record], path: Path) -> int:
    """Writes captured records as one MaxText file and returns how many; `targets` and segmentations are in it."""

    def examples() -> Iterator[bytes]:
        for record in records:
            sparse, count = sparse_of_record(record), len(record.arrays["tokens"])
            used = sparse.ids >= 0
            yield encode_example(
                {
                    "inputs": sparse.tokens[:-1],
                    "targets": sparse.tokens[1:],
                    "inputs_position": np.arange(count),
                    "inputs_segmentation": np.ones(count, np.int64),
                    "targets_segmentation": np.asarray(record.arrays.get("spans", np.zeros(count)) >= 0, np.int64),
                    "top_k_indices": np.where(used, sparse.ids, 0),
                    "top_k_logits": np.where(used, sparse.logprobs, np.float32(-1e30)).astype(np.float32),
                }
            )

    return write_array_record(examples(), Path(path))


def read_maxtext(path: Path, *, normalized: bool) -> Iterator[Sparse]:
    """Yields the sequences of a MaxText file, or of all `*.array_record` files of a directory in the order of names.

    Args:
      path: the file or directory.
      normalized: the values are log-probabilities of the whole vocabulary, as `export_maxtext` writes them; False: they
        are logits, and are normalised over the entries.

    Raises:
      InputError: a record without the features of the layout, of other lengths, or of several packed sequences.
    """
    files = sorted(Path(path).glob("*.array_record")) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise InputError(f"{path} holds no *.array_record file")
    for file in files:
        for number, data in enumerate(read_array_record(file)):
            where = f"{file}, record {number}"
            yield _of_example(decode_example(data, where=where), where, normalized=normalized)


def _of_example(found: Mapping[str, np.ndarray], where: str, *, normalized: bool) -> Sparse:
    if missing := [name for name in _EXAMPLE if name not in found]:
        raise InputError(f"{where} has no {', '.join(missing)}; it has {', '.join(sorted(found))}, expected MaxText's")
    inputs, flat = found["inputs"], found["top_k_indices"]
    if not inputs.size or flat.size % inputs.size or flat.size != found["top_k_logits"].size or flat.dtype.kind != "i":
        sizes = ", ".join(f"{name} {found[name].size}" for name in _EXAMPLE)
        raise InputError(f"{where}: {sizes}; expected T inputs and T * K indices and logits")
    segments = found.get("inputs_segmentation", np.ones(inputs.size, np.int64))
    if len(segments) != inputs.size or segments.max(initial=0) > 1:
        raise InputError(f"{where} packs several sequences; save with packing off, one sequence per record")
    count = int((segments > 0).sum())
    shape = (inputs.size, -1)
    ids, logits = flat.reshape(shape)[:count].astype(np.int32), found["top_k_logits"].reshape(shape)[:count]
    last = found["targets"][count - 1 : count] if "targets" in found else inputs[:0]
    tokens = np.append(inputs[:count], last).astype(np.int32)
    logits = logits.astype(np.float64)
    ids, logits = ids[: len(tokens) - 1], logits[: len(tokens) - 1]
    unused = logits < -1e29
    if not normalized:
        logits = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    return Sparse(
        tokens, np.where(unused, -1, ids).astype(np.int32), np.where(unused, -np.inf, logits).astype(np.float32), where
    )


def export_distillkit(records: Iterable[Record], path: Path, *, vocab_size: int | None = None) -> dict[str, Any] | None:
    """Writes captured records as a DistillKit dataset (one parquet file).

    Args:
      records: all with the same K.
      path: the file.
      vocab_size: also pack to bytes, every value exact (`exact_k` = k): 4 bytes and ceil(log2(vocab)) bits an entry.
        None: `token_ids` and `top_values`.

    Returns:
      The `logprob_compressor` settings that read it back; None without packing.
    """
    rows = [sparse_of_record(record) for record in records]
    if not rows:
        raise InputError("there are no records to export")
    k = rows[0].ids.shape[1]
    if any((row.ids < 0).any() for row in rows):
        raise InputError(f"a position has fewer than {k} entries, which this layout cannot say; capture with less")
    columns: dict[str, Any] = {"input_ids": pa.array([row.tokens.tolist() for row in rows], pa.list_(pa.uint64()))}
    if vocab_size is None:
        columns["token_ids"] = pa.array([row.ids.tolist() for row in rows], pa.list_(pa.list_(pa.int64())))
        columns["top_values"] = pa.array([row.logprobs.tolist() for row in rows], pa.list_(pa.list_(pa.float32())))
        settings = None
    else:
        settings = Compression(d=vocab_size, k=k, exact_k=k, delta_encoding=False)._asdict()
        settings |= {"polynomial_terms": [], "residual_bins": []}
        bits = _index_bits(vocab_size)
        nested = pa.list_(pa.list_(pa.uint8()))
        exact = [np.ascontiguousarray(row.logprobs, "<f4").view(np.uint8).tolist() for row in rows]
        columns["compressed_logprobs"] = pa.array(exact, nested)
        columns["bytepacked_indices"] = pa.array([_packed(row.ids, bits).tolist() for row in rows], nested)
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    pq.write_table(pa.table(columns), temporary, compression="zstd")
    temporary.replace(path)
    return settings


def read_distillkit(path: Path, *, compression: Compression | None = None) -> Iterator[Sparse]:
    """Yields the sequences of a DistillKit dataset, a parquet file or a directory of them in the order of names.

    Args:
      path: the file or directory.
      compression: the settings that it was written with; None: rows are not compressed.

    Raises:
      InputError: columns, lengths or probabilities that are not of this layout.
    """
    files = sorted(Path(path).rglob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not files:
        raise InputError(f"{path} holds no parquet file")
    names = ("token_ids", "top_values") if compression is None else ("bytepacked_indices", "compressed_logprobs")
    for file in files:
        try:
            table = pq.ParquetFile(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise InputError(f"{file} is not a readable parquet file: {error}") from error
        present = table.schema_arrow.names
        if missing := [name for name in ("input_ids", *names) if name not in present]:
            hint = " Give the compression that it was written with." if "compressed_logprobs" in present else ""
            raise InputError(f"{file} has no column {', '.join(missing)}; it has {', '.join(present)}.{hint}")
        number = 0
        for batch in table.iter_batches(batch_size=16, columns=["input_ids", *names]):
            for row in batch.to_pylist():
                yield _of_row(row, names, compression, f"{file}, row {number}")
                number += 1


def _of_row(row: Mapping[str, Any], names: tuple[str, str], compression: Compression | None, where: str) -> Sparse:
    tokens = np.asarray(row["input_ids"], np.int64).astype(np.int32)
    try:
        packed, values = (np.array(row[name]) for name in names)
    except ValueError as error:
        raise InputError(f"{where}: positions with different numbers of entries") from error
    if compression is not None:
        logprobs = _decompressed(np.asarray(values, np.uint8), compression, where)
        ids = _unpacked(np.asarray(packed, np.uint8), _index_bits(compression.d), compression.k, where)
    else:
        ids, logprobs = packed, values
    if ids.shape != logprobs.shape or ids.ndim != 2 or not len(tokens) - 1 <= len(ids) <= len(tokens):
        raise InputError(
            f"{where}: {len(tokens)} tokens, entries {ids.shape} and {logprobs.shape}; expected a row each"
        )
    count = len(tokens) - 1
    return Sparse(tokens, ids[:count].astype(np.int32), logprobs[:count].astype(np.float32), where)


def _index_bits(vocab_size: int) -> int:
    return max(int(np.ceil(np.log2(np.float32(vocab_size)))), 1)


def _packed(ids: np.ndarray, bits: int) -> np.ndarray:
    """Numbers [N, K] as bits, most significant first, filled up to bytes at the end of each row."""
    spread = (ids.astype(np.int64)[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(spread.reshape(len(ids), -1).astype(np.uint8), axis=1)


def _unpacked(data: np.ndarray, bits: int, count: int, where: str) -> np.ndarray:
    if data.ndim != 2 or data.shape[1] * 8 < count * bits:
        raise InputError(f"{where}: {data.shape} bytes of indices; {count} of {bits} bits need {-(-count * bits // 8)}")
    spread = np.unpackbits(data, axis=1)[:, : count * bits].reshape(len(data), count, bits)
    return (spread.astype(np.int64) << np.arange(bits - 1, -1, -1)).sum(axis=2)


def _decompressed(data: np.ndarray, settings: Compression, where: str) -> np.ndarray:
    """Log-probabilities [N, k] of the bytes of every position: exact values, coefficients, then bins of residuals."""
    at = 0

    def take(size: int) -> np.ndarray:
        nonlocal at
        if data.ndim != 2 or at + size > data.shape[1]:
            raise InputError(f"{where}: {data.shape} bytes of log-probabilities are fewer than the compression says")
        at += size
        return np.ascontiguousarray(data[:, at - size : at])

    def numbers(count: int, dtype: str) -> np.ndarray:
        kind = _DTYPES[dtype]
        return take(count * kind.itemsize).view(kind).astype(np.float64) if count else np.zeros((len(data), 0))

    exact = numbers(settings.exact_k, settings.exact_dtype)
    coefficients = numbers(len(settings.polynomial_terms), settings.term_dtype)
    rest = settings.k - settings.exact_k
    points = np.linspace(0, 1, rest) if settings.normalize_t else np.arange(rest, dtype=np.float64)
    special = {"sqrt": np.sqrt, "exp": np.exp}
    terms = [special[t](points) if isinstance(t, str) else points**t for t in settings.polynomial_terms]
    fitted = coefficients @ np.stack(terms) if terms else np.zeros((len(data), rest))
    start = 0
    for entry in settings.residual_bins:
        bits, size = int(entry["element_bits"]), int(entry["num_elements"])
        scale = numbers(1, entry["scale_dtype"])
        codes = _unpacked(take(-(-size * bits // 8)), bits, size, where)
        fitted[:, start : start + size] += (codes * 2.0 - 1 if bits == 1 else codes - 2.0 ** (bits - 1)) * scale
        start += size
    if at != data.shape[1]:
        raise InputError(f"{where}: {data.shape[1]} bytes of log-probabilities, the compression says {at}")
    values = np.concatenate([exact, fitted], axis=1)
    return np.cumsum(values, axis=1) if settings.delta_encoding else values
