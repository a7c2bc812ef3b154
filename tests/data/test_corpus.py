"""Cutting, splitting, de-duplicating and storing documents."""

import dataclasses

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fusejax.data.corpus import (
    Document,
    corpus_fingerprint,
    cut_documents,
    dedupe,
    read_corpus,
    split_documents,
    split_long,
    write_corpus,
)
from fusejax.errors import InputError

_TEXT = st.text(st.sampled_from("ab \n\té世😀."), max_size=300)
_DOCUMENTS = [Document(f"d{i}", f"text number {i} " * (1 + i % 7), "even" if i % 2 == 0 else "odd") for i in range(400)]


@given(_TEXT, st.integers(4, 60))
def test_split_long_is_lossless_bounded_and_whole(text, max_bytes):
    pieces = split_long(text, max_bytes)
    assert "".join(pieces) == text
    assert all(0 < len(piece.encode()) <= max_bytes for piece in pieces)
    # No piece but the last is shorter than half the limit, up to one character.
    assert all(len(piece.encode()) >= max_bytes // 2 - 6 or len(piece) >= max_bytes // 8 for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("aaaa bb\n\ncc\nd eeeeeeeeeeeeee", "aaaa bb\n\n"),
        ("aaaa bbbb\ncc d eeeeeeeeeeeeeeee", "aaaa bbbb\n"),
        ("aaaa bbbb cc deeeeeeeeeeeeeeee", "aaaa bbbb cc "),
        ("a\n\naaaabbbbccdeeeeeeeeeeeeeeee", "a\n\naaaabbbbccd"),
        ("世世世世世世", "世世世世"),
    ],
    ids=["paragraph", "line", "space", "break-too-early", "character"],
)
def test_split_long_prefers_the_coarsest_break_in_the_second_half(text, first):
    assert split_long(text, 14)[0] == first


def test_split_long_refuses_a_limit_below_one_character():
    with pytest.raises(InputError, match="max_bytes is 3"):
        split_long("text", 3)


def test_split_is_stable_when_documents_are_added_removed_and_reordered():
    whole = split_documents(_DOCUMENTS, valid=0.2, test=0.2)
    part = split_documents(reversed(_DOCUMENTS[::3]), valid=0.2, test=0.2)
    assert sum(map(len, whole.values())) == len(_DOCUMENTS)
    for name, documents in part.items():
        assert set(documents) <= set(whole[name])
        assert len(whole[name]) == pytest.approx({"train": 240, "valid": 80, "test": 80}[name], abs=35)
    assert split_documents(_DOCUMENTS, valid=0.2, test=0.2, seed=1) != whole


@given(st.lists(_TEXT.filter(bool), min_size=1, max_size=20), st.integers(4, 40))
def test_pieces_of_a_document_never_straddle_splits(texts, max_bytes):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    whole = split_documents(documents, valid=0.3, test=0.3)
    cut = split_documents(cut_documents(documents, max_bytes=max_bytes), valid=0.3, test=0.3)
    for name in whole:
        assert {d.id.split("#")[0] for d in cut[name]} == {d.id for d in whole[name]}
        assert "".join(d.text for d in cut[name]) == "".join(d.text for d in whole[name])
    # Cutting pieces again keeps the first original.
    again = split_documents(cut_documents(cut["train"], max_bytes=4), valid=0.3, test=0.3)
    assert not again["valid"] and not again["test"]


@pytest.mark.parametrize("shares", [(-0.1, 0.0), (0.5, 0.5)])
def test_split_refuses_shares_that_leave_no_training_text(shares):
    with pytest.raises(InputError, match="train is empty"):
        split_documents(_DOCUMENTS, valid=shares[0], test=shares[1])


def test_dedupe_keeps_the_first_and_reports_the_rest():
    dropped = []
    kept = list(dedupe([Document("a", "x  y\n"), Document("b", "x y"), Document("c", "xy")], on_drop=dropped.append))
    assert [d.id for d in kept] == ["a", "c"]
    assert [d.id for d in dropped] == ["b"]


