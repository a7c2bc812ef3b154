"""Pieces of tensors are the bytes that safetensors reads, from either kind of model; bad headers are refused."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from fusejax.errors import InputError
from fusejax.io.checkpoint import save_model
from fusejax.io.hf import load_hf_model
from fusejax.io.stream_read import ArrayTensor, dtype_code, dtype_of, equal_tensors, open_tensors, read_header
from tests.stages.merge_toys import CONFIG, read_model, write_family, write_model


def piece(tensor, start, count):
    out = np.empty(count, dtype_of(tensor.dtype))
    tensor.load().read_into(start, out.view(np.uint8))
    return out


def test_pieces_are_the_stored_bytes(tmp_path):
    directory = write_family(tmp_path, 1, shards=3)[0]
    stored = read_model(directory)
    with open_tensors(directory) as opened:
        assert set(opened.tensors) == set(stored)
        for name, tensor in opened.tensors.items():
            assert (tensor.shape, tensor.dtype) == (stored[name].shape, "bfloat16")
            flat = stored[name].reshape(-1).view(np.uint16)
            np.testing.assert_array_equal(piece(tensor, 0, flat.size).view(np.uint16), flat)
            np.testing.assert_array_equal(piece(tensor, 5, 7).view(np.uint16), flat[5:12])


def test_a_checkpoint_reads_like_the_directory_it_came_from(tmp_path):
    directory = write_family(tmp_path, 1)[0]
    _, params = load_hf_model(directory)
    save_model(tmp_path / "ckpt", params, CONFIG)
    with open_tensors(directory) as hf, open_tensors(tmp_path / "ckpt", scratch=tmp_path) as checkpoint:
        assert set(hf.tensors) == set(checkpoint.tensors)
        assert equal_tensors(hf, checkpoint)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "t1", "ckpt"}  # nothing is left of the unpacking


def test_a_damaged_checkpoint_is_refused(tmp_path):
    _, params = load_hf_model(write_family(tmp_path, 1)[0])
    save_model(tmp_path / "ckpt", params, CONFIG)
    path = tmp_path / "ckpt" / "checksums.json"
    record = json.loads(path.read_text())
    record["leaves"]["final_norm.scale"]["checksum"] = "00000000"
    path.write_text(json.dumps(record))
    with open_tensors(tmp_path / "ckpt") as opened, pytest.raises(InputError, match=r"final_norm\.scale is damaged"):
        opened.tensors["model.norm.weight"].load()


def test_models_are_compared_bit_by_bit(tmp_path):
    tensors = {"w": np.zeros((300, 1000), np.float32)}
    one, same = (write_model(tmp_path / name, tensors) for name in ("one", "same"))
    tensors["w"][-1, -1] = -0.0
    other = write_model(tmp_path / "other", tensors)
    with open_tensors(one) as a, open_tensors(same) as b, open_tensors(other) as c:
        assert equal_tensors(a, b)
        assert not equal_tensors(a, c)


def test_the_identity_changes_with_the_files(tmp_path):
    directory = write_model(tmp_path / "m", {"w": np.zeros(4, np.float32)})
    with open_tensors(directory) as opened:
        before = opened.identity
    save_file({"w": np.ones(5, np.float32)}, directory / "model.safetensors")
    with open_tensors(directory) as opened:
        assert opened.identity != before


def header(path, entries, data=b"", length=None):
    text = json.dumps(entries).encode() if not isinstance(entries, bytes) else entries
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entries", "data", "length", "told"),
    [
        ({"w": ENTRY}, bytes(8), 10**12, "truncated or no safetensors"),
        (b"{]", b"", None, "no valid header"),
        (b"[]", b"", None, "no mapping"),
        ({"w": ENTRY}, bytes(4), None, "its header describes"),
        ({"w": ENTRY}, bytes(12), None, "its header describes"),
        ({"w": ENTRY | {"dtype": "Q4"}}, bytes(8), None, "damaged or of an unknown dtype"),
        ({"w": ENTRY | {"shape": [-2]}}, bytes(8), None, "damaged"),
        ({"w": {"dtype": "F32"}}, bytes(8), None, "damaged"),
        ({"w": ENTRY | {"shape": [3]}}, bytes(8), None, "expected 0 to 12"),
        ({"w": ENTRY, "v": ENTRY}, bytes(8), None, "lies at bytes 0 to 8, expected 8"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entries, data, length, told):
    with pytest.raises(InputError, match=told):
        read_header(header(tmp_path / "x.safetensors", entries, data, length))


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    directory = write_model(tmp_path / "m", {"w": np.zeros(4, np.float32)})
    with open_tensors(directory) as opened:
        (directory / "model.safetensors").write_bytes(b"")
        with pytest.raises(InputError, match="ended while it was read"):
            piece(opened.tensors["w"], 0, 4)


def test_not_a_model(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(InputError, match="pickled weights"):
        open_tensors(tmp_path)


def test_dtypes_have_codes():
    assert dtype_code("bfloat16") == "BF16"
    assert dtype_of("bfloat16") == ml_dtypes.bfloat16
    with pytest.raises(InputError, match="no dtype complex64"):
        dtype_code("complex64")
    assert ArrayTensor(np.zeros((2, 3), np.float16), "memory").dtype == "float16"
