"""Remembered checksums: right whatever happens to the file, and read again only where needed."""

import os
import shutil
import time

import pytest

from fusejax.io import checksums
from fusejax.io.checksums import remembered_checksum
from fusejax.io.manifest import file_checksum
from fusejax.io.models import model_fingerprint


@pytest.fixture
def asked(monkeypatch):
    """The files that were read; every size is remembered, and files count as settled at once."""
    read = []

    def checksum(path):
        read.append(path)
        return file_checksum(path)

    monkeypatch.setattr(checksums, "file_checksum", checksum)
    monkeypatch.setattr(checksums, "_LEAST_BYTES", 1)
    monkeypatch.setattr(checksums, "_SETTLED_NS", -1)
    return read


def test_a_file_is_read_once(tmp_path, asked):
    path, memory = tmp_path / "w", tmp_path / "memory"
    path.write_bytes(b"weights")
    found = [remembered_checksum(path, memory) for _ in range(3)]
    assert found == [file_checksum(path)] * 3
    assert asked == [path]


def _same_size_and_times(path):
    before = path.stat()
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _another_file(path):
    other = path.with_name("other")
    other.write_bytes(b"WEIGHTS")
    shutil.copystat(path, other)
    os.replace(other, path)


@pytest.mark.parametrize(
    "change", [_same_size_and_times, _another_file, lambda path: path.write_bytes(b"longer weights")]
)
def test_what_changed_is_read_again(tmp_path, asked, change):
    path, memory = tmp_path / "w", tmp_path / "memory"
    path.write_bytes(b"weights")
    remembered_checksum(path, memory)
    time.sleep(0.02)  # the times of file systems have a grain
    change(path)
    assert remembered_checksum(path, memory) == file_checksum(path)
    assert len(asked) == 2


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"state": 3, "xxh3": "x"}', b"\xff"])
def test_a_damaged_note_is_not_believed(tmp_path, asked, damage):
    path, memory = tmp_path / "w", tmp_path / "memory"
    path.write_bytes(b"weights")
    remembered_checksum(path, memory)
    (note,) = memory.iterdir()
    note.write_bytes(damage)
    assert remembered_checksum(path, memory) == file_checksum(path)
    assert len(asked) == 2


def test_a_file_that_was_just_written_is_not_remembered(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(checksums, "_SETTLED_NS", 10**12)
    path = tmp_path / "w"
    path.write_bytes(b"weights")
    for _ in range(2):
        remembered_checksum(path, tmp_path / "memory")
    assert len(asked) == 2
    assert not (tmp_path / "memory").exists()


def test_a_place_that_cannot_be_written_is_done_without(tmp_path, asked):
    path, memory = tmp_path / "w", tmp_path / "memory"
    path.write_bytes(b"weights")
    memory.write_text("a file, no directory")
    assert remembered_checksum(path, memory) == file_checksum(path)


def test_a_model_is_fingerprinted_from_memory_and_changes_with_its_weights(tmp_path, asked, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    first = model_fingerprint(model)
    assert model_fingerprint(model) == first
    assert len(asked) == 2
    _another_file(model / "model.safetensors")
    assert model_fingerprint(model) != first
