"""How many bytes a capture will take, before it is made: within 10 %.

The corpus' bytes times the positions per byte of a sample times the size of a record. What is not entries in a
compact record depends on how well the source predicts the text; the figure here is that of small English models.
"""

__all__ = ["documents_per_shard", "nominal_entries", "predicted_bytes", "store_bytes"]

from collections.abc import Sequence

from fusejax.config import ModelRef
from fusejax.data.corpus import Document
from fusejax.io.store_entries import NARROW_IDS
from fusejax.io.tokenizers import Tokenizer
from fusejax.stages.context import Run

_SAMPLE_DOCUMENTS, _SAMPLE_BYTES = 256, 1 << 20
_SHARD_BYTES, _MOST_DOCUMENTS = 8 << 20, 1 << 16
_BYTES_PER_POSITION = 4.0  # of English text, roughly
_BLOCK = 1 << 16  # array_record fills up its last block and adds one with its index
_RECORD_BYTES = {"compact": 190, "float16": 540, "float32": 540}  # header, checksums, container
_ENTRY_BYTES = {"compact": 3, "float16": 6, "float32": 8}
_SIDE_BYTES = {"compact": 3.2, "float16": 16.0, "float32": 20.0}  # all but the entries


def documents_per_shard(documents: int, n_bytes: int, *, top_k: int, codec: str) -> int:
    """Returns how many documents of a corpus make a shard of about 8 MiB, whatever source is captured.

    Smaller shards are padded noticeably; of larger ones a killed run loses more. The tokenizer is not asked, so
    that sources of one corpus have shards of the same documents.

    Args:
      documents, n_bytes: of the corpus' training text.
      top_k, codec: as in the section `capture`.
    """
    width = _ENTRY_BYTES[codec] * top_k + _SIDE_BYTES[codec]
    record = n_bytes / max(documents, 1) / _BYTES_PER_POSITION * width + _RECORD_BYTES[codec]
    return max(1, min(round(_SHARD_BYTES / record), _MOST_DOCUMENTS))


def nominal_entries(run: Run) -> int:
    """Returns the entries per position for which shards are cut, of all sources alike: of `all`, the target's."""
    options = run.config.capture
    return options.top_k if options.top_k != "all" else run.tokenizer(run.config.target).vocab_size


def store_bytes(positions: Sequence[float], *, top_k: int, vocab_size: int, codec: str, shard_size: int) -> int:
    """Returns the bytes of the shards of documents.

    Args:
      positions: of each document.
      top_k, vocab_size: entries per position and the ids that they may have.
      codec, shard_size: as in the section `capture`.
    """
    entry = 4 if codec == "compact" and vocab_size > NARROW_IDS else _ENTRY_BYTES[codec]
    width = entry * min(top_k, vocab_size) + _SIDE_BYTES[codec]
    total = 0
    for first in range(0, len(positions), shard_size):
        shard = positions[first : first + shard_size]
        payload = sum(shard) * width + len(shard) * _RECORD_BYTES[codec]
        total += (-(-int(payload) // _BLOCK) + 1) * _BLOCK
    return total


def predicted_bytes(run: Run, ref: ModelRef, documents: Sequence[Document], *, tokenizer: Tokenizer) -> int:
    """Returns the predicted bytes of one source's capture of documents."""
    sizes = [document.n_bytes for document in documents]
    if not sizes:
        return 0
    step = max(1, len(sizes) // _SAMPLE_DOCUMENTS)
    sample, seen = [], 0
    for index in range(0, len(sizes), step):
        sample.append(index)
        seen += sizes[index]
        if seen > _SAMPLE_BYTES:
            break
    encoded = run.encoder(ref, tokenizer=tokenizer).encode_batch([documents[index] for index in sample])
    rate = sum(len(found.tokens) for found in encoded) / max(seen, 1)
    options = run.config.capture
    return store_bytes(
        [size * rate for size in sizes],
        top_k=options.entries(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        codec=options.codec,
        shard_size=options.shard_size
        or documents_per_shard(len(sizes), sum(sizes), top_k=nominal_entries(run), codec=options.codec),
    )
