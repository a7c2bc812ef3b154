"""evaluate: bits per byte of one model on a file, or of every model of a run on its test split."""

__all__ = ["command", "evaluate_run"]

import json
from typing import Any

from fusejax.config import ModelRef
from fusejax.data.corpus import read_corpus
from fusejax.data.readers import ReadCounts, read_documents
from fusejax.errors import InputError
from fusejax.evaluation import by_domain, document_quantiles, standard_errors
from fusejax.io.manifest import MANIFEST, write_json
from fusejax.io.models import resolve_model
from fusejax.io.tokenizers import load_tokenizer
from fusejax.report import accuracy_table, markdown_table
from fusejax.sources.open import describe_source
from fusejax.stages.command import Result, parser, positive_int
from fusejax.stages.context import Run
from fusejax.stages.ensembles import ensembles
from fusejax.stages.run_tasks import tasks_of
from fusejax.stages.scores import score_texts, scores_of


def evaluate_run(run: Run) -> dict[str, Any]:
    """Evaluates sources, target, every trained arm, every merge, ensembles and tasks; writes result.json."""
    documents = read_corpus(run.corpus_dir, "test")
    models = _models(run)
    scored: dict[str, Any] = {name: scores_of(run, name, ref, documents) for name, ref in models.items()}
    members = {n: (ref, scored[n]) for n, ref in models.items() if n == "target" or n.startswith("source:")}
    mixed, facts = ensembles(run, members, documents)
    scored |= mixed
    tasks = tasks_of(run, models)
    domains = [document.domain for document in documents]
    table = {name: by_domain(evaluation, domains) for name, evaluation in scored.items()}
    origins = [document.origin or document.id for document in documents]
    result = {
        "bits_per_byte": table,
        "standard_error": standard_errors(scored, domains, origins, seed=run.config.seed),
        "documents": {name: document_quantiles(evaluation) for name, evaluation in scored.items()},
        "ensembles": facts,
        "tasks": tasks,
        "table": "\n".join(filter(None, (markdown_table(table), accuracy_table(tasks)))),
    }
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
