"""From records of documents to training batches: a function of the step, and nothing that must be kept in order.

`loader.batch(step)` is pure in (records, options, step): the rows of epoch 0, then those of epoch 1 and so on form
one line, and step n takes rows [n * batch_size, (n + 1) * batch_size). Resuming is therefore one number, and of
several processes each builds the rows that its devices hold of the same global batch, and reads no other documents.
The rows left over at the end fill the last batch up with padding; nothing is dropped, nothing is repeated.

Records without targets (captured documents, plain tokens) give batches for the causal LM loss alone: K = 1, M = 1,
every `partition` -1. Arrays are decoded once and kept in memory until `cache_bytes` are used; what does not fit is
read again in every epoch. One thread builds the next batches while the device computes.

Deliberately not built on grain: its `MapDataset` would give the same order, but packed rows depend on lengths of
many documents, and an index function needs neither worker processes nor a state beyond the step.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from fusejax.data.packing import PackIndex, Piece, segment_arrays
from fusejax.errors import InputError
from fusejax.types import FusionBatch, TopK

__all__ = ["FusionLoader", "Reader"]

TARGET_ARRAYS = ("ids", "logprobs", "residual_logprob", "partition", "weights")


class Reader(Protocol):
    """Random access to records that have `doc_id` and `arrays` (`fusejax.io.store.RecordReader` is one)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class FusionLoader:
    """Iterates over `FusionBatch`es of numpy arrays and can be put at any step.

    Args:
        reader: records with arrays tokens, labels [N]; optionally mask [N] (all ones where absent) and the fused
            targets ids, logprobs [N, M, K], residual_logprob, partition, weights [N, M]; all with one M and K.
        batch_size: rows of the global batch.
        seq_len: positions in a row.
        seed: orders the documents; epochs: passes over the documents.
        packed: False gives each document its own rows.
        use_targets: False leaves the targets out (the causal LM baseline sees the same rows).
        rows: which rows of each global batch this process builds, ascending; all by default.
        lengths: [documents] predicting positions, where known; else read from the reader's `lengths` or records.
        cache_bytes: decoded records kept in memory; prefetch: batches built ahead by a thread (0: none).

    Raises:
        InputError: rows that a batch does not have, no trainable document, or records that disagree.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        batch_size: int,
        seq_len: int,
        seed: int = 0,
        epochs: int = 1,
        packed: bool = True,
        use_targets: bool = True,
        rows: Sequence[int] | None = None,
        lengths: np.ndarray | None = None,
        cache_bytes: int = 512 << 20,
        prefetch: int = 2,
    ):
        if batch_size < 1 or epochs < 1:
            raise InputError(f"batch_size and epochs must be at least 1; got {batch_size} and {epochs}.")
        own = list(range(batch_size)) if rows is None else sorted(set(rows))
        if not own or own[0] < 0 or own[-1] >= batch_size:
            raise InputError(f"the rows of this process must lie in [0, {batch_size}), the batch; got {rows}.")
        self._documents = _Documents(reader, use_targets=use_targets, cache_bytes=cache_bytes)
        if lengths is None:
            lengths = getattr(reader, "lengths", None)
        self._lengths = self._documents.lengths() if lengths is None else np.asarray(lengths, dtype=np.int64)
        if len(self._lengths) != len(reader):
            raise InputError(f"{len(self._lengths)} lengths were given for {len(reader)} documents.")
        self.batch_size, self.seq_len, self.seed, self.epochs, self.packed = batch_size, seq_len, seed, epochs, packed
        self._own, self._prefetch = own, prefetch
        self._index = lru_cache(maxsize=2)(self._make_index)
        self.rows_per_epoch = len(self._index(0))
        self._step = 0

    def __len__(self) -> int:
        """Returns the number of steps of all epochs."""
        return -(-self.rows_per_epoch * self.epochs // self.batch_size)

    @property
    def tokens_per_epoch(self) -> int:
        """Predicting positions of all documents, trained or masked."""
        return int(self._lengths.sum())

    def __iter__(self) -> Iterator[FusionBatch]:
        """Yields the batches from the current step on; the state advances when a batch is handed out."""
        if self._prefetch < 1:
            while self._step < len(self):
                batch = self.batch(self._step)
                self._step += 1
                yield batch
            return
        with ThreadPoolExecutor(1, thread_name_prefix="fusejax-loader") as pool:
            ahead: list = []
            upcoming = self._step
            try:
                while self._step < len(self):
                    while upcoming < len(self) and len(ahead) <= self._prefetch:
                        ahead.append(pool.submit(self.batch, upcoming))
                        upcoming += 1
                    batch = ahead.pop(0).result()
                    self._step += 1
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def batch(self, step: int) -> FusionBatch:
        """Builds this process's rows of global batch `step`, [rows, seq_len, ...]."""
        rows = self._rows(step, self._own)
        width = self._documents.width
        batch = _empty_batch(len(rows), self.seq_len, *width)
        for at, pieces in enumerate(rows):
            batch.segment_ids[at], batch.positions[at] = segment_arrays(pieces, self.seq_len)
            begin = 0
            for piece in pieces:
                arrays = self._documents[piece.document]
                end = begin + piece.stop - piece.start
                _copy(arrays, batch, at, slice(begin, end), slice(piece.start, piece.stop))
                begin = end
        return batch

    def documents(self, step: int) -> list[str]:
        """Returns the doc_ids of global batch `step`, for messages."""
        rows = self._rows(step, range(self.batch_size))
        ids = {piece.document: None for pieces in rows for piece in pieces}
        return [self._documents.doc_id(i) for i in ids]

    def get_state(self) -> dict[str, int | bool]:
        """Returns the next step and what the meaning of that number depends on, as JSON."""
        return {"step": self._step, **self._identity()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at `state["step"]`; raises InputError if the other entries tell of another data order."""
        ours = self._identity()
        wrong = [f"{k}: saved {v!r}, now {ours[k]!r}" for k, v in state.items() if k in ours and v != ours[k]]
        if wrong:
            raise InputError(
                "the saved data position belongs to another data order (" + "; ".join(wrong) + "). Restore the old "
                "values to continue, or start in a new directory."
            )
        if not 0 <= int(state["step"]) <= len(self):
            raise InputError(f"the saved step {state['step']} is not among the {len(self)} steps of this loader.")
        self._step = int(state["step"])

    def _identity(self) -> dict[str, int | bool]:
        return {
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "packed": self.packed,
            "documents": len(self._lengths),
            "tokens": self.tokens_per_epoch,
        }

    def _make_index(self, epoch: int) -> PackIndex:
        return PackIndex(self._lengths, self.seq_len, seed=self.seed, epoch=epoch, packed=self.packed)

    def _rows(self, step: int, which: Sequence[int]) -> list[list[Piece]]:
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        rows: list[list[Piece]] = []
        for row in which:
            epoch, within = divmod(step * self.batch_size + row, self.rows_per_epoch)
            rows.append(self._index(epoch)[within] if epoch < self.epochs else [])
        return rows


class _Documents:
    """Decoded, checked arrays of each document, kept in memory while they fit."""

    def __init__(self, reader: Reader, *, use_targets: bool, cache_bytes: int):
        self._reader, self._use_targets, self._room = reader, use_targets, cache_bytes
        self._kept: dict[int, dict[str, np.ndarray]] = {}
        # Neighbouring rows share a cut document: a few recent ones are held even when nothing more fits.
        self._recent = lru_cache(maxsize=16)(self._load)
        self._lock = threading.Lock()
        if not len(reader):
            raise InputError("the record store is empty: there is no document to train on.")
        self._names = self._choose(reader[0].arrays)
        first = self._load(0)
        self.width = first["ids"].shape[1:] if "ids" in first else (1, 1)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        with self._lock:
            found = self._kept.get(index)
            return found if found is not None else self._recent(index)

    def doc_id(self, index: int) -> str:
        with self._lock:
            return str(self._reader[index].doc_id)

    def lengths(self) -> np.ndarray:
        return np.array([len(self[i]["tokens"]) for i in range(len(self._reader))], dtype=np.int64)

    def _choose(self, arrays: dict[str, np.ndarray]) -> list[str]:
        names = ["tokens", "labels"] + (["mask"] if "mask" in arrays else [])
        targets = [name for name in TARGET_ARRAYS if name in arrays]
        if self._use_targets and "partition" in targets:
            names += TARGET_ARRAYS
        return names

    def _load(self, index: int) -> dict[str, np.ndarray]:
        record = self._reader[index]
        missing = [name for name in self._names if name not in record.arrays]
        if missing:
            raise InputError(f"document {record.doc_id!r} has no array {', '.join(missing)}; write the store again.")
        # Copies: arrays may be views of a record that holds more than is kept here.
        arrays = {name: np.array(record.arrays[name]) for name in self._names}
        length = len(arrays["tokens"])
        uneven = {name: a.shape for name, a in arrays.items() if len(a) != length}
        if uneven:
            raise InputError(f"document {record.doc_id!r} has {length} tokens, but arrays of shapes {uneven}.")
        if "ids" in arrays and arrays["ids"].shape[1:] != getattr(self, "width", arrays["ids"].shape[1:]):
            raise InputError(
                f"document {record.doc_id!r} has targets [M, K] = {arrays['ids'].shape[1:]}, the first document has "
                f"{self.width}; all records of a store must agree."
            )
        size = sum(a.nbytes for a in arrays.values())
        if size <= self._room:
            self._room -= size
            self._kept[index] = arrays
        return arrays


def _empty_batch(rows: int, seq_len: int, mixed: int, entries: int) -> FusionBatch:
    """Padding: not trained, no distribution, and finite where a logarithm would be taken of nothing."""
    at, mix = (rows, seq_len), (rows, seq_len, mixed)
    targets = TopK(
        ids=np.full((*mix, entries), -1, np.int32),
        logprobs=np.full((*mix, entries), -np.inf, np.float32),
        residual_logprob=np.zeros(mix, np.float32),
    )
    return FusionBatch(
        tokens=np.zeros(at, np.int32),
        labels=np.zeros(at, np.int32),
        segment_ids=np.zeros(at, np.int32),
        positions=np.zeros(at, np.int32),
        mask=np.zeros(at, np.float32),
        targets=targets,
        partition=np.full(mix, -1, np.int32),
        weights=np.zeros(mix, np.float32),
    )


def _copy(arrays: dict[str, np.ndarray], batch: FusionBatch, row: int, to: slice, of: slice) -> None:
    batch.tokens[row, to] = arrays["tokens"][of]
    batch.labels[row, to] = arrays["labels"][of]
    batch.mask[row, to] = arrays["mask"][of] if "mask" in arrays else 1.0
    if "ids" in arrays:
        for name in ("ids", "logprobs", "residual_logprob"):
            getattr(batch.targets, name)[row, to] = arrays[name][of]
        batch.partition[row, to] = arrays["partition"][of]
        batch.weights[row, to] = arrays["weights"][of]
