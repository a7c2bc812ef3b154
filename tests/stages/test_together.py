"""What each of several processes does, decided without starting any."""

import pytest

from fusejax.errors import InputError
from fusejax.io.store import Record, RecordWriter
from fusejax.stages import together
from fusejax.stages.together import own_mesh, own_shards, wait_seconds
from fusejax.train.faults import guarded


@pytest.fixture
def process(monkeypatch):
    """Makes this process one of several."""

    def become(index, count):
        monkeypatch.setattr(together, "process_index", lambda: index)
        monkeypatch.setattr(together, "process_count", lambda: count)

    return become


def test_shards_are_divided_without_a_rest_and_without_sharing(process):
    assert own_shards(range(5)) == [0, 1, 2, 3, 4]
    found = []
    for index in range(3):
        process(index, 3)
        found.append(own_shards(range(7)))
    assert found == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.parametrize(
    ("sizes", "count", "own"),
    [
        ((1, 8, 1), 1, (1, 8, 1)),
        ((1, 8, 1), 2, (1, 4, 1)),
        ((2, 4, 1), 2, (1, 4, 1)),
        ((2, 4, 2), 4, (1, 2, 2)),
        ((4, 6, 1), 6, (2, 2, 1)),
        ((1, 1, 1), 4, (1, 1, 1)),
    ],
)
def test_the_mesh_of_one_process_is_its_share_of_rows(process, sizes, count, own):
    process(0, count)
    axes = ("data", "fsdp", "tensor")
    assert own_mesh(dict(zip(axes, sizes, strict=True))) == dict(zip(axes, own, strict=True))


def test_a_mesh_that_processes_cannot_divide_is_refused(process):
    process(0, 4)
    with pytest.raises(InputError, match="data \\* fsdp must be a multiple"):
        own_mesh({"data": 1, "fsdp": 2, "tensor": 4})


def test_the_wait_is_what_the_watchdog_allows_or_what_is_asked_for(monkeypatch):
    monkeypatch.delenv("FUSEJAX_WAIT_SECONDS", raising=False)
    assert wait_seconds() == 3615
    with guarded() as guard, guard.watching(10.0):
        assert wait_seconds() == 45
        with guard.watching(None):
            assert guard.patience is None
        assert wait_seconds() == 45
    monkeypatch.setenv("FUSEJAX_WAIT_SECONDS", "90")
    assert wait_seconds() == 90
    for wrong in ("soon", "0", "-1", "nan"):
        monkeypatch.setenv("FUSEJAX_WAIT_SECONDS", wrong)
        with pytest.raises(InputError, match="FUSEJAX_WAIT_SECONDS"):
            wait_seconds()


def test_a_process_joins_only_the_artefact_that_is_being_made(tmp_path):
    identity = {"kind": "captured", "settings": {"k": 4}, "shard_size": 2}
    first = RecordWriter(tmp_path / "a", **identity)
    (tmp_path / "a" / "half.tmp").write_text("being written by another process")
    joined = RecordWriter(tmp_path / "a", **identity, joining=True)
    assert (tmp_path / "a" / "half.tmp").exists()
    joined.seek(1)
    joined.write(Record("d", {}, {}))
    joined.flush()
    assert first.has(1)
    assert not first.has(0)
    with pytest.raises(InputError, match="other settings or inputs"):
        RecordWriter(tmp_path / "a", **identity | {"settings": {"k": 5}}, joining=True)


def test_shards_that_do_not_appear_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(together, "_VISIBLE_SECONDS", 0.1)
    writer = RecordWriter(tmp_path / "a", kind="captured", settings={}, shard_size=1)
    writer.seek(1)
    writer.write(Record("d", {}, {}))
    with pytest.raises(InputError, match=r"shards \[0, 2\] .* file system that all processes share"):
        together.close_together(writer, 3, facts=lambda _: {})
