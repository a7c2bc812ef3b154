"""Distributions that somebody else has captured, in place of a capture (artefact A1).

A file says of every token sequence what a model predicted; the corpus says which text that is. So each document of the
corpus is encoded by the source's tokenizer (and chat template), and the ids must be those of the file, in order; the
first that is not is named with its document and position. A file may leave out the end token.

What the file does not say is derived or estimated, and counted: the mass outside the entries is what they leave of 1;
a label that is not among the entries gets an equal share of that mass (`labels_estimated`).

Deliberately not done: files in another order than the corpus, or of a part of it.
"""

__all__ = ["attached_record", "content_of", "import_distributions", "open_distributions"]

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.config import ImportConfig, ModelRef
from fusejax.data.corpus import Document, read_corpus
from fusejax.data.interchange import read_parquet
from fusejax.data.interchange_layouts import Compression, Sparse, read_distillkit, read_maxtext, sparse_of_record
from fusejax.errors import InputError
from fusejax.io.manifest import Manifest, file_checksum, fingerprint_of
from fusejax.io.progress import progress, say
from fusejax.io.store import Record
from fusejax.io.tokenizers import EncodedDocument, Tokenizer
from fusejax.sources.capture import CapturedDocument, record_of
from fusejax.stages.context import Run
from fusejax.stages.together import close_together, own_shards, shared_writer
from fusejax.types import TopK

_OVERFULL = 1e-3  # entries may sum to this much more than 1, by rounding


def import_distributions(
    run: Run, name: str, ref: ModelRef, *, settings: Mapping[str, Any], parents: Mapping[str, str]
) -> Manifest:
    """Writes a source's artefact from its file of distributions.

    Raises:
      InputError: the file is not of its layout, or does not belong to the corpus and the tokenizer.
    """
    if ref.distributions is None:
        raise ValueError(f"source {name!r} has no distributions to import")
    documents, encoder, size = read_corpus(run.corpus_dir, "train"), run.encoder(ref), settings["shard_size"]
    codec = run.config.capture.codec
    writer = shared_writer(
        run, run.captured_dir(name), kind="captured", settings=settings, parents=parents, shard_size=size, codec=codec
    )
    count = -(-len(documents) // size)
    mine = set(own_shards(range(count)))
    given, estimated = open_distributions(ref.distributions), 0
    with progress(f"import {name}", total=len(documents), unit="documents") as bar:
        for number in range(count):
            made = writer.has(number)
            if number in mine:
                writer.seek(number)
            for document in documents[number * size : (number + 1) * size]:
                sparse = next(given, None)
                if sparse is None:
                    raise InputError(f"{ref.distributions.path} ends before document {document.id!r} of the corpus")
                if number in mine:
                    record = attached_record(document, encoder.encode(document), sparse, encoder.tokenizer, settings)
                    estimated += record.header["labels_estimated"]
                    if not made:
                        writer.write(record)
            if number in mine:
                writer.flush()
            bar.update(min(size, len(documents) - number * size))
    if next(given, None) is not None:
        raise InputError(f"{ref.distributions.path} goes on after the {len(documents)} documents of the corpus")

    def facts(said: list[int]) -> dict[str, Any]:
        return {"documents": len(documents), "imported": True, "labels_estimated": sum(said)}

    manifest = close_together(writer, count, counts=estimated, facts=facts)
    if manifest.facts["labels_estimated"]:
        say(f"import {name}: {manifest.facts['labels_estimated']} labels are not among the entries; estimated")
    return manifest


def open_distributions(given: ImportConfig) -> Iterator[tuple[Sparse, Mapping[str, np.ndarray]]]:
    """Yields the sequences of a file, with what else it says: `residual_logprob`, `realised_logprob`."""
    path = Path(given.path)
    if given.layout == "parquet":
        for number, record in enumerate(read_parquet(path, columns=given.columns)):
            known = {name: record.arrays[name] for name in ("residual_logprob", "realised_logprob")}
            yield sparse_of_record(record)._replace(where=f"{path}, row {number}"), known
    elif given.layout == "maxtext":
        yield from ((sparse, {}) for sparse in read_maxtext(path, normalized=given.normalized))
    else:
        settings = None if given.compression is None else _compression(given.compression)
        yield from ((sparse, {}) for sparse in read_distillkit(path, compression=settings))


def content_of(given: ImportConfig) -> str:
    """What identifies the distributions: the content of the file or files, wherever they lie."""
    path = Path(given.path)
    if not path.exists():
        raise InputError(f"no distributions at {path}")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return fingerprint_of([file_checksum(file) for file in files])


def _compression(settings: Mapping[str, Any]) -> Compression:
    if unknown := sorted(set(settings) - set(Compression._fields)):
        raise InputError(f"compression has no {unknown}; known: {', '.join(Compression._fields)}")
    if missing := sorted({"d", "k", "exact_k"} - set(settings)):
        raise InputError(f"compression needs {missing} as well")
    return Compression(**settings)


def attached_record(
    document: Document,
    encoded: EncodedDocument,
    given: tuple[Sparse, Mapping[str, np.ndarray]],
    tokenizer: Tokenizer,
    settings: Mapping[str, Any],
) -> Record:
    """Joins one document and one sequence of distributions to a captured record (A1).

    Args:
      document: of the corpus; encoded: as the source reads it.
      given: from `open_distributions`.
      tokenizer: of the source, for messages and the size of its vocabulary.
      settings: of the artefact, for `top_k`.
    """
    sparse, known = given
    encoded = _same_tokens(document, encoded, sparse, tokenizer)
    ids, logprobs = np.asarray(sparse.ids), np.where(sparse.ids >= 0, sparse.logprobs, -np.inf).astype(np.float64)
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, : None if settings["top_k"] == "all" else settings["top_k"]]
    mass = np.exp(logprobs).sum(axis=1)
    if not np.isfinite(mass).all() or mass.max(initial=0) > 1 + _OVERFULL or ids.max(initial=0) >= tokenizer.vocab_size:
        raise InputError(
            f"{sparse.where} (document {document.id!r}): probabilities sum to {mass.max(initial=0):.4g} and ids reach "
            f"{ids.max(initial=-1)} of {tokenizer.vocab_size}; expected log-probabilities of this tokenizer's tokens"
        )
    with np.errstate(divide="ignore"):
        outside = known.get("residual_logprob", np.log(np.maximum(1 - mass, 0)))
        kept = np.exp(np.take_along_axis(logprobs, order, 1)).sum(axis=1)
        rest = np.log(np.maximum(np.exp(outside) + mass - kept, 0))
    found = ids == np.asarray(encoded.labels)[:, None]
    missing = np.zeros(len(ids), bool) if "realised_logprob" in known else ~found.any(axis=1)
    realised = known.get("realised_logprob", np.where(found, logprobs, -np.inf).max(axis=1, initial=-np.inf))
    share = np.maximum(outside, -30.0) - np.log(max(tokenizer.vocab_size - ids.shape[1], 1))
    topk = TopK(
        np.take_along_axis(ids, order, 1).astype(np.int32),
        np.take_along_axis(logprobs, order, 1).astype(np.float32),
        rest.astype(np.float32),
    )
    header, arrays = record_of(encoded, CapturedDocument(topk, np.where(missing, share, realised).astype(np.float32)))
    return Record(document.id, header | {"labels_estimated": int(missing.sum())}, arrays)


