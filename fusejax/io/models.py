"""Opening a model wherever it lies: a Hugging Face directory, a fusejax checkpoint, or a hub name.

A hub name is the only thing here that uses the network, and only because the user wrote it.
"""

__all__ = ["LoadedModel", "cache_dir", "model_fingerprint", "open_config", "open_model", "resolve_model"]

import os
from pathlib import Path
from typing import Any, NamedTuple

from fusejax.errors import InputError
from fusejax.io.checksums import remembered_checksum
from fusejax.io.manifest import MANIFEST, fingerprint_of, read_manifest
from fusejax.io.progress import beat
from fusejax.models.config import ModelConfig

_HUB_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "*.txt")


class LoadedModel(NamedTuple):
    """A model in memory and where it came from."""

    config: ModelConfig
    params: Any  # nested dict of numpy arrays
    directory: Path  # also holds the tokenizer
    fingerprint: str


def resolve_model(model: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """Returns the directory of a model, downloading it (or all but its weights) where `model` is a hub name.

    Raises:
      InputError: no such directory, and no hub name that can be reached.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1 or path.exists():
        raise InputError(f"no model directory at {model}; expected a directory with config.json and safetensors")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # The hub's own cache is made of links that leave the directory, which the importer refuses: plain files instead.
    place = cache_dir() / "hub" / f"{model.replace('/', '--')}@{revision or 'main'}"
    patterns = [pattern for pattern in _HUB_FILES if weights or pattern != "*.safetensors"]
    try:
        how: dict[str, Any] = {"allow_patterns": patterns, "local_dir": str(place), "tqdm_class": _download_bar()}
        return Path(snapshot_download(model, revision=revision, **how))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{model!r} is no directory here, and the hub could not be asked for it ({reason}). "
            "Check the name and the network, or download the model and give its directory"
        ) from error


def _download_bar() -> type:
    """The hub's own bar, which also says that the download gets on."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            beat()
            return super().update(n)

    return Bar


def _is_checkpoint(directory: Path) -> bool:
    return (directory / MANIFEST).is_file() and read_manifest(directory).kind == "model"


def cache_dir() -> Path:
    """Where fusejax keeps what it downloads or trains once: `$XDG_CACHE_HOME/fusejax`, else `~/.cache/fusejax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fusejax"


def model_fingerprint(directory: Path) -> str:
    """Returns a hash of what determines a model: its configuration and weights.

    Large files are read once: `fusejax.io.checksums` says when what is remembered of them is believed.
    """
    if _is_checkpoint(directory):
        return read_manifest(directory).fingerprint
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("config.json"), *directory.glob("tokenizer*")])
    memory = cache_dir() / "checksums"
    return fingerprint_of({path.name: remembered_checksum(path, memory) for path in files if path.is_file()})


def open_config(directory: Path) -> ModelConfig:
    """Reads a model's configuration without touching its weights."""
    from fusejax.io.hf import read_hf_config

    return read_hf_config(directory)


def open_model(directory: Path, *, compute_dtype: str | None = None) -> LoadedModel:
    """Loads configuration and weights of a Hugging Face directory or a fusejax checkpoint.

    Args:
      directory: as returned by `resolve_model`.
      compute_dtype: dtype of activations, in place of the one in the configuration.
    """
    import dataclasses

    directory = Path(directory)
    if _is_checkpoint(directory):
        from fusejax.io.checkpoint import load_model_params

        config, params = open_config(directory), load_model_params(directory)
    else:
        from fusejax.io.hf import load_hf_model

        config, params = load_hf_model(directory)
    if compute_dtype is not None:
        config = dataclasses.replace(config, dtype=compute_dtype)
    return LoadedModel(config, params, directory, model_fingerprint(directory))
