"""fuse: from the aligned distributions of several sources to one supervised target per position (artefact A4).

MinCE keeps, in each window of text, the source with the lowest score; AvgCE keeps all with their weights, and
the loss mixes their divergences (sources with different partitions have no common distribution to average).
A position that the chosen source's tokenizer does not reach keeps no distribution: there the loss is CLM alone.

Where the alignment stored chains, every source has one more slot: {the true next token, anything else} over the
partition into single tokens (one more row of the tables), with its source's weight. It is added to the divergence
over symbols, so at such positions the weights sum to more than 1.
"""

__all__ = ["CHAINS", "PARTITIONS", "fuse", "fuse_document"]

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.alignment.parity.fusion import min_ce_choice, rewards, window_metric
from fusejax.config import FusionConfig
from fusejax.distributions.weighing import (
    choose_min,
    softmin_weights,
    window_bits_per_byte,
    window_of_bytes,
)
from fusejax.errors import InputError
from fusejax.io.manifest import Manifest
from fusejax.io.progress import progress
from fusejax.io.store import Record, RecordReader
from fusejax.parallel.processes import is_first
from fusejax.stages.context import Run, finished
from fusejax.stages.lineage import check_aligned
from fusejax.stages.together import close_together, own_shards, shared_writer

PARTITIONS = "partitions.npz"
CHAINS = "+chain"  # the name of the chains' row of these; no source can have it
_TARGET_FIELDS = ("ids", "logprobs", "residual_logprob")


def fuse(run: Run) -> dict[str, Manifest]:
    """Makes the fused targets of every fusion that is wanted; finished ones are skipped."""
    return {fusion.name: _fuse_one(run, fusion) for fusion in run.fusions}


