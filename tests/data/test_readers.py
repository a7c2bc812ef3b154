"""Reading the user's documents, and what is said when they are bad."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusejax.data.corpus import Document, write_corpus
from fusejax.data.extent import share_read
from fusejax.data.readers import ReadCounts, read_documents
from fusejax.errors import InputError

_ROWS = [
    {"id": "a", "text": "first text", "domain": "x"},
    {"id": "b", "text": ""},
    {"id": "c", "text": "世界 😀"},
    {"id": 7, "text": " \n"},
]
_EXPECTED = [Document("a", "first text", "x"), Document("c", "世界 😀")]


def _write_jsonl(path, rows=_ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_jsonl_plain_and_compressed_skip_and_count_empty_documents(tmp_path):
    path = _write_jsonl(tmp_path / "d.jsonl")
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for source in (path, str(packed)):
        counts = ReadCounts()
        assert list(read_documents(source, counts=counts)) == _EXPECTED
        assert counts == ReadCounts(documents=2, bytes=10 + 11, empty=2)


def test_folds_deal_documents_out_and_share_none(tmp_path):
    path = _write_jsonl(tmp_path / "d.jsonl", [{"id": str(i), "text": f"text {i}"} for i in range(10)])
    counts = ReadCounts()
    parts = [[d.id for d in read_documents(path, folds=4, fold=[part], counts=counts)] for part in range(4)]
    assert parts == [["0", "4", "8"], ["1", "5", "9"], ["2", "6"], ["3", "7"]] and counts.left_out == 30
    assert [d.id for d in read_documents(path, folds=4, fold=[0, 3], skip=1, limit=2)] == ["3", "4"]


def test_jsonl_streams(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "good"}\nbroken\n')
    documents = read_documents(path)
    assert next(documents) == Document("d.jsonl:1", "good")
    with pytest.raises(InputError, match=r"d\.jsonl:2: broken JSON"):
        next(documents)
    assert list(read_documents(path, limit=1)) == [Document("d.jsonl:1", "good")]


def test_parquet(tmp_path):
    path = tmp_path / "d.parquet"
    rows = [{"key": i, "body": f"text {i}" if i else None} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), path)
    counts = ReadCounts()
    documents = list(read_documents(path, text_field="body", id_field="key", counts=counts))
    assert documents == [Document(str(i), f"text {i}") for i in (1, 2, 3)]
    assert counts.empty == 1


def test_folder_of_text_is_recursive_ordered_and_skips_hidden_files(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    for name, text in (("b.txt", "\ufeffbee"), ("sub/a.md", "# a"), ("sub/.git/x.txt", "no"), ("notes", "any file")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    documents = list(read_documents(tmp_path, text_field="body", id_field="key"))
    assert documents == [Document("b.txt", "bee"), Document("notes", "any file"), Document("sub/a.md", "# a")]


def test_folder_of_jsonl_and_single_text_file(tmp_path):
    _write_jsonl(tmp_path / "1.jsonl", [{"text": "one"}])
    _write_jsonl(tmp_path / "2.jsonl", [{"text": "two"}])
    assert [(d.id, d.text) for d in read_documents(tmp_path)] == [("1.jsonl:1", "one"), ("2.jsonl:1", "two")]
    (tmp_path / "x.md").write_text("words")
    assert list(read_documents(tmp_path / "x.md")) == [Document("x.md", "words")]
    assert [d.text for d in read_documents(tmp_path, format="jsonl")] == ["one", "two"]


def test_our_corpus_reads_back(tmp_path):
    write_corpus(tmp_path, {"train": _EXPECTED, "test": [Document("t", "test text")]})
    assert list(read_documents(tmp_path, split="train")) == _EXPECTED
    with pytest.raises(InputError, match=r"has the splits \['test', 'train'\], none was chosen"):
        read_documents(tmp_path)


def test_saved_datasets_directory(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"text": ["x", "y"]})
    one.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": one, "dev": one}).save_to_disk(str(tmp_path / "two"))
    assert [(d.id, d.text) for d in read_documents(tmp_path / "one")] == [("0", "x"), ("1", "y")]
    assert [d.text for d in read_documents(tmp_path / "two", split="dev")] == ["x", "y"]
    with pytest.raises(InputError, match="'validation' is not one of them"):
        read_documents(tmp_path / "two", split="validation")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(InputError, match="not a readable saved dataset"):
        read_documents(tmp_path / "one")


def test_hub_name_without_network_says_how_to_go_on():
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match=r"'no-such/dataset' is neither a path here nor.*network.*directory"):
        read_documents("no-such/dataset")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "ok"}\n{"text": "\xff"}\n', r"bad\.jsonl is not UTF-8: byte 0xff at byte offset 25"),
        (b'{"text": "ok"}\n\n{"text": }\n', r"bad\.jsonl:3: broken JSON, Expecting value at column 10"),
        (b'[\n{"text": "ok"}]\n', r"bad\.jsonl:1: broken JSON.*not JSON lines"),
        (b'"text"\n', r"bad\.jsonl:1: got a JSON str, expected one object"),
        (b'{"txt": "ok", "n": 1}\n', r"bad\.jsonl:1: no field 'text'; the fields are \['n', 'txt'\].*mean 'txt'"),
        (b'{"text": 3}\n', r"bad\.jsonl:1: field 'text' holds a int"),
        (b'{"text": "\\ud800"}\n', r"bad\.jsonl:1: field 'text' holds half of a surrogate pair"),
        (
            b'{"id": "k", "text": "x"}\n{"id": "k", "text": "y"}\n',
            r"bad\.jsonl:2: the id 'k' was already used, by record 1",
        ),
    ],
)
def test_bad_jsonl_names_file_and_place(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        list(read_documents(path))


def test_missing_id_field_lists_the_fields(tmp_path):
    path = _write_jsonl(tmp_path / "d.jsonl", [{"text": "x", "key": None}])
    for field in ("key", "nothing"):
        with pytest.raises(InputError, match=rf"field '{field}' gives no id .*\['key', 'text'\]"):
            list(read_documents(path, id_field=field))


def test_damaged_files_are_named(tmp_path):
    packed = tmp_path / "d.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "x"}\n' * 1000)[:-20])
    parquet = tmp_path / "d.parquet"
    parquet.write_bytes(b"PAR1 nothing")
    text = tmp_path / "latin.txt"
    text.write_bytes("é".encode("latin-1"))
    for path in (packed, parquet, text):
        with pytest.raises(InputError, match=path.name):
            list(read_documents(path))


def test_unreadable_file(tmp_path, monkeypatch):
    path = _write_jsonl(tmp_path / "d.jsonl")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"d\.jsonl cannot be read .*you may read it"):
        list(read_documents(path))


def test_bad_arguments_are_refused_at_once(tmp_path):
    path = _write_jsonl(tmp_path / "d.jsonl")
    (tmp_path / "empty").mkdir()
    for source, options, message in (
        (path, {"format": "jsonlines"}, "unknown format 'jsonlines'.*Did you mean 'jsonl'"),
        (path, {"limit": 0}, "limit is 0"),
        (path, {"split": "train"}, "not a dataset with splits"),
        (tmp_path / "gone.jsonl", {}, "gone.jsonl does not exist"),
        (tmp_path / "empty", {}, "holds no text files"),
        (path, {"format": "dataset"}, "not a directory of a saved dataset"),
    ):
        with pytest.raises(InputError, match=message):
            read_documents(source, **options)


def test_records_are_chosen_skipped_and_limited_in_that_order(tmp_path):
    rows = [{"id": str(i), "text": f"text {i}", "by": "abc"[i % 3], "n": i % 2} for i in range(18)]
    path = _write_jsonl(tmp_path / "d.jsonl", rows)
    counts = ReadCounts()
    found = read_documents(path, where={"by": ["a", "b"], "n": 1}, skip=2, limit=3, counts=counts)
    assert [d.id for d in found] == ["7", "9", "13"]
    assert (counts.documents, counts.left_out) == (3, 14 - 3)
    parts = [{d.id for d in read_documents(path, **part)} for part in ({"limit": 7}, {"skip": 7})]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 18
    with pytest.raises(InputError, match=r"d\.jsonl:1: `where` asks for field 'bye'.*Did you mean 'by'"):
        next(read_documents(path, where={"bye": "a"}))


def test_an_estimate_counts_the_records_that_were_left_out(tmp_path):
    path = _write_jsonl(tmp_path / "d.jsonl", [{"id": str(i), "text": "x" * 50} for i in range(200)])
    counts = ReadCounts()
    list(read_documents(path, skip=60, limit=40, counts=counts))
    assert share_read(path, counts) == pytest.approx(0.5, abs=0.01)
