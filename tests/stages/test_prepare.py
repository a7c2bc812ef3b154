"""The corpus of a run: ids of several sources, and what makes it another corpus."""

import gzip
import json
import shutil

import numpy as np
import pytest

from fusejax.config import CorpusConfig
from fusejax.data.corpus import read_corpus
from fusejax.errors import InputError
from fusejax.io.manifest import read_manifest
from fusejax.stages import corpus_size
from fusejax.stages import prepare as stage
from fusejax.stages.context import Run
from fusejax.stages.prepare import sample_documents
from tests.stages.tiny import texts, write_jsonl


def _run(root, *sources, **options):
    train = sources[0] if isinstance(sources[0], list) else [{"path": str(path)} for path in sources]
    corpus = CorpusConfig.model_validate({"train": train, "test_fraction": 0.3} | options)
    run = Run.__new__(Run)
    run.config, run.directory = type("Config", (), {"corpus": corpus, "split_seed": 0})(), root
    return run


def _prepared(root, *sources, **options):
    return stage.prepare(_run(root, *sources, **options))


def test_sources_whose_ids_are_alike_make_one_corpus(tmp_path):
    first = write_jsonl(tmp_path / "a.jsonl", texts(20, seed=1))
    second = write_jsonl(tmp_path / "b.jsonl", texts(20, seed=2))
    _prepared(tmp_path / "run", first, second)
    ids = [d.id for name in ("train", "valid", "test") for d in read_corpus(tmp_path / "run" / "corpus", name)]
    assert len(ids) == len(set(ids)) == 40
    assert {"text/3", "text:1/3"} <= set(ids)


def test_where_a_file_lies_makes_no_other_corpus_and_its_content_does(tmp_path):
    here, there = tmp_path / "text.jsonl", tmp_path / "moved" / "text.jsonl"
    write_jsonl(here, texts(20, seed=1))
    there.parent.mkdir()
    shutil.copy(here, there)
    first = _prepared(tmp_path / "one", here)
    assert _prepared(tmp_path / "two", there).fingerprint == first.fingerprint
    assert str(tmp_path) not in (tmp_path / "one" / "corpus" / "manifest.json").read_text()
    write_jsonl(there, texts(20, seed=2))
    assert _prepared(tmp_path / "two", there).fingerprint != first.fingerprint


def test_other_packages_are_other_embedded_text(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "embedded_documents", lambda _: {"x": list(stage.read_documents(tmp_path / "t.jsonl"))})
    write_jsonl(tmp_path / "t.jsonl", texts(20, seed=1))
    first = _prepared(tmp_path / "run", "embedded")
    assert _prepared(tmp_path / "run", "embedded") == read_manifest(tmp_path / "run" / "corpus") == first
    monkeypatch.setattr(stage.sys, "version", "3.99")
    assert _prepared(tmp_path / "run", "embedded").fingerprint != first.fingerprint


def test_an_empty_split_is_explained(tmp_path):
    data = write_jsonl(tmp_path / "one.jsonl", texts(1, seed=1))
    with pytest.raises(InputError, match=r"split is empty \(documents before the caps in bytes: .*1 in "):
        _prepared(tmp_path / "run", data)


def _lines(count):
    """Documents of all lengths, which pack badly."""
    rng = np.random.default_rng(0)
    for number in range(count):
        text = rng.bytes(10 * (1 + number % 9)).hex(" ")
        yield json.dumps({"id": f"d{number}", "text": text}) + "\n"


