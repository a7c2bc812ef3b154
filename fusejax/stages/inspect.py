"""inspect: what an artefact or a model directory holds, without loading weights; its records as parquet."""

__all__ = ["command"]

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.data.interchange import export_parquet
from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.io.models import open_config
from fusejax.io.store import RecordReader, shard_index
from fusejax.stages.command import Result, parser

_STORED = ("captured", "aligned", "fused", "scores")


def command(name: str, words: list[str]) -> Result:
    """`fusejax inspect DIR [--record N] [--to-parquet FILE]`."""
    arguments = parser(name, "Show the manifest of an artefact, one of its records, or a model's configuration.")
    arguments.add_argument("directory", type=Path, help="artefact or model directory")
    arguments.add_argument("--record", type=int, help="also show this record of a distribution store, from 0")
    arguments.add_argument(
        "--mass", action="store_true", help="also say how much probability lies outside what is stored"
    )
    arguments.add_argument("--to-parquet", type=Path, metavar="FILE", help="also write all its records as parquet")
    given = arguments.parse_args(words)
    if not given.directory.is_dir():
        raise InputError(f"no directory at {given.directory}")
    if not (given.directory / MANIFEST).is_file():
        data: dict[str, Any] = {"kind": "model", "config": dataclasses.asdict(open_config(given.directory))}
    else:
        data = read_manifest(given.directory)._asdict()
        data["total_bytes"] = sum(entry["bytes"] for entry in data["files"].values())
    if (given.record is not None or given.mass or given.to_parquet) and data["kind"] not in _STORED:
        raise InputError(f"{given.directory} is a {data['kind']!r} artefact; records are in {', '.join(_STORED)}")
    if given.to_parquet:
        rows = export_parquet(RecordReader(given.directory), given.to_parquet)
        data["parquet"] = {"file": str(given.to_parquet), "rows": rows}
    if given.mass:
        data["mass_outside"] = _mass_outside(RecordReader(given.directory))
    if given.record is not None:
        reader = RecordReader(given.directory)
        if not 0 <= given.record < len(reader):
            raise InputError(f"record {given.record} of {len(reader)} in {given.directory}")
        data["record"] = _describe(reader[given.record])
    return Result(data, "\n".join(_lines(_without_shards(data))))


def _without_shards(data: dict[str, Any]) -> dict[str, Any]:
    """The same with one entry for all shards, of which there may be thousands."""
    files = data.get("files", {})
    shards = [entry for name, entry in files.items() if shard_index(name) is not None]
    if len(shards) < 2:
        return data
    joined = {key: sum(entry.get(key, 0) for entry in shards) for key in ("records", "bytes")}
    others = {name: entry for name, entry in files.items() if shard_index(name) is None}
    return data | {"files": others | {f"{len(shards)} shards": joined}}


def _lines(data: dict[str, Any], indent: str = "") -> Iterator[str]:
    """`key: value` lines; what has no further levels stands on one."""
    for key, value in data.items():
        if isinstance(value, dict) and (not indent or any(isinstance(inner, dict) for inner in value.values())):
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{indent}{key}: {shown}"


def _mass_outside(reader: RecordReader) -> dict[str, Any]:
    """The probability outside the stored entries over the positions that have a distribution: mean and quantiles."""
    found: list[np.ndarray] = []
    for record in reader:
        arrays = record.arrays
        if "residual_logprob" not in arrays:
            raise InputError(f"{reader.directory} stores no mass outside its entries")
        outside = np.exp(arrays["residual_logprob"].astype(np.float64))
        if "partition" in arrays:  # fused
            outside = outside[arrays["partition"] >= 0]
        elif "status" in arrays:  # aligned
            outside = outside[arrays["status"] != 0]
        found.append(outside.ravel())
    outside = np.concatenate(found) if found else np.zeros(0)
    if not len(outside):
        return {"positions": 0}
    low, middle, high = np.quantile(outside, (0.1, 0.5, 0.9)).tolist()
    return {"positions": len(outside), "mean": outside.mean().item(), "10%": low, "50%": middle, "90%": high}


def _describe(record: Any) -> dict[str, Any]:
    """Ids, header, and dtype, shape and first values of each array."""
    arrays = {
        name: {"dtype": str(array.dtype), "shape": list(array.shape), "first": np.ravel(array)[:8].tolist()}
        for name, array in record.arrays.items()
    }
    return {"doc_id": record.doc_id, "header": record.header, "arrays": arrays}
