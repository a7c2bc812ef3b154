"""evaluate: bits per byte of one model on a file, or of every model of a run on its test split."""

__all__ = ["command", "evaluate_run", "score_texts"]

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from fusejax.config import ModelRef
from fusejax.data.corpus import Document, read_corpus
from fusejax.data.readers import ReadCounts, read_documents
from fusejax.errors import InputError
from fusejax.evaluation import DocumentScore, Evaluation, by_domain, ensemble_evaluations, evaluate_documents
from fusejax.io.manifest import MANIFEST, read_manifest, write_json
from fusejax.io.models import resolve_model
from fusejax.io.progress import progress
from fusejax.io.store import Record, RecordReader, RecordWriter
from fusejax.io.tokenizers import EncodedDocument, Tokenizer, check_vocabulary, load_tokenizer
from fusejax.report import markdown_table
from fusejax.sources.open import Source, describe_source, open_source
from fusejax.stages.capture import chat_settings, describe
from fusejax.stages.command import Result, parser, positive_int
from fusejax.stages.context import Run, finished


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


def evaluate_run(run: Run) -> dict[str, Any]:
    """Evaluates sources, target, every trained arm, every merge and the ensemble; writes result.json."""
    documents = read_corpus(run.corpus_dir, "test")
    domains = [document.domain for document in documents]
    table: dict[str, dict[str, float]] = {}
    fused: list[Evaluation] = []
    for name, ref in _models(run).items():
        evaluation = _evaluate_one(run, name, ref, documents)
        table[name] = by_domain(evaluation, domains)
        if name == "target" or name.startswith("source:"):
            fused.append(evaluation)
    if run.config.evaluate.ensemble:
        table["ensemble"] = by_domain(ensemble_evaluations(fused), domains)
    result = {"bits_per_byte": table, "table": markdown_table(table)}
    write_json(run.directory / "result.json", result)
    return result


def _models(run: Run) -> dict[str, ModelRef]:
    """Models by the name in the table, in the table's order."""
    config = run.config
    # Of a source whose distributions were imported there is no model to evaluate.
    found = {f"source:{source.name}": source for source in config.sources if source.distributions is None}
    found["target"] = config.target
    arms = (["clm"] if config.train.baseline else []) + [fusion.name for fusion in config.fusions]
    arms += [merge.name for merge in config.merge]
    for arm in arms:
        if not (run.model_dir(arm) / MANIFEST).is_file():
            raise InputError(f"{run.model_dir(arm)} is not there: run `fusejax train` and `fusejax merge` first")
        found[arm] = ModelRef(model=str(run.model_dir(arm)), name=arm, chat_template=config.target.chat_template)
    return found


def _evaluate_one(run: Run, name: str, ref: ModelRef, documents: Sequence[Document]) -> Evaluation:
    """Scores the test split, or reads the scores of an earlier run of the same model."""
    options, source = run.config.evaluate, describe(run, ref)
    settings = {"split": "test", "context": options.context, "tokenizer": run.tokenizer(ref).fingerprint}
    settings |= chat_settings(run, ref)
    parents = {"corpus": read_manifest(run.corpus_dir).fingerprint, "model": source.fingerprint}
    directory = run.directory / "scores" / name.replace(":", "-")
    if not finished(directory, kind="scores", settings=settings | {"shard_size": 256}, parents=parents):
        run.replace_stale(directory)
        names = [document.id for document in documents]
        found = score_texts(
            source,
            run.tokenizer(ref),
            names,
            encoded=dict(zip(names, run.encoder(ref).encode_batch(documents), strict=True)),
            context=options.context,
            batch_tokens=max(options.batch_tokens, options.context),
            label=name,
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


def command(name: str, words: list[str]) -> Result:
    """`fusejax evaluate --model DIR --data FILE`, `... --model DIR --tasks A B`, or `fusejax evaluate CONFIG`."""
    if words and not words[0].startswith("-"):
        from fusejax.stages.run import command as run_command

        return run_command(name, words)
    if any(word.split("=")[0] == "--tasks" for word in words):
        from fusejax.stages.tasks import command as tasks_command

        return tasks_command(name, words)
    arguments = parser(
        name,
        "Bits per byte: negative log-likelihood over UTF-8 bytes, every byte counted once. "
        "With --tasks instead of --data: see fusejax evaluate --tasks --help.",
    )
    arguments.add_argument("--model", required=True, help="Hugging Face directory, fusejax checkpoint, or hub name")
    arguments.add_argument("--data", required=True, help="JSONL with {'text': ...}, parquet or folder of text")
    arguments.add_argument("--text-field", default="text", help="field that holds the text")
    arguments.add_argument(
        "--context", type=positive_int, default=2048, help="tokens per window; cut to the model's limit"
    )
    arguments.add_argument("--batch-tokens", type=positive_int, default=16384, help="tokens per forward call")
    arguments.add_argument("--limit", type=positive_int, help="documents to read")
    given = arguments.parse_args(words)
    path = resolve_model(given.model)
    counts = ReadCounts()
    rows = read_documents(given.data, text_field=given.text_field, limit=given.limit, counts=counts)
    texts = [document.text for document in rows]
    if not texts:
        raise InputError(f"{given.data} holds no document with text ({counts.empty} empty ones): nothing to evaluate")
    found = score_texts(
        describe_source(path, name=given.model),
        load_tokenizer(path),
        texts,
        context=given.context,
        batch_tokens=max(given.batch_tokens, given.context),
        label=path.name,
    )
    data = {
        "bits_per_byte": found.bits_per_byte,
        "nll_nats": found.nll_nats,
        "tokens": found.tokens,
        "bytes": found.n_bytes,
        "unpredicted_bytes": found.unpredicted_bytes,
        "documents": len(found.documents),
        "empty_documents": counts.empty,
    }
    return Result(data, json.dumps(data, indent=2))