def _fuse_one(run: Run, fusion: FusionConfig) -> Manifest:
    names = run.fusion_sources(fusion)
    for name in names:
        check_aligned(run, name)
    readers = [RecordReader(run.aligned_dir(name), kind="aligned") for name in names]
    settings = fusion.model_dump(mode="json") | {"sources": names}
    parents = {name: reader.manifest.fingerprint for name, reader in zip(names, readers, strict=True)}
    directory = run.fused_dir(fusion.name)
    shard_size = readers[0].manifest.settings["shard_size"]
    settings["codec"] = run.config.capture.codec
    stored = settings | {"shard_size": shard_size}
    if done := finished(directory, kind="fused", settings=stored, parents=parents):
        return done
    count = len(readers[0])
    if any(len(reader) != count for reader in readers):
        raise InputError(f"aligned sources hold {[len(r) for r in readers]} documents; run `fusejax align` again")
    identity = {"settings": settings, "parents": parents, "shard_size": shard_size, "codec": settings["codec"]}
    writer = shared_writer(run, directory, kind="fused", **identity)
    tables = [load_partition(run.aligned_dir(name)) for name in names]
    if all(reader.manifest.settings.get("chain") for reader in readers):
        tables.append(np.arange(tables[0].size, dtype=tables[0].dtype))  # the chains' partition: every token alone
    if is_first():
        np.savez(directory / PARTITIONS, symbol_of_target=np.stack(tables))
    bugs = bool(readers[0].manifest.settings.get("reference_bugs"))
    totals = np.zeros(2 + len(names), np.int64)  # positions, supervised ones, those of each source
    shards = -(-count // shard_size)
    with progress(f"fuse {fusion.name}", total=len(own_shards(range(shards))) * shard_size, unit="documents") as bar:
        for number in own_shards(range(shards)):
            made = writer.has(number)
            writer.seek(number)
            for index in range(number * shard_size, min((number + 1) * shard_size, count)):
                records = [reader[index] for reader in readers]
                arrays = fuse_document(records, fusion, reference_bugs=bugs)
                totals += _counts(arrays, len(names))
                if not made:  # the counts are made again, the record is not
                    writer.write(Record(records[0].doc_id, {"n_bytes": records[0].header["n_bytes"]}, arrays))
                bar.update(1)
            writer.flush()

    def facts(said: list[list[int]]) -> dict[str, Any]:
        positions, supervised, *wins = map(sum, zip(*said, strict=True))
        return {
            "documents": count,
            "positions": positions,
            "supervised": supervised,
            "wins": dict(zip(names, wins, strict=True)),
        }

    return close_together(writer, shards, counts=totals.tolist(), facts=facts)


def _counts(arrays: dict[str, np.ndarray], sources: int) -> np.ndarray:
    """[2 + S]: positions, supervised positions, those that each source supervises."""
    partition = arrays["partition"]
    won = np.bincount(partition[(partition >= 0) & (partition < sources)], minlength=sources)
    return np.concatenate([[len(arrays["tokens"]), int((arrays["weights"].sum(axis=1) > 0).sum())], won])


def load_partition(directory: Path) -> np.ndarray:
    """Reads symbol_of_target [V] of an aligned artefact."""
    with np.load(directory / "vocabulary.npz", allow_pickle=False) as arrays:
        return arrays["symbol_of_target"]


def fuse_document(
    records: Sequence[Record], fusion: FusionConfig, *, reference_bugs: bool = False
) -> dict[str, np.ndarray]:
    """Returns the fused arrays of one document; see `docs/artefacts.md` (A4) for their shapes.

    `reference_bugs` rounds scores as the papers' programs do, so that near sources tie and NaN wins.
    """
    first = records[0].arrays
    for record in records[1:]:
        if record.doc_id != records[0].doc_id or len(record.arrays["tokens"]) != len(first["tokens"]):
            raise InputError(f"sources disagree on document {records[0].doc_id!r}; run `fusejax align` again")
    n_bytes = int(records[0].header["n_bytes"])
    scores = _scores(records, fusion, n_bytes)
    window = window_of_bytes(first["byte_ends"], n_bytes, window_bytes=fusion.window_bytes)
    window = np.minimum(window, scores.shape[1] - 1)
    reached = np.stack([record.arrays["status"] > 0 for record in records])  # [S, N]
    positions = np.arange(len(window))
    stacked = {field: _stacked([record.arrays[field] for record in records]) for field in _TARGET_FIELDS}
    choice = (min_ce_choice(scores, reference_bugs=True) if reference_bugs else choose_min(scores))[window]  # [N]
    if fusion.method == "min_ce":
        fields = {field: array[choice, positions][:, None] for field, array in stacked.items()}
        partition = np.where(reached[choice, positions], choice, -1)[:, None]
        weights = (partition >= 0).astype(np.float32)
    else:
        fields = {field: np.moveaxis(array, 0, 1) for field, array in stacked.items()}
        partition = np.where(reached, np.arange(len(records))[:, None], -1).T
        ranked = scores if fusion.reward == "score" else -rewards(scores, reference_bugs=reference_bugs).astype(float)
        weights = softmin_weights(ranked, temperature=fusion.temperature)[:, window].T * (partition >= 0)
        weights = (weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)).astype(np.float32)
    fields |= {"partition": partition.astype(np.int32), "weights": weights}
    if all("chain_logprob" in record.arrays for record in records):
        chains = np.stack([record.arrays["chain_logprob"] for record in records])  # [S, N]
        chains = chains[choice, positions][:, None] if fusion.method == "min_ce" else chains.T
        fields = _with_chains(fields, chains, first["labels"], partition_row=len(records))
    kept = {name: first[name] for name in ("tokens", "labels", "byte_ends")}
    mask = first["mask"] if "mask" in first else np.ones(len(window), np.int8)
    return kept | fields | {"mask": mask}


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Stacks sources; a vocabulary smaller than top_k has fewer entries, the others are unused (-1, -inf)."""
    if arrays[0].ndim == 1:
        return np.stack(arrays)
    width = max(array.shape[1] for array in arrays)
    unused = -1 if arrays[0].dtype == np.int32 else -np.inf
    return np.stack([np.pad(a, [(0, 0), (0, width - a.shape[1])], constant_values=unused) for a in arrays])


def _with_chains(
    fields: dict[str, np.ndarray], chains: np.ndarray, labels: np.ndarray, *, partition_row: int
) -> dict[str, np.ndarray]:
    """Doubles the M axis: after the distributions [N, M] the events {label, anything else} of their chains [N, M]."""
    live = np.isfinite(chains) & (fields["partition"] >= 0)
    logprob = np.where(live, np.minimum(chains.astype(np.float64), 0.0), -np.inf)
    with np.errstate(divide="ignore"):
        residual = np.log(-np.expm1(logprob))
    ids = np.full_like(fields["ids"], -1)
    logprobs = np.full_like(fields["logprobs"], -np.inf)
    ids[..., 0] = np.where(live, labels[:, None], -1)
    logprobs[..., 0] = logprob
    added = {
        "ids": ids,
        "logprobs": logprobs,
        "residual_logprob": residual.astype(fields["residual_logprob"].dtype),
        "partition": np.where(live, partition_row, -1).astype(np.int32),
        "weights": np.where(live, fields["weights"], np.float32(0)),
    }
    return {name: np.concatenate([fields[name], added[name]], axis=1) for name in fields}


def _scores(records: Sequence[Record], fusion: FusionConfig, n_bytes: int) -> np.ndarray:
    """[S, W] scores, lower is better; at least one window."""
    rows = []
    for record in records:
        ends, realised = record.arrays["source_byte_ends"], record.arrays["source_realised"]
        score = window_metric if fusion.score == "token_ce" else window_bits_per_byte
        found = score(ends, realised, n_bytes, window_bytes=fusion.window_bytes)
        rows.append(found if len(found) else np.zeros(1))
    return np.stack(rows)
