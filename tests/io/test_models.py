"""Finding a model: directories, hub names, and what is neither."""

from pathlib import Path

import huggingface_hub
import pytest

from fusejax.errors import InputError
from fusejax.io.models import cache_dir, resolve_model
from fusejax.io.progress import last_beat


def test_a_directory_is_itself(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["./a/b", "/no/such", "~/no-such-model", "plain", "a/b/c"])
def test_what_is_neither_directory_nor_hub_name(name):
    with pytest.raises(InputError, match="no model directory"):
        resolve_model(name)


def test_a_hub_name_becomes_plain_files(monkeypatch, tmp_path):
    """The hub's cache is links out of the directory, which the importer refuses."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = {}

    def download(name, *, revision, allow_patterns, local_dir, tqdm_class):
        before = last_beat()
        tqdm_class(total=2, disable=True).update(1)
        assert last_beat() > before
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        Path(local_dir).mkdir(parents=True)
        (Path(local_dir) / "config.json").write_text("{}")
        return local_dir

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = resolve_model("org/name", revision="abc")
    assert found.is_relative_to(cache_dir())
    assert not any(path.is_symlink() for path in found.rglob("*"))
    assert (asked["name"], asked["revision"]) == ("org/name", "abc")
    assert not any("bin" in pattern or "pt" in pattern.split(".")[-1] for pattern in asked["patterns"])


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    def fail(*_, **__):
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match="give its directory"):
        resolve_model("org/name")
