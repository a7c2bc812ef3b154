"""The corpus of a run: ids of several sources, and what makes it another corpus."""

import shutil

import pytest

from fusejax.config import CorpusConfig
from fusejax.data.corpus import read_corpus
from fusejax.errors import InputError
from fusejax.io.manifest import read_manifest
from fusejax.stages import prepare as stage
from fusejax.stages.context import Run
from tests.stages.tiny import texts, write_jsonl


def _prepared(root, *paths, **options):
    sources = [{"path": str(path)} for path in paths]
    corpus = CorpusConfig.model_validate({"train": sources, "test_fraction": 0.3} | options)
    run = Run.__new__(Run)
    run.config, run.directory = type("Config", (), {"corpus": corpus, "seed": 0})(), root
    return stage.prepare(run)


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
