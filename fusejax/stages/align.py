"""align: a source's distributions at the target's positions, in symbols of both vocabularies (artefacts A2, A3).

The vocabulary map is kept beside the records as `vocabulary.npz`. Without a configuration the command compares
two tokenizers on a text, which needs no model.
"""

__all__ = ["align", "command"]

import time
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.alignment import DocumentReport, add_up, summary
from fusejax.alignment.report import Span
from fusejax.data.corpus import Document, read_corpus
from fusejax.data.encoding import DocumentEncoder
from fusejax.data.readers import read_documents
from fusejax.errors import InputError
from fusejax.io.manifest import Manifest
from fusejax.io.progress import progress
from fusejax.io.store import Record, RecordReader
from fusejax.io.tokenizers import Tokenizer, load_tokenizer
from fusejax.parallel.processes import is_first
from fusejax.stages.align_method import choose_method
from fusejax.stages.capture import chat_settings
from fusejax.stages.command import Result, parser
from fusejax.stages.compare import compare_tokenizers, write_alignment_page
from fusejax.stages.context import Run, finished
from fusejax.stages.lineage import check_captured
from fusejax.stages.together import close_together, own_shards, shared_writer

VOCABULARY = "vocabulary.npz"
MAPS = ("coarse", "exact")


def align(run: Run) -> dict[str, Manifest]:
    """Aligns every captured source of a run with the target; finished ones are skipped."""
    return {name: _align_one(run, name) for name in run.participants}


def _align_one(run: Run, name: str) -> Manifest:
    reader = RecordReader(run.captured_dir(name), kind="captured")
    source, target = run.encoder(run.participants[name]), run.encoder(run.config.target)
    _check_tokenizer(reader.manifest, source.tokenizer, name)
    check_captured(run, name)
    dtype, shard_size = run.config.capture.dtype, reader.manifest.settings["shard_size"]
    options = run.config.align
    settings = options.model_dump(mode="json") | {"target_tokenizer": target.tokenizer.fingerprint}
    settings |= chat_settings(run, run.config.target, "target_chat_template")
    settings["codec"] = codec = run.config.capture.codec
    parents = {"captured": reader.manifest.fingerprint}
    directory = run.aligned_dir(name)
    stored = settings | {"shard_size": shard_size}
    if done := finished(directory, kind="aligned", settings=stored, parents=parents):
        return done
    if options.conditioned and options.vocabulary != "coarse":
        raise InputError(f"align.conditioned needs vocabulary 'coarse', got {options.vocabulary!r}")
    documents = read_corpus(run.corpus_dir, "train")
    if len(documents) != len(reader):
        counts = f"{len(reader)} documents, the corpus {len(documents)}"
        raise InputError(f"{reader.directory} holds {counts}; capture it again")
    vocab_map, align_record = choose_method(options, reader, source, target, documents, dtype=dtype)
    identity = {"settings": settings, "parents": parents, "shard_size": shard_size, "codec": codec}
    writer = shared_writer(run, directory, kind="aligned", **identity)
    if is_first():
        np.savez(directory / VOCABULARY, **vocab_map._asdict())
    reports, fallbacks, start = [], 0, time.monotonic()
    count = -(-len(documents) // shard_size)
    shards = own_shards(range(count))
    with progress(f"align {name}", total=len(shards) * shard_size, unit="documents") as bar:
        for number in shards:
            first, made = number * shard_size, writer.has(number)
            writer.seek(number)
            shard = documents[first : first + shard_size]
            for offset, encoded in enumerate(target.encode_batch(shard)):
                _check_calls(shard[offset], source, target, name)
                record = reader[first + offset]
                aligned = align_record(record, encoded, bool(shard[offset].turns))
                reports.append(aligned.report)
                fallbacks += aligned.header.get("one_hot", 0)
                if not made:  # the report is made again, the record is not
                    writer.write(Record(record.doc_id, aligned.header, aligned.arrays))
            writer.flush()
            reports = [add_up(reports)]  # a corpus has more documents than reports should be held
            bar.update(len(shard))

    def facts(said: list[Any]) -> dict[str, Any]:
        found = summary(_report_of(report) for reports, _ in said for report in reports)
        found |= {"one_hot": sum(n for _, n in said)} if options.positions == "dtw" else {}
        return found | {"seconds": time.monotonic() - start}

    counts = [[_as_json(report) for report in reports], int(fallbacks)]
    return close_together(writer, count, counts=counts, facts=facts)


def _as_json(report: DocumentReport) -> list[Any]:
    *sums, worst = report
    return [*map(float, sums), [[span.doc_id, int(span.start), int(span.stop), int(span.positions)] for span in worst]]


def _report_of(found: list[Any]) -> DocumentReport:
    *sums, worst = found
    *counts, mass = sums
    return DocumentReport(*map(int, counts), mass_kept=mass, worst=tuple(Span(*span) for span in worst))


def _check_calls(document: Document, source: DocumentEncoder, target: DocumentEncoder, name: str) -> None:
    """Refuses tool calls that two models write differently: then their trained bytes are not the same text."""
    if any(turn.said for turn in document.turns) and source.trained_text(document) != target.trained_text(document):
        raise InputError(
            f"document {document.id!r}: the chat templates of {name} and of the target write its tool calls "
            "differently, so their bytes cannot be compared. Give all models one `chat_template` that writes calls, or "
            "leave it out"
        )


def _check_tokenizer(manifest: Manifest, tokenizer: Tokenizer, name: str) -> None:
    captured = manifest.settings["tokenizer"]
    if captured != tokenizer.fingerprint:
        raise InputError(
            f"source {name!r} was captured with tokenizer {captured}, its directory now holds "
            f"{tokenizer.fingerprint}; capture it again"
        )


def command(name: str, words: list[str]) -> Result:
    """`fusejax align CONFIG`, or `fusejax align --source-tokenizer DIR --target-tokenizer DIR --data FILE`."""
    if words and not words[0].startswith("-"):
        from fusejax.stages.run import command as run_command

        return run_command(name, words)
    arguments = parser(name, "Compare two tokenizers on a text, in target positions; with CONFIG, align a run.")
    arguments.add_argument("--source-tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    arguments.add_argument("--target-tokenizer", type=Path, required=True, help="directory with tokenizer.json")
    arguments.add_argument("--data", required=True, help="JSONL, parquet or folder of text")
    arguments.add_argument("--text-field", default="text", help="field that holds the text")
    arguments.add_argument("--vocabulary", choices=MAPS, default="coarse", help="vocabulary map")
    arguments.add_argument("--report", action="store_true", help="also print the worst spans")
    arguments.add_argument("--out", type=Path, help="with --report: directory for alignment.html and its picture")
    given = arguments.parse_args(words)
    texts = [document.text for document in read_documents(given.data, text_field=given.text_field)]
    source, target = load_tokenizer(given.source_tokenizer), load_tokenizer(given.target_tokenizer)
    if given.out and not given.report:
        raise InputError("--out is where --report writes its page; give both")
    comparison = compare_tokenizers(source, target, texts, vocabulary=given.vocabulary)
    lines = [f"{key}: {value}" for key, value in comparison.facts.items() if key != "worst_spans"]
    if given.report:
        lines += ["worst spans (document, bytes):"]
        lines += [f"  {span['doc_id']} {span['start']}-{span['stop']}" for span in comparison.facts["worst_spans"]]
    if given.out:
        page = write_alignment_page(comparison, given.out)
        lines += [f"report: {page}"]
    return Result(comparison.facts, "\n".join(lines))
