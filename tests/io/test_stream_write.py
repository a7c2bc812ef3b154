"""Files written in pieces are what safetensors writes; a staging directory is renamed whole or kept for later."""

import json
import os

import ml_dtypes
import numpy as np
import pytest
import xxhash

from fusejax.errors import InputError
from fusejax.io.stream_write import TensorWriter, open_staging, staging_of
from tests.stages.merge_toys import read_model

TENSORS = {
    "a": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.arange(7).astype(ml_dtypes.bfloat16),
    "c": np.array(5, np.int64),
    "none": np.zeros((0, 4), np.float16),
}
SPECS = {name: (x.shape, x.dtype.name) for name, x in TENSORS.items()}


def write_all(writer, names=tuple(TENSORS)):
    for name in reversed(names):
        flat = TENSORS[name].reshape(-1)
        half = len(flat) // 2
        writer.write(name, half * flat.itemsize, flat[half:])
        writer.write(name, 0, flat[:half])


@pytest.mark.parametrize("most", [10**9, 50])
def test_safetensors_reads_what_was_written(tmp_path, most):
    writer = TensorWriter(tmp_path, SPECS, max_shard_bytes=most)
    write_all(writer)
    assert writer.checksum("a") == xxhash.xxh3_64(TENSORS["a"].tobytes()).hexdigest()
    writer.finish()
    found = read_model(tmp_path)
    assert set(found) == set(TENSORS)
    for name, expected in TENSORS.items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected)
    index = tmp_path / "model.safetensors.index.json"
    assert index.exists() == (len(writer.files) > 1) == (most == 50)
    if index.exists():
        assert set(json.loads(index.read_text())["weight_map"]) == set(TENSORS)


def test_a_piece_beyond_its_tensor_is_refused(tmp_path):
    writer = TensorWriter(tmp_path, SPECS)
    with pytest.raises(ValueError, match="a has 48 bytes"):
        writer.write("a", 40, np.zeros(4, np.float32))
    writer.close()


def test_a_finished_directory_is_renamed(tmp_path):
    with open_staging(tmp_path / "out", "x") as staging:
        (staging.directory / "file").write_text("done")
        staging.mark("a", xxh3="1")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert not staging_of(tmp_path / "out").exists()


def interrupted(out, identity):
    with pytest.raises(KeyboardInterrupt), open_staging(out, identity) as staging:
        staging.mark("a", xxh3="1", note=[2])
        raise KeyboardInterrupt
    return staging_of(out)


def test_the_same_work_goes_on_after_a_kill(tmp_path):
    directory = interrupted(tmp_path / "out", "x")
    with open(directory / ".journal", "a") as file:
        file.write('{"name": "cut')
    with open_staging(tmp_path / "out", "x") as staging:
        assert staging.finished == {"a": {"xxh3": "1", "note": [2]}}


def test_other_work_starts_anew(tmp_path):
    directory = interrupted(tmp_path / "out", "x")
    (directory / "model.safetensors").write_text("old")
    with open_staging(tmp_path / "out", "y") as staging:
        assert staging.finished == {}
    assert os.listdir(tmp_path / "out") == []


def test_bad_input_leaves_nothing(tmp_path):
    with pytest.raises(InputError), open_staging(tmp_path / "out", "x"):
        raise InputError("no")
    assert os.listdir(tmp_path) == []


def test_a_directory_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "x").write_text("mine")
    with pytest.raises(InputError, match="not an empty directory"), open_staging(tmp_path / "out", "x"):
        pass


def test_two_cannot_write_the_same_output(tmp_path):
    with (
        open_staging(tmp_path / "out", "x"),
        pytest.raises(InputError, match="another merge is writing"),
        open_staging(tmp_path / "out", "x"),
    ):
        pass


def test_no_room_is_an_error_at_once(tmp_path):
    with pytest.raises(OSError):
        TensorWriter(tmp_path, {"w": ((2**50,), "float32")})
