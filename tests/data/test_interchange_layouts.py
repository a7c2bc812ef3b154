"""Layouts of other projects: what we write comes back, what they write is read, and anything else is refused."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.data.interchange_example import decode_example, encode_example
from fusejax.data.interchange_layouts import (
    Compression,
    export_distillkit,
    export_maxtext,
    read_distillkit,
    read_maxtext,
)
from fusejax.errors import InputError
from fusejax.io.array_records import write_array_record
from fusejax.io.store import Record

VOCAB, K = 300, 5


def _record(number: int, length: int) -> Record:
    rng = np.random.default_rng(number)
    logits = rng.normal(size=(length, VOCAB)) * 3
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-logprobs, axis=1)[:, :K]
    tokens = rng.integers(0, VOCAB, length + 1).astype(np.int32)
    arrays = {
        "tokens": tokens[:-1],
        "labels": tokens[1:],
        "topk_ids": order.astype(np.int32),
        "topk_logprobs": np.take_along_axis(logprobs, order, 1).astype(np.float32),
    }
    return Record(f"d{number}", {"n_bytes": 3 * length}, arrays)


RECORDS = [_record(number, length) for number, length in enumerate((7, 1, 19))]


def _example_class():
    """tf.train.Example of the protobuf library, from its published definition."""
    file = descriptor_pb2.FileDescriptorProto(name="e.proto", package="t", syntax="proto3")
    float_list, int_list = file.message_type.add(name="FloatList"), file.message_type.add(name="Int64List")
    float_list.field.add(name="value", number=1, label=3, type=2)
    int_list.field.add(name="value", number=1, label=3, type=3)
    feature = file.message_type.add(name="Feature")
    feature.field.add(name="float_list", number=2, label=1, type=11, type_name=".t.FloatList")
    feature.field.add(name="int64_list", number=3, label=1, type=11, type_name=".t.Int64List")
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=9)
    entry.field.add(name="value", number=2, label=1, type=11, type_name=".t.Feature")
    features.field.add(name="feature", number=1, label=3, type=11, type_name=".t.Features.FeatureEntry")
    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, label=1, type=11, type_name=".t.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def test_examples_are_those_of_protobuf():
    values = np.array([0, 1, 127, 128, 300, 2**40, -1, 2**63 - 1], np.int64)
    ours = encode_example({"b": values, "a": np.array([1.5, -2.0], np.float32), "none": np.zeros(0, np.int64)})
    made = _example_class()()
    made.ParseFromString(ours)
    assert list(made.features.feature["b"].int64_list.value) == values.tolist()
    assert list(made.features.feature["a"].float_list.value) == [1.5, -2.0]
    theirs = _example_class()()
    theirs.features.feature["x"].int64_list.value.extend([5, -7, 1 << 35])
    theirs.features.feature["y"].float_list.value.extend([0.25])
    found = decode_example(theirs.SerializeToString())
    assert found["x"].tolist() == [5, -7, 1 << 35] and found["y"].tolist() == [0.25]


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=60))
def test_other_bytes_are_no_example(data):
    try:
        assert isinstance(decode_example(data), dict)
    except InputError as error:
        assert "tf.train.Example" in str(error)


def test_maxtext_records_come_back(tmp_path):
    path = tmp_path / "teacher_top_k_part_00000_host_000.array_record"
    assert export_maxtext(RECORDS, path) == len(RECORDS)
    for place in (path, tmp_path):
        for record, found in zip(RECORDS, read_maxtext(place, normalized=True), strict=True):
            np.testing.assert_array_equal(found.tokens, np.append(record.arrays["tokens"], record.arrays["labels"][-1]))
            np.testing.assert_array_equal(found.ids, record.arrays["topk_ids"])
            np.testing.assert_array_equal(found.logprobs, record.arrays["topk_logprobs"])


def test_maxtext_logits_are_normalised_over_the_entries_and_padding_is_left_out(tmp_path):
    logits = np.array([[9.0, 7.0], [3.0, 1.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
    features = {"inputs": [4, 5, 0, 0], "top_k_logits": logits, "top_k_indices": [1, 2, 3, 4, 0, 0, 0, 0]}
    more = {"inputs_segmentation": [1, 1, 0, 0], "targets": [5, 6, 0, 0]}
    data = encode_example({k: np.asarray(v) for k, v in (features | more).items()})
    write_array_record([data], tmp_path / "x.array_record")
    (found,) = read_maxtext(tmp_path, normalized=False)
    assert found.tokens.tolist() == [4, 5, 6] and found.ids.tolist() == [[1, 2], [3, 4]]
    np.testing.assert_allclose(np.exp(found.logprobs).sum(axis=1), 1, rtol=1e-6)
    packed = encode_example({k: np.asarray(v) for k, v in (features | {"inputs_segmentation": [1, 1, 2, 2]}).items()})
    short = encode_example({k: np.asarray(v) for k, v in (features | {"top_k_indices": [1]}).items()})
    other = encode_example({"tokens": np.arange(3)})
    for bad, said in ((packed, "packs several"), (short, "T \\* K"), (other, "has no inputs, top_k_logits")):
        write_array_record([bad], tmp_path / "x.array_record")
        with pytest.raises(InputError, match=said):
            list(read_maxtext(tmp_path, normalized=False))
    (tmp_path / "x.array_record").write_bytes(b"nothing of the kind")
    with pytest.raises(InputError, match="array_record"):
        list(read_maxtext(tmp_path, normalized=False))


@pytest.mark.parametrize("vocab_size", [None, VOCAB, 256 * 1024])
def test_distillkit_rows_come_back(tmp_path, vocab_size):
    settings_ = export_distillkit(RECORDS, tmp_path / "x.parquet", vocab_size=vocab_size)
    compression = None if settings_ is None else Compression(**settings_)
    for record, found in zip(RECORDS, read_distillkit(tmp_path, compression=compression), strict=True):
        np.testing.assert_array_equal(found.ids, record.arrays["topk_ids"])
        np.testing.assert_allclose(found.logprobs, record.arrays["topk_logprobs"], rtol=1e-6)
        assert len(found.tokens) == len(record.arrays["tokens"]) + 1


def test_distillkit_polynomials_and_bins_are_read(tmp_path):
    """One position written by hand: delta encoding, one exact value, a line, and a bin of two 4-bit residuals."""
    exact = np.array([-0.5], "<f2").tobytes()
    line = np.array([-1.0, -0.25], "<f4").tobytes()  # -1 - t / 4 at t = 0, 1, 2
    scale = np.array([0.5], "<f4").tobytes()
    data = list(exact + line + scale + bytes([(8 + 1) << 4 | (8 - 2)]))
    columns = {
        "input_ids": pa.array([[1, 2]], pa.list_(pa.uint64())),
        "compressed_logprobs": pa.array([[data]], pa.list_(pa.list_(pa.uint8()))),
        "bytepacked_indices": pa.array([[[0b00110101, 0b11100010]]], pa.list_(pa.list_(pa.uint8()))),
    }
    pq.write_table(pa.table(columns), tmp_path / "x.parquet")
    entry = {"scale_dtype": "float32", "element_bits": 4, "num_elements": 2}
    terms = {"polynomial_terms": [0, 1], "residual_bins": [entry]}
    given_ = Compression(d=16, k=4, exact_k=1, exact_dtype="float16", **terms)
    (found,) = read_distillkit(tmp_path, compression=given_)
    assert found.ids.tolist() == [[3, 5, 14, 2]]
    deltas = [-0.5, -1 + 0.5, -1.25 - 1.0, -1.5]
    np.testing.assert_allclose(found.logprobs[0], np.cumsum(deltas), rtol=1e-6)
    with pytest.raises(InputError, match="bytes of log-probabilities, the compression says"):
        list(read_distillkit(tmp_path, compression=given_._replace(residual_bins=[])))
    with pytest.raises(InputError, match=r"no column token_ids, top_values.*Give the compression"):
        list(read_distillkit(tmp_path))