@pytest.mark.parametrize("packed", [False, True])
def test_the_size_of_a_large_source_is_estimated_from_its_beginning(tmp_path, monkeypatch, packed):
    path = tmp_path / ("text.jsonl.gz" if packed else "text.jsonl")
    with gzip.open(path, "wt") if packed else path.open("w") as file:
        file.writelines(_lines(16_000))
    options = {"test_fraction": 0.1}
    monkeypatch.setattr(corpus_size, "_SAMPLE_BYTES", 200_000)
    run = _run(tmp_path / "run", path, **options)
    planned = corpus_size.planned_text(run)
    estimated = planned.scale * sum(d.n_bytes for d in planned.documents)
    assert (planned.exact, planned.bounded) == (False, True)
    assert sum(d.n_bytes for d in planned.documents) < 210_000
    assert "an estimate from the first 0.2 MB of text)" in planned.note
    limited = corpus_size.planned_text(_run(tmp_path / "other", [{"path": str(path), "limit": 4000}], **options))
    capped = corpus_size.planned_text(_run(tmp_path / "third", path, **options, max_train_bytes=500_000))
    made = _prepared(tmp_path / "run", path, **options).facts["splits"]["train"]["bytes"]
    # Python 3.12 reads compressed files 128 KiB ahead, much of this one
    assert estimated == pytest.approx(made, rel=0.35 if packed else 0.05)
    assert limited.scale * sum(d.n_bytes for d in limited.documents) == pytest.approx(made / 4, rel=0.1)
    assert capped.scale * sum(d.n_bytes for d in capped.documents) == pytest.approx(500_000)
    assert corpus_size.planned_text(run).exact  # the corpus stands


def test_caps_keep_a_sample_that_spreads_over_all(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(_lines(2000)))
    whole = _prepared(tmp_path / "whole", path)
    _prepared(tmp_path / "run", path, max_train_bytes=20_000, max_eval_bytes=5_000)
    for name, cap in (("train", 20_000), ("valid", 5_000), ("test", 5_000)):
        kept = [d.id for d in read_corpus(tmp_path / "run" / "corpus", name)]
        everything = list(read_corpus(tmp_path / "whole" / "corpus", name))
        assert kept == [d.id for d in everything if d.id in set(kept)]  # in the order given
        size = sum(d.n_bytes for d in everything if d.id in set(kept))
        assert cap - 200 < size <= cap
        ranked, expected, used = sample_documents(everything), set(), 0
        for document in ranked:
            if used + document.n_bytes <= cap:
                used += document.n_bytes
                expected.add(document.id)
        assert set(kept) == expected
    assert not list((tmp_path / "run" / "corpus").glob("*uncapped*"))
    assert whole.facts["duplicates"] == 0


def test_duplicates_of_held_out_text_leave_the_training_text(tmp_path):
    train = write_jsonl(tmp_path / "train.jsonl", [f"text {i}" for i in range(20)] + ["text 3"])
    held = write_jsonl(tmp_path / "test.jsonl", ["text   3", "text 5\n", "other"])
    manifest = _prepared(tmp_path / "run", train, test=[{"path": str(held)}], test_fraction=0.0, valid_fraction=0.0)
    texts_of = {name: [d.text for d in read_corpus(tmp_path / "run" / "corpus", name)] for name in ("train", "test")}
    assert texts_of["test"] == ["text   3", "text 5\n", "other"]
    assert texts_of["train"] == [f"text {i}" for i in range(20) if i not in (3, 5)]
    assert manifest.facts["duplicates"] == 3


def test_records_keep_their_domain_unless_the_configuration_names_one(tmp_path, capsys):
    path = tmp_path / "text.jsonl"
    domains = ["web", "books", "", None]
    lines = ({"id": str(i), "text": f"text {i}", "domain": domains[i % 4]} for i in range(40))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def found(root, **source):
        _prepared(root, [{"path": str(path), **source}])
        documents = [d for name in ("train", "valid", "test") for d in read_corpus(root / "corpus", name)]
        assert all(d.id.startswith(f"{d.domain}/") for d in documents)
        return {name: sum(d.domain == name for d in documents) for name in sorted({d.domain for d in documents})}

    assert found(tmp_path / "own") == {"books": 10, "text": 20, "web": 10}
    assert "takes the place" not in capsys.readouterr().err
    assert found(tmp_path / "named", domain="mine") == {"mine": 40}
    said = capsys.readouterr().err
    assert "domain 'mine' of the configuration takes the place of the records' 'books' (10 documents), 'web'" in said
    path.write_text('{"text": "x", "domain": "mean"}\n')
    with pytest.raises(InputError, match="its domain is 'mean'"):
        found(tmp_path / "mean")
