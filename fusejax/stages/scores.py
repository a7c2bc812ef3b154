"""What one model says of held-out text, kept as an artefact of a run so that it is computed once.

`scores/NAME` are of the test split. Ensembles ask the sources and the target for more: `scores-valid/NAME`, of the
valid split, and `scores-prompt/NAME`, of what stands before the first trained byte of test documents that have such.
"""

__all__ = ["score_texts", "scores_of"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

from fusejax.config import ModelRef
from fusejax.data.corpus import Document
from fusejax.evaluation import DocumentScore, Evaluation, evaluate_documents
from fusejax.io.manifest import read_manifest
from fusejax.io.progress import progress
from fusejax.io.store import Record, RecordReader, RecordWriter
from fusejax.io.tokenizers import EncodedDocument, Tokenizer, check_vocabulary
from fusejax.sources.open import Source, open_source
from fusejax.stages.capture import chat_settings, describe
from fusejax.stages.context import Run, finished

Part = Literal["test", "valid", "prompt"]
_DIRECTORIES: dict[Part, str] = {"test": "scores", "valid": "scores-valid", "prompt": "scores-prompt"}
_SETTINGS: dict[Part, dict[str, str]] = {
    "test": {"split": "test"},
    "valid": {"split": "valid"},
    "prompt": {"split": "test", "part": "prompt"},
}


def score_texts(
    source: Source,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    context: int,
    batch_tokens: int,
    label: str,
    encoded: Mapping[str, EncodedDocument] | None = None,
) -> Evaluation:
    """Scores every token of texts; [N] realised log-probabilities per document.

    `encoded` says what stands for each text where that is not its plain encoding.
    """
    if source.vocab_size is not None:
        check_vocabulary(tokenizer, source.vocab_size, str(source.directory))
    context = min(context, source.max_positions or context)
    score = open_source(source, top_k=0, valid_vocab=tokenizer.vocab_size, context=context)
    if encoded is None:
        encoded = dict(zip(texts, tokenizer.encode_batch(texts), strict=True))
    total = sum(len(encoded[text].labels) for text in texts if text)
    with progress(f"evaluate {label}", total=total, unit="tokens") as bar:
        return evaluate_documents(
            lambda *arrays: score(*arrays)[0],
            SimpleNamespace(encode=encoded.__getitem__),
            texts,
            context=context,
            batch_size=max(1, batch_tokens // context),
            on_batch=bar.update,
        )


def scores_of(run: Run, name: str, ref: ModelRef, documents: Sequence[Document], *, part: Part = "test") -> Evaluation:
    """Scores documents, or reads the scores of an earlier run of the same model.

    Args:
      run: what the artefact belongs to.
      name: of the model in the table.
      ref: the model.
      documents: all of the split.
      part: which split, or of the test split what stands before the first trained byte; documents without such are
        left out.
    """
    options, source = run.config.evaluate, describe(run, ref)
    settings = _SETTINGS[part] | {"context": options.context, "tokenizer": run.tokenizer(ref).fingerprint}
    settings |= chat_settings(run, ref)
    parents = {"corpus": read_manifest(run.corpus_dir).fingerprint, "model": source.fingerprint}
    directory = run.directory / _DIRECTORIES[part] / name.replace(":", "-")
    if not finished(directory, kind="scores", settings=settings | {"shard_size": 256}, parents=parents):
        run.replace_stale(directory)
        encoder = run.encoder(ref)
        encode = encoder.encode_prompts if part == "prompt" else encoder.encode_batch
        encoded = {d.id: found for d, found in zip(documents, encode(documents), strict=True) if found is not None}
        found = score_texts(
            source,
            run.tokenizer(ref),
            [document.id if document.id in encoded else "" for document in documents],
            encoded=encoded,
            context=options.context,
            batch_tokens=max(options.batch_tokens, options.context),
            label=name if part == "test" else f"{name} ({part})",
        )
        writer = RecordWriter(directory, kind="scores", settings=settings, parents=parents)
        for score in found.documents[writer.resume_at :]:
            arrays = {"realised_logprob": score.realised_logprob, "byte_ends": score.byte_ends}
            writer.write(Record(documents[score.index].id, {"index": score.index, "n_bytes": score.n_bytes}, arrays))
        facts = {"nll_nats": found.nll_nats, "tokens": found.tokens, "bytes": found.n_bytes}
        writer.finish(facts=facts | {"unpredicted_bytes": found.unpredicted_bytes})
    return _read_scores(directory)


def _read_scores(directory: Path) -> Evaluation:
    scores = tuple(
        DocumentScore(
            int(record.header["index"]),
            np.asarray(record.arrays["realised_logprob"]),
            np.asarray(record.arrays["byte_ends"]),
            int(record.header["n_bytes"]),
        )
        for record in RecordReader(directory, kind="scores")
    )
    return Evaluation(scores, 0)
