"""What a report shows of a run's artefacts, and what is not there yet."""

__all__ = ["alignment_facts", "choices", "merge_facts", "missing", "trained_facts", "worst_spans"]

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusejax.data.corpus import Document, read_corpus
from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.io.store import RecordReader
from fusejax.report.merges import MergeFacts
from fusejax.report.spans import MOST, SpanText
from fusejax.stages.context import Run


def _facts(directory: Path) -> dict[str, Any]:
    return read_manifest(directory).facts if (directory / MANIFEST).is_file() else {}


def alignment_facts(run: Run) -> dict[str, dict[str, Any]]:
    """Returns what the alignment counted, per source."""
    found = {source.name: _facts(run.aligned_dir(source.name)) for source in run.config.sources}
    return {name: facts for name, facts in found.items() if facts}


def worst_spans(run: Run, alignment: Mapping[str, Mapping[str, Any]]) -> dict[str, list[SpanText]]:
    """Returns the worst stretches of every source with their text, in the trained bytes of their documents.

    A document that is no longer what was aligned has no text to show.
    """
    wanted = {name: facts.get("worst_spans", [])[:MOST] for name, facts in alignment.items()}
    if not any(wanted.values()) or not (run.corpus_dir / MANIFEST).is_file():
        return {}
    corpus = read_corpus(run.corpus_dir, "train")
    places = corpus.places(span["doc_id"] for spans in wanted.values() for span in spans)
    found: dict[str, list[SpanText]] = {}
    for name, spans in wanted.items():
        records = RecordReader(run.aligned_dir(name), kind="aligned")
        for span in spans:
            place = places.get(span["doc_id"])
            if place is None or place >= len(records):
                continue
            record, text = records[place], _trained_text(corpus[place])
            if record.doc_id == span["doc_id"] and len(text) == record.header["n_bytes"]:
                ends = {
                    run.config.target.name or "target": record.arrays["byte_ends"].tolist(),
                    name: record.arrays["source_byte_ends"].tolist(),
                }
                shown = SpanText(span["doc_id"], span["start"], span["stop"], text, ends)
                found.setdefault(name, []).append(shown)
    return found


def _trained_text(document: Document) -> bytes:
    data = document.text.encode()
    return data if document.spans is None else b"".join(data[start:stop] for start, stop in document.spans)


def choices(run: Run) -> dict[str, dict[str, Any]]:
    """Returns the positions, those that are supervised, and those of each source (`wins`), per fusion."""
    found = {fusion.name: _facts(run.fused_dir(fusion.name)) for fusion in run.config.fusions}
    return {name: facts for name, facts in found.items() if facts}


def merge_facts(run: Run) -> dict[str, MergeFacts]:
    """Returns what was merged how, of every merge that is made."""
    found = {}
    for merge in run.config.merge:
        directory = run.model_dir(merge.name)
        if (directory / MANIFEST).is_file():
            path = directory / "coefficients.json"
            coefficients = json.loads(path.read_text()) if path.is_file() else {}
            found[merge.name] = MergeFacts(merge.method, run.config.merge_targets(merge), coefficients)
    return found


def trained_facts(run: Run, arms: list[str]) -> dict[str, dict[str, Any]]:
    """Returns what was noted of every finished training."""
    return {arm: facts for arm in arms if (facts := _facts(run.model_dir(arm)))}


def missing(run: Run, arms: list[str], *, evaluated: bool) -> list[str]:
    """Returns what the run has not made yet, a sentence each, with the command that makes it."""
    sentences = []
    if not (run.corpus_dir / MANIFEST).is_file():
        sentences.append("The corpus: fusejax prepare.")
    names = [source.name for source in run.config.sources]
    if absent := [name for name in names if not (run.aligned_dir(name) / MANIFEST).is_file()]:
        sentences.append(f"Aligned distributions of {', '.join(absent)}: fusejax capture, then fusejax align.")
    fusions = [fusion.name for fusion in run.config.fusions]
    if absent := [name for name in fusions if not (run.fused_dir(name) / MANIFEST).is_file()]:
        sentences.append(f"Fused targets of {', '.join(absent)}: fusejax fuse.")
    for arm in arms:
        if not (run.model_dir(arm) / MANIFEST).is_file():
            begun = (run.train_dir(arm) / "metrics.jsonl").is_file()
            state = "is going on or was interrupted" if begun else "has not begun"
            sentences.append(f"Model {arm}: its training {state}; fusejax train begins it or goes on.")
    merges = [merge.name for merge in run.config.merge]
    if absent := [name for name in merges if not (run.model_dir(name) / MANIFEST).is_file()]:
        sentences.append(f"Merged models {', '.join(absent)}: fusejax merge.")
    return sentences if evaluated else [*sentences, "Results on held-out text: fusejax evaluate."]
