"""Parquet both ways: what was exported is read back, foreign files are completed or refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fusejax.data.interchange import export_parquet, read_parquet
from fusejax.data.tokenizer_training import train_tokenizer
from fusejax.errors import InputError
from fusejax.io.store import Record, RecordReader, RecordWriter
from fusejax.io.tokenizers import load_tokenizer


def _records(count=7, entries=3, vocab=9):
    rng = np.random.default_rng(0)
    for number in range(count):
        n = int(rng.integers(0, 8)) if number else 0
        logprobs = np.log(rng.dirichlet(np.ones(vocab), n))
        order = np.argsort(-logprobs, axis=1) if n else np.zeros((0, vocab), int)
        ranked = np.take_along_axis(logprobs, order, 1)
        labels = rng.integers(0, vocab, n).astype(np.int32)
        arrays = {
            "tokens": np.concatenate([[1], labels])[:n].astype(np.int32),
            "labels": labels,
            "byte_ends": np.arange(n, dtype=np.int32),
            "topk_ids": order[:, :entries].astype(np.int32),
            "topk_logprobs": ranked[:, :entries].astype(np.float32),
            "residual_logprob": np.log(np.exp(ranked[:, entries:]).sum(1)).astype(np.float32),
            "realised_logprob": logprobs[np.arange(n), labels].astype(np.float32),
        }
        yield Record(f"d/{number}", {"n_bytes": n}, arrays)


def _table(path, **columns):
    pq.write_table(pa.table(columns), path)
    return path


def test_what_is_exported_is_read_back(tmp_path):
    writer = RecordWriter(tmp_path / "a", kind="captured", settings={}, shard_size=3)
    for record in _records():
        writer.write(record)
    writer.finish()
    assert export_parquet(RecordReader(tmp_path / "a"), tmp_path / "a.parquet", rows_per_group=2) == 7
    for record, again in zip(_records(), read_parquet(tmp_path / "a.parquet"), strict=True):
        assert again.doc_id == record.doc_id
        for name, array in record.arrays.items():
            assert again.arrays[name].dtype == array.dtype
            if array.size:
                np.testing.assert_array_equal(again.arrays[name], array)
    table = pq.read_table(tmp_path / "a.parquet")  # as anybody would read it
    assert table.schema.field("topk_ids").type == pa.list_(pa.list_(pa.int32()))


def test_three_axes_are_three_levels(tmp_path):
    ids = np.arange(24, dtype=np.int32).reshape(4, 2, 3)
    record = Record("x", {}, {"ids": ids, "weights": np.ones((4, 2), np.float32)})
    export_parquet([record, record], tmp_path / "f.parquet")
    assert pq.read_table(tmp_path / "f.parquet")["ids"].to_pylist() == [ids.tolist()] * 2


def test_a_foreign_file_is_completed(tmp_path):
    tokenizer_dir = tmp_path / "tokenizer"
    train_tokenizer(["one two three four"] * 9, kind="byte_bpe", vocab_size=270, out_dir=tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    encoded = tokenizer.encode("one two four", end=False)
    whole = [*encoded.tokens.tolist(), int(encoded.labels[-1])]
    n = len(encoded.labels)
    path = _table(
        tmp_path / "f.parquet",
        text=["one two four"],
        input_ids=[whole],
        top_ids=[[[5, int(label)] for label in encoded.labels] + [[1]]],
        top_logprobs=[[[-3.0, -0.5]] * n + [[-0.1]]],
    )
    columns = {"tokens": "input_ids", "topk_ids": "top_ids", "topk_logprobs": "top_logprobs"}
    (record,) = read_parquet(path, columns=columns, tokenizer=tokenizer)
    np.testing.assert_array_equal(record.arrays["labels"], encoded.labels)
    np.testing.assert_array_equal(record.arrays["byte_ends"], encoded.byte_ends)
    np.testing.assert_array_equal(record.arrays["topk_ids"][:, 0], encoded.labels)
    np.testing.assert_allclose(record.arrays["realised_logprob"], -0.5)
    np.testing.assert_allclose(record.arrays["residual_logprob"], np.log(1 - np.exp(-3) - np.exp(-0.5)), rtol=1e-5)
    assert record.header == {"n_bytes": 12, "nll_nats": 0.5 * n}
    with pytest.raises(InputError, match="no column byte_ends"):
        list(read_parquet(path, columns=columns))
    other = _table(tmp_path / "g.parquet", **pq.read_table(path).to_pydict() | {"text": ["one three"]})
    with pytest.raises(InputError, match="other tokens"):
        list(read_parquet(other, columns=columns, tokenizer=tokenizer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_logprobs": [[[3.0], [2.0]]]}, "not logits"),
        ({"topk_ids": [[[1]]], "topk_logprobs": [[[-1.0]]]}, "2 positions"),
        ({"topk_ids": [[[7], [7]]]}, "not among the entries"),
        ({"byte_ends": [[1]]}, "byte_ends should have 2 values"),
        ({"topk_ids": [[[1], None]]}, "null"),
    ],
)
def test_what_cannot_be_right_is_refused(tmp_path, change, message):
    good = {
        "tokens": [[0, 1, 2]], "byte_ends": [[0, 1]], "topk_ids": [[[1], [2]]], "topk_logprobs": [[[-1.0], [-1.0]]],
    }  # fmt: skip
    assert len(list(read_parquet(_table(tmp_path / "good.parquet", **good)))) == 1
    with pytest.raises(InputError, match=message):
        list(read_parquet(_table(tmp_path / "bad.parquet", **(good | change))))


def test_unknown_columns_and_no_records(tmp_path):
    with pytest.raises(InputError, match="known: doc_id"):
        list(read_parquet(tmp_path / "x.parquet", columns={"logits": "x"}))
    with pytest.raises(InputError, match="no records"):
        export_parquet([], tmp_path / "x.parquet")
