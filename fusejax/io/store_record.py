"""One record as bytes: a JSON header, named arrays, and a checksum of both; nothing in it is executable.

Two forms, told apart by their first four bytes:

* plain (`FJR1`): the arrays as they are. `codec="float16"` and `"float32"` set the dtype of log-probabilities.
* compact (`FJR3`): as in `fusejax.io.store_compact`, the header deflated with a dictionary of the words that every
  header has. It reads back with the same names, shapes and integers, and with float32 log-probabilities. `FJR2`, with
  coarser levels, is read and no longer written.

Deliberately not done: any state shared by records (a dictionary per shard would cost random access).
"""

import json
import re
import struct
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import xxhash

from fusejax.errors import InputError
from fusejax.io.store_compact import ENTRIES, HALF, deflate, inflate, pack_arrays, unpack_arrays

__all__ = ["CODECS", "RECORD_FORMAT", "Codec", "Record", "pack_record", "record_length", "unpack_record"]

Codec = Literal["compact", "float16", "float32"]
CODECS: tuple[str, ...] = get_args(Codec)
RECORD_FORMAT = 3  # of what is written
_PLAIN, _COMPACT = b"FJR1", b"FJR3"
_DTYPES = {"int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "float16", "float32", "float64"}
_EARLIER_WORDS = (
    b'{"doc_id":"","header":{"n_bytes":,"source_nll_nats":,"aligned":,"dropped":,"conditioned":"nll_nats":},"arrays":{'
    b'"weights":["float32",[,1]],"partition":["int32",[,1]],"mask":["int8",[]],"status":["int8",[]],'
    b'"source_byte_ends":["int32",[],"uint8"],"source_realised":["float32",[]],'
    b'"ids":["int32",[,10],3,],"logprobs":["float32",[,10]],"topk_ids":["int32",[,10],3,],"topk_logprobs":["float32",'
    b'[,10]],"residual_logprob":["float32",[]],"realised_logprob":["float32",[]],"labels":["int32",[]],'
    b'"tokens":["int32",[]],"byte_ends":["int32",[],"uint8"]}}'
)
_WORDS = b'"chain_logprob":["float32",[]],,"exact":true},"arrays":' + _EARLIER_WORDS  # the likeliest words come last


_VERSIONS = {b"FJR2": (1, _EARLIER_WORDS), _COMPACT: (2, _WORDS)}  # of entries, and the header's dictionary


class Record(NamedTuple):
    """The arrays of one document."""

    doc_id: str
    header: dict[str, Any]  # JSON scalars: n_bytes, nll_nats, ...
    arrays: dict[str, np.ndarray]


def pack_record(record: Record, *, codec: str | None = None) -> bytes:
    """Returns the bytes of a record.

    Args:
      record: what is stored.
      codec: "compact", "float16", "float32", or None: log-probabilities as they are.

    Raises:
      ValueError: arrays of a dtype that the store does not keep, or an unknown codec.
    """
    if codec is not None and codec not in CODECS:
        raise ValueError(f"codec {codec!r}; expected one of {CODECS}")
    unknown = sorted({str(array.dtype) for array in record.arrays.values()} - _DTYPES)
    if unknown:
        raise ValueError(f"record {record.doc_id!r} has arrays of dtype {unknown}; the store keeps {sorted(_DTYPES)}")
    if codec == "compact":
        try:
            layout, body = pack_arrays(record.arrays)
        except InputError as error:
            raise InputError(f"record {record.doc_id!r}: {error}") from error
        head = deflate(_json(record, layout), words=_WORDS)
        data = _COMPACT + struct.pack("<I", len(head)) + head + body
    else:
        arrays = {name: _cast(name, array, codec) for name, array in record.arrays.items()}
        layout = {name: [str(array.dtype), list(array.shape)] for name, array in arrays.items()}
        head = _json(record, layout)
        body = b"".join(np.ascontiguousarray(array).tobytes() for array in arrays.values())
        data = _PLAIN + struct.pack("<I", len(head)) + head + body
    return data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data))


def unpack_record(data: bytes, *, where: str = "record") -> Record:
    """Reads the bytes of `pack_record`, whatever the codec; `where` names the record in the error.

    Raises:
      InputError: the checksum, the magic or the layout does not fit.
    """
    magic = bytes(data[:4])
    if len(data) < 16 or (magic != _PLAIN and magic not in _VERSIONS):
        if re.fullmatch(rb"FJR\d", magic):
            raise InputError(
                f"{where} has format {magic.decode()}, this fusejax reads FJR1 to FJR{RECORD_FORMAT}; use the fusejax "
                "that made it, or make the artefact again"
            )
        raise InputError(f"{where} is not a fusejax record; run `fusejax verify` and make the artefact again")
    if xxhash.xxh3_64_intdigest(data[:-8]) != struct.unpack("<Q", data[-8:])[0]:
        raise InputError(f"{where} is damaged: its checksum does not fit; delete the shard and run the stage again")
    meta, start = _meta(data)
    if magic != _PLAIN:
        arrays = unpack_arrays(meta["arrays"], memoryview(data)[start:-8], version=_VERSIONS[magic][0])
        return Record(meta["doc_id"], meta["header"], arrays)
    arrays = {}
    for name, (dtype, shape) in meta["arrays"].items():
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(data, dtype, count, start).reshape(shape)
        start += count * np.dtype(dtype).itemsize
    return Record(meta["doc_id"], meta["header"], arrays)


def record_length(data: bytes) -> int:
    """Returns the positions of a packed record, from its header: rows of `tokens`, else of its first array."""
    layout = _meta(data)[0]["arrays"]
    shape = layout.get("tokens", next(iter(layout.values()), ["", [0]]))[1]
    return int(shape[0]) if shape else 0


def _cast(name: str, array: np.ndarray, codec: str | None) -> np.ndarray:
    is_logprob = name in HALF or any(name == logprobs for _, logprobs in ENTRIES)
    return array.astype(codec) if codec and is_logprob else array


def _json(record: Record, layout: dict[str, Any]) -> bytes:
    meta = {"doc_id": record.doc_id, "header": record.header, "arrays": layout}
    return json.dumps(meta, separators=(",", ":"), ensure_ascii=False).encode()


def _meta(data: bytes) -> tuple[dict[str, Any], int]:
    """The header of a record and where its body starts."""
    (length,) = struct.unpack("<I", data[4:8])
    head = data[8 : 8 + length]
    if found := _VERSIONS.get(bytes(data[:4])):
        head = inflate(head, words=found[1])
    return json.loads(head), 8 + length
