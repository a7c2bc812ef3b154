"""Manifests and atomic directories."""

import json

import pytest

from fusejax.errors import InputError
from fusejax.io.manifest import (
    MANIFEST,
    atomic_directory,
    fingerprint_of,
    read_manifest,
    verify_directory,
    write_json,
    write_manifest,
)


def test_fingerprint_ignores_the_order_of_keys_and_nothing_else():
    assert fingerprint_of({"a": 1, "b": [2]}) == fingerprint_of({"b": [2], "a": 1})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": 2})
    assert fingerprint_of({"a": 1}) != fingerprint_of({"a": "1"})


def test_facts_do_not_change_the_fingerprint(tmp_path):
    (tmp_path / "x").mkdir()
    first = write_manifest(tmp_path / "x", kind="corpus", settings={"a": 1}, facts={"seconds": 1.0})
    second = write_manifest(tmp_path / "x", kind="corpus", settings={"a": 1}, facts={"seconds": 2.0})
    third = write_manifest(tmp_path / "x", kind="corpus", settings={"a": 1}, parents={"p": "q"})
    assert first.fingerprint == second.fingerprint != third.fingerprint


def test_verify_names_what_is_missing_cut_or_changed(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).write_text("hello")
    write_manifest(tmp_path, kind="corpus", settings={})
    assert verify_directory(tmp_path) == []
    (tmp_path / "a").unlink()
    (tmp_path / "b").write_text("hell")
    (tmp_path / "c").write_text("hullo")
    bad = verify_directory(tmp_path)
    assert [("missing" in b, "bytes" in b, "checksum" in b) for b in bad] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]


def test_an_edited_manifest_is_found(tmp_path):
    write_manifest(tmp_path, kind="corpus", settings={"a": 1})
    data = json.loads((tmp_path / MANIFEST).read_text())
    data["settings"]["a"] = 2
    (tmp_path / MANIFEST).write_text(json.dumps(data))
    assert "do not belong" in verify_directory(tmp_path)[0]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": 1}'])
def test_a_broken_manifest_says_what_to_do(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(InputError, match="make it again"):
        read_manifest(tmp_path)


def test_a_newer_schema_is_refused(tmp_path):
    write_manifest(tmp_path, kind="corpus", settings={})
    data = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(data | {"schema": 99}))
    with pytest.raises(InputError, match="schema 99"):
        read_manifest(tmp_path)


def test_a_failed_block_leaves_the_old_directory(tmp_path):
    final = tmp_path / "d"
    final.mkdir()
    (final / "old").write_text("kept")
    with pytest.raises(RuntimeError), atomic_directory(final) as temporary:
        (temporary / "new").write_text("half")
        raise RuntimeError
    assert [path.name for path in final.iterdir()] == ["old"]
    with atomic_directory(final) as temporary:
        (temporary / "new").write_text("whole")
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_json_is_written_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", _circular())
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def _circular():
    value: dict = {}
    value["self"] = value
    return value