def test_corpus_round_trip_counts_and_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr("fusejax.data.corpus._BATCH_BYTES", 1000)  # several Arrow batches
    documents = [*_DOCUMENTS, *cut_documents([Document("é", "世界 " * 50)], max_bytes=40)]
    info = write_corpus(tmp_path, {"train": iter(documents), "test": []})
    stored = read_corpus(tmp_path, "train")
    assert list(stored) == documents
    assert stored[-1] == documents[-1] and stored[250] == documents[250] and stored[3:5] == documents[3:5]
    assert info["train"]["documents"] == len(documents) == len(stored)
    assert info["train"]["bytes"] == sum(len(d.text.encode()) for d in documents)
    assert info["train"]["domains"]["odd"]["documents"] == 200
    assert info["train"]["fingerprint"] == corpus_fingerprint(documents)
    assert info["test"]["documents"] == 0 and len(read_corpus(tmp_path, "test")) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["test.arrow", "train.arrow"]
    with pytest.raises(IndexError):
        stored[len(stored)]


def test_fingerprint_and_checksum_notice_every_field(tmp_path):
    base = Document("a", "text", "d", "o")
    variants = [base, *(dataclasses.replace(base, **{f: "z"}) for f in ("id", "text", "domain", "origin"))]
    assert len({corpus_fingerprint([v]) for v in variants}) == 5
    assert corpus_fingerprint([Document("ab", "c")]) != corpus_fingerprint([Document("a", "bc")])
    infos = [write_corpus(tmp_path / str(i), {"train": [v]})["train"]["checksum"] for i, v in enumerate(variants)]
    assert len(set(infos)) == 5


def test_datasets_reads_our_arrow_file(tmp_path):
    datasets = pytest.importorskip("datasets")
    write_corpus(tmp_path, {"train": _DOCUMENTS[:5]})
    data = datasets.Dataset.from_file(str(tmp_path / "train.arrow"))
    assert data["text"][:] == [d.text for d in _DOCUMENTS[:5]]


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([Document("a", "x"), Document("a", "y")], "two documents have the id 'a'"),
        ([Document("a", "")], "'a' is empty"),
    ],
)
def test_write_refuses_bad_documents_and_keeps_the_earlier_corpus(tmp_path, documents, message):
    write_corpus(tmp_path, {"train": _DOCUMENTS[:2]})
    with pytest.raises(InputError, match=message):
        write_corpus(tmp_path, {"train": documents})
    assert list(read_corpus(tmp_path, "train")) == _DOCUMENTS[:2]
    assert [p.name for p in tmp_path.iterdir()] == ["train.arrow"]


def test_write_refuses_a_split_name_that_leaves_the_directory(tmp_path):
    with pytest.raises(InputError, match="cannot be a file name"):
        write_corpus(tmp_path, {"../train": []})


def test_read_names_the_splits_that_are_there(tmp_path):
    with pytest.raises(InputError, match="holds no corpus"):
        read_corpus(tmp_path, "train")
    write_corpus(tmp_path, {"train": _DOCUMENTS[:2]})
    with pytest.raises(InputError, match=r"no split 'trian'.*\['train'\].*Did you mean 'train'"):
        read_corpus(tmp_path, "trian")


def test_read_refuses_damaged_and_foreign_files(tmp_path):
    (tmp_path / "bad.arrow").write_bytes(b"not arrow at all")
    with pytest.raises(InputError, match=r"bad\.arrow is not a readable Arrow stream"):
        read_corpus(tmp_path, "bad")
    (tmp_path / "empty.arrow").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.arrow is not a readable"):
        read_corpus(tmp_path, "empty")
    table = pa.table({"text": ["x"]})
    with pa.OSFile(str(tmp_path / "foreign.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(InputError, match=r"has the columns \['text'\]"):
        read_corpus(tmp_path, "foreign")
