"""Cutting long documents as FuseLLM does, and packing rows into blocks as FuseLLM does; both for parity only.

Splitting by tokens and decoding is not lossless: a cut inside a character gives U+FFFD on both sides, and a
sentencepiece chunk loses its leading space. `fusejax.data.split_long` cuts by bytes at ends of words and loses
nothing. Packing has no document mask and no position reset, and leaves a ragged block after every batch;
`fusejax.data.packing` has none of that.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fusejax.errors import InputError

__all__ = ["RESERVED", "pack_rows", "split_text"]

RESERVED = 48  # tokens of a block that a piece leaves free


def split_text(
    text: str,
    tokenizers: Sequence[tuple[Callable[[str], Sequence[int]], Callable[[Sequence[int]], str]]],
    *,
    block_size: int,
) -> list[str]:
    """Cuts a document that is too long for one of the tokenizers.

    Args:
      text: the document.
      tokenizers: (encode, decode) of the target and the sources, without special tokens.
      block_size: tokens of a block; pieces have `block_size - 48`.

    Returns:
      The pieces, decoded by the tokenizer that needs most tokens (the first of equals); [text] where all fit.

    Raises:
      InputError: a block with no room.
    """
    threshold = block_size - RESERVED
    if threshold < 1:
        raise InputError(f"block_size is {block_size} and must be more than the {RESERVED} tokens kept free.")
    encoded = [encode(text) for encode, _ in tokenizers]
    lengths = [len(ids) for ids in encoded]
    longest = lengths.index(max(lengths))
    if lengths[longest] <= threshold:
        return [text]
    ids, decode = encoded[longest], tokenizers[longest][1]
    return [decode(ids[start : start + threshold]) for start in range(0, len(ids), threshold)]


def pack_rows(
    documents: Mapping[str, Sequence[Any]], *, block_size: int, batch: int = 1000, drop_nan: bool = False
) -> Iterator[dict[str, Any]]:
    """Joins documents and cuts them in blocks.

    Args:
      documents: columns by name: per-token lists, and scalars in columns whose name starts with `metric_ce`.
      block_size: tokens of a block; the last one of a batch may be shorter.
      batch: documents that are joined.
      drop_nan: leave out documents with a NaN metric.

    Yields:
      Blocks with the same columns; a metric is the mean over the block's tokens of their documents' metrics.
    """
    metrics = [name for name in documents if name.startswith("metric_ce")]
    columns = [name for name in documents if name not in metrics]
    keep = [i for i in range(len(documents[columns[0]])) if not drop_nan or _finite(documents, metrics, i)]
    for start in range(0, len(keep), batch):
        rows = keep[start : start + batch]
        joined = {name: [x for i in rows for x in documents[name][i]] for name in columns}
        lengths = [len(documents[columns[0]][i]) for i in rows]
        spread = {m: np.repeat(np.array([documents[m][i] for i in rows], np.float64), lengths) for m in metrics}
        for at in range(0, sum(lengths), block_size):
            block: dict[str, Any] = {name: values[at : at + block_size] for name, values in joined.items()}
            yield block | {name: float(values[at : at + block_size].mean()) for name, values in spread.items()}


def _finite(documents: Mapping[str, Sequence[Any]], metrics: Sequence[str], index: int) -> bool:
    return all(documents[name][index] == documents[name][index] for name in metrics)
