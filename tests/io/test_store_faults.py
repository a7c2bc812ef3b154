"""A capture killed by SIGKILL at random points goes on to the bytes of an undisturbed one; holes are filled."""

import json
import subprocess
import sys

import numpy as np
import pytest

from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.io.store import Record, RecordReader, RecordWriter, damaged_records, reopen, shard_index
from tests.io import kill_writer
from tests.paths import ROOT

KILLS = 20


def test_sigkill_at_random_points_changes_no_byte(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "tests.io.kill_writer", str(tmp_path), str(KILLS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] == KILLS
    # The kills did hit writers at work: most neither before the first shard nor after the manifest.
    assert len(set(found["shards_left"])) > 3
    assert found["finished"] < KILLS


def test_a_killed_writer_ignores_half_written_files(tmp_path):
    kill_writer.capture(tmp_path / "whole")
    directory = tmp_path / "cut"
    kill_writer.capture(directory)
    reopen(directory, kind="captured", settings={"k": kill_writer.ENTRIES}, parents={}, shard_size=2)
    (directory / "records-00003.array_record").rename(directory / "records-00003.tmp")
    (directory / "records-00007.array_record").unlink()
    kill_writer.capture(directory)
    assert kill_writer.contents(directory) == kill_writer.contents(tmp_path / "whole")


def test_lengths_are_read_without_decoding(tmp_path):
    kill_writer.capture(tmp_path / "a")
    reader = RecordReader(tmp_path / "a")
    expected = [len(document.tokens) for document in kill_writer.documents()]
    np.testing.assert_array_equal(reader.lengths, expected)
    assert reader.manifest.facts["positions"] == sum(expected)
    assert sum(entry.get("records", 0) for entry in reader.manifest.files.values()) == len(expected)
    (tmp_path / "a" / "lengths.npy").unlink()
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    del manifest["files"]["lengths.npy"]  # an artefact of an earlier version
    (tmp_path / "a" / MANIFEST).write_text(json.dumps(manifest))
    np.testing.assert_array_equal(RecordReader(tmp_path / "a").lengths, expected)


def test_shards_keep_their_place(tmp_path):
    writer = RecordWriter(tmp_path / "a", kind="captured", settings={}, shard_size=2)
    writer.seek(1)
    writer.write(Record("c", {}, {"tokens": np.zeros(3, np.int32)}))
    with pytest.raises(ValueError, match="not written yet"):
        writer.seek(0)
    writer.flush()
    assert (writer.has(0), writer.has(1)) == (False, True)
    writer.seek(0)
    for name in "ab":
        writer.write(Record(name, {}, {"tokens": np.zeros(1, np.int32)}))
    writer.finish()
    assert [record.doc_id for record in RecordReader(tmp_path / "a")] == ["a", "b", "c"]
    assert read_manifest(tmp_path / "a").files["records-00000.array_record"]["records"] == 2


def test_damaged_records_are_numbered(tmp_path):
    kill_writer.capture(tmp_path / "a")
    path = tmp_path / "a" / "records-00002.array_record"
    assert shard_index(path.name) == 2
    assert shard_index(MANIFEST) is None
    assert damaged_records(path) == []
    data = bytearray(path.read_bytes())
    data[data.rindex(b"FJR3") + 40] ^= 4
    path.write_bytes(bytes(data))
    assert damaged_records(path) == [1]
    path.write_bytes(b"")
    assert damaged_records(path) is None
