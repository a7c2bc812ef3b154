"""The record store: round trip, resume with the same bytes, and damage that is found and named."""

import os
import shutil

import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.io.manifest import verify_directory
from fusejax.io.store import Record, RecordReader, RecordWriter, pack_record, unpack_record


def _records(count):
    rng = np.random.default_rng(0)
    for i in range(count):
        n = int(rng.integers(0, 9))
        arrays = {
            "tokens": rng.integers(0, 99, n).astype(np.int32),
            "topk_logprobs": rng.normal(size=(n, 3)).astype(np.float16),
            "status": np.ones(n, np.int8),
        }
        yield Record(f"doc/{i}/é", {"n_bytes": n, "nll_nats": 0.5 * i}, arrays)


def _write(directory, records, *, shard_size=4):
    writer = RecordWriter(directory, kind="captured", settings={"k": 3}, parents={"corpus": "x"}, shard_size=shard_size)
    for record in records[writer.resume_at :]:
        writer.write(record)
    return writer.finish(facts={"documents": len(records)})


def _same(a, b):
    assert a.doc_id == b.doc_id
    assert a.header == b.header
    assert a.arrays.keys() == b.arrays.keys()
    for name in a.arrays:
        assert a.arrays[name].dtype == b.arrays[name].dtype
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name])


def test_reads_what_was_written_in_any_order(tmp_path):
    records = list(_records(11))
    _write(tmp_path / "a", records)
    reader = RecordReader(tmp_path / "a", kind="captured")
    assert len(reader) == 11
    for i in (10, 0, 7, 3, 4):
        _same(reader[i], records[i])
    with pytest.raises(IndexError):
        reader[11]


@pytest.mark.parametrize("killed_after", [0, 1, 4, 7, 8, 10])
def test_a_killed_writer_goes_on_with_the_same_bytes(tmp_path, killed_after):
    records = list(_records(11))
    whole = _write(tmp_path / "whole", records)
    writer = RecordWriter(tmp_path / "cut", kind="captured", settings={"k": 3}, parents={"corpus": "x"}, shard_size=4)
    for record in records[:killed_after]:
        writer.write(record)
    del writer  # no finish: as after SIGKILL
    (tmp_path / "cut" / "records-00009.tmp").write_bytes(b"half a shard")
    with pytest.raises(InputError, match="not a finished artefact"):
        RecordReader(tmp_path / "cut")
    again = _write(tmp_path / "cut", records)
    assert again.files == whole.files
    assert again.fingerprint == whole.fingerprint


def test_other_settings_start_afresh(tmp_path):
    records = list(_records(8))
    writer = RecordWriter(tmp_path / "a", kind="captured", settings={"k": 3}, shard_size=4)
    for record in records[:5]:
        writer.write(record)
    again = RecordWriter(tmp_path / "a", kind="captured", settings={"k": 4}, shard_size=4)
    assert again.resume_at == 0
    assert not list((tmp_path / "a").glob("records-*"))


def test_every_flipped_bit_of_a_record_is_found():
    record = next(r for r in _records(9) if len(r.arrays["tokens"]))
    data = pack_record(record)
    _same(unpack_record(data), record)
    rng = np.random.default_rng(1)
    for position in rng.integers(0, len(data) * 8, 64):
        bad = bytearray(data)
        bad[position // 8] ^= 1 << (position % 8)
        with pytest.raises(InputError):
            unpack_record(bytes(bad), where="record 3 of x")


def test_a_flipped_bit_on_disk_is_named(tmp_path):
    records = list(_records(9))
    _write(tmp_path / "a", records)
    assert verify_directory(tmp_path / "a") == []
    shard = tmp_path / "a" / "records-00001.array_record"
    rng = np.random.default_rng(2)
    for position in rng.integers(0, shard.stat().st_size * 8, 20):
        bad = bytearray(shard.read_bytes())
        bad[position // 8] ^= 1 << (position % 8)
        copy = tmp_path / "b"
        shutil.copytree(tmp_path / "a", copy)
        (copy / shard.name).write_bytes(bytes(bad))
        found = verify_directory(copy)
        assert len(found) == 1
        assert shard.name in found[0]
        shutil.rmtree(copy)


def test_a_cut_shard_is_refused_at_once(tmp_path):
    _write(tmp_path / "a", list(_records(9)))
    shard = tmp_path / "a" / "records-00000.array_record"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"records-00000.*make the artefact again"):
        RecordReader(tmp_path / "a")


def test_another_kind_is_refused(tmp_path):
    _write(tmp_path / "a", list(_records(2)))
    with pytest.raises(InputError, match="'captured' artefact, expected 'fused'"):
        RecordReader(tmp_path / "a", kind="fused")


def test_objects_are_refused():
    with pytest.raises(ValueError, match="dtype"):
        pack_record(Record("a", {}, {"x": np.array([object()])}))


def test_more_shards_than_files_that_may_be_open(tmp_path):
    """A million documents make thousands of shards."""
    resource = pytest.importorskip("resource")
    records = list(_records(150))
    _write(tmp_path / "a", records, shard_size=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, used + 100), hard))
    try:
        reader = RecordReader(tmp_path / "a")
        assert [record.doc_id for record in reader] == [record.doc_id for record in records]
        _same(reader[0], records[0])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