def _same_tokens(document: Document, encoded: EncodedDocument, sparse: Sparse, tokenizer: Tokenizer) -> EncodedDocument:
    """The encoding, without its end token where the file leaves it out; refused where the ids differ."""
    ours, theirs = np.append(encoded.tokens, encoded.labels[-1:]), sparse.tokens
    if len(theirs) == len(ours) - 1 and ours[-1] == tokenizer.eos_id:
        spans = None if encoded.spans is None else encoded.spans[:-1]
        arrays = (encoded.tokens[:-1], encoded.labels[:-1], encoded.byte_ends[:-1])
        encoded, ours = EncodedDocument(*arrays, encoded.n_bytes, encoded.exact, spans), ours[:-1]
    shared = min(len(ours), len(theirs))
    differ = np.flatnonzero(ours[:shared] != theirs[:shared])
    if not differ.size and len(ours) == len(theirs) == len(sparse.ids) + 1:
        return encoded
    at = int(differ[0]) if differ.size else shared
    said = [_shown(tokens, at, tokenizer) for tokens in (theirs, ours)]
    raise InputError(
        f"{sparse.where} is not document {document.id!r}: at position {at} it has {said[0]}, the tokenizer in "
        f"{tokenizer.directory} gives {said[1]} ({len(theirs)} and {len(ours)} tokens). Give the corpus and the "
        "tokenizer that the distributions were made with, documents in the same order"
    )


def _shown(tokens: np.ndarray, at: int, tokenizer: Tokenizer) -> str:
    if at >= len(tokens):
        return "no token"
    index = int(tokens[at])
    surface = tokenizer.token_bytes[index] if 0 <= index < tokenizer.vocab_size else b"?"
    return f"token {index}" + ("" if surface is None else f" {surface.decode(errors='replace')!r}")
