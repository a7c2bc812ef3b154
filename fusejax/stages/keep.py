"""Keeping a model as a fusejax checkpoint: weights, configuration, tokenizer and manifest, all or nothing."""

__all__ = ["keep_model"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusejax.io.checkpoint import save_model
from fusejax.io.manifest import Manifest, atomic_directory, write_manifest
from fusejax.models import ModelConfig, model_config_to_hf


def keep_model(
    directory: Path,
    config: ModelConfig,
    params: Any,
    *,
    tokenizer_dir: Path,
    settings: Mapping[str, Any],
    parents: Mapping[str, str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Writes a model directory (artefact A6/A7) that `open_model` reads.

    Args:
      directory: its final place; an older artefact there is replaced at the end.
      config: the architecture.
      params: nested dict of arrays.
      tokenizer_dir: where the tokenizer's files are copied from.
      settings: what determines the weights, for the fingerprint.
      parents: fingerprints of the artefacts that it was made from.
      facts: counts and measurements.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    with atomic_directory(directory) as temporary:
        inner = temporary / "model"
        save_model(inner, params, model_config_to_hf(config), tokenizer_dir=tokenizer_dir)
        for path in sorted(inner.iterdir()):
            path.rename(temporary / path.name)
        inner.rmdir()
        return write_manifest(temporary, kind="model", settings=settings, parents=parents, facts=facts)
