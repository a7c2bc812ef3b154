"""A merged Hugging Face directory turned into a fusejax checkpoint where it lies, leaf by leaf."""

import contextlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.io.checkpoint import save_model
from fusejax.io.hf import _open_files, _Tensors, read_hf_config
from fusejax.io.manifest import write_manifest
from fusejax.models.params import param_table
from fusejax.parallel.paths import unflatten_paths

__all__ = ["convert_in_place"]


def convert_in_place(directory: Path, *, settings: Mapping[str, Any], parents: Mapping[str, str]) -> None:
    """Replaces the safetensors files of a directory by our leaves, and writes its manifest.

    Args:
        directory: a complete Hugging Face model of an architecture that fusejax knows.
        settings, parents: of the manifest.
    """
    config = read_hf_config(directory)
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(_open_files(directory, stack))
        allocate = partial(_mapped, scratch=directory)
        table = param_table(config)
        leaves = {path: tensors.read_leaf(spec, None, allocate=allocate) for path, spec in table.items()}
    inner = directory / ".checkpoint"
    save_model(inner, unflatten_paths(leaves), json.loads((directory / "config.json").read_text(encoding="utf-8")))
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    for path in inner.iterdir():
        os.replace(path, directory / path.name)
    inner.rmdir()
    hidden = {path: path.read_bytes() for path in directory.glob(".*") if path.is_file()}
    for path in hidden:  # the journal is no part of the artefact
        path.unlink()
    write_manifest(directory, kind="model", settings=settings, parents=parents)
    for path, data in hidden.items():
        path.write_bytes(data)


def _mapped(shape: tuple[int, ...], dtype: np.dtype, *, scratch: Path) -> np.ndarray:
    """Returns an array in an unnamed file, so that the model takes no memory of its own."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    with tempfile.TemporaryFile(dir=scratch) as file:
        file.truncate(size)
        mapped = mmap.mmap(file.fileno(), size)
    return np.frombuffer(mapped, dtype).reshape(shape)
