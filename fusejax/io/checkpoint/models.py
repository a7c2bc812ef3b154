"""A model directory: `params/` (Orbax), `config.json` in the Hugging Face form, the tokenizer, `checksums.json`.

It is written beside its place and renamed, so that it is there whole or not at all.
"""

import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import InputError
from fusejax.io.checkpoint.checksums import CHECKSUMS, describe, verify
from fusejax.io.checkpoint.guards import explained, quiet, writable
from fusejax.parallel.paths import unflatten_paths
from fusejax.parallel.processes import process_count, process_index

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import orbax.checkpoint as ocp

__all__ = ["load_model_params", "save_model"]

_DATA_FILE_BYTES = 32 << 20
_CHUNK_BYTES = 8 << 20  # what is compressed at once, and can be read alone


def save_model(
    directory: str | Path, params: Any, config: dict[str, Any], *, tokenizer_dir: str | Path | None = None
) -> None:
    """Writes a model directory that `load_model_params` reads; replaces an existing one only when complete.

    One process writes it, and waits for no other: of several, the one that has the parameters.

    Args:
        directory: the model directory.
        params: nested dict of arrays that this process holds whole.
        config: the Hugging Face config as a dict, written to config.json.
        tokenizer_dir: a folder whose tokenizer files are copied.
    """
    directory = Path(directory).absolute()
    fresh = _fresh(directory)
    with writable(directory, clear=lambda: shutil.rmtree(fresh, ignore_errors=True)):
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        leaves = describe(params)
        _write(fresh / "params", params)
        (fresh / CHECKSUMS).write_text(json.dumps({"leaves": leaves}, indent=1) + "\n", encoding="utf-8")
        (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in _tokenizer_files(tokenizer_dir):
            shutil.copyfile(name, fresh / name.name)
        _replace(fresh, directory)


def load_model_params(directory: str | Path, *, shardings: Any | None = None) -> Any:
    """Reads a model directory written by `save_model` and verifies every leaf.

    Args:
        directory: the model directory.
        shardings: nested dict of shardings like the params; None gives numpy arrays.

    Returns:
        The params as a nested dict; config.json beside them is read by `fusejax.io.hf.read_hf_config`.

    Raises:
        InputError: not such a directory, shardings for other leaves, or damaged leaves (all are named).
    """
    directory = Path(directory).absolute()
    leaves = _read_json(directory / CHECKSUMS)["leaves"]
    # jnp knows bfloat16 by name
    shapes = {path: jax.ShapeDtypeStruct(e["shape"], jnp.dtype(e["dtype"])) for path, e in leaves.items()}
    target = unflatten_paths(shapes)
    if shardings is None:
        # Placed on one device leaf by leaf would need the model to fit there: numpy is asked for instead.
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    else:
        if jax.tree.structure(shardings) != jax.tree.structure(target):
            raise InputError(f"the shardings name other leaves than the model in {directory}: {sorted(leaves)}.")
        restore_args = jax.tree.map(
            lambda t, s: ocp.ArrayRestoreArgs(sharding=s, global_shape=t.shape, dtype=t.dtype), target, shardings
        )
    alone = _alone()
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with (
        quiet(),
        explained(directory),
        ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
    ):
        params = checkpointer.restore(directory / "params", item=target, restore_args=restore_args)
    verify(leaves, params, directory)
    return params


def _write(place: Path, params: Any) -> None:
    """Writes the leaves; arrays of the host are neither copied nor held until the last one is written.

    They may be mapped files, and larger together than the memory. What Orbax has compressed it holds until a data file
    is full: files of the usual two gigabytes would hold the whole of most models.
    """
    options = _alone()
    if not all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params)):
        with quiet(), ocp.StandardCheckpointer(multiprocessing_options=options) as checkpointer:
            checkpointer.save(place, params)
        return
    numpy = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, numpy))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry, multiprocessing_options=options)
    chunked = jax.tree_util.tree_map_with_path(_chunked, params)
    saved = ocp.args.PyTreeSave(params, save_args=chunked, ocdbt_target_data_file_size=_DATA_FILE_BYTES)
    with quiet(), ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        checkpointer.save(place, args=saved)


def _chunked(path: Any, _: np.ndarray) -> ocp.SaveArgs:
    """How a leaf is cut: those of layers into layers first, so that a layer can be read alone."""
    stacked = jax.tree_util.keystr(path[:1], simple=True) == "layers"
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if stacked else ())


def _alone() -> ocp.options.MultiprocessingOptions:
    """Orbax synchronises all processes unless it is told who takes part."""
    if process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} is not a fusejax model directory: it has no {path.name}.") from error
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); write the model again.") from error


def _tokenizer_files(directory: str | Path | None) -> list[Path]:
    if directory is None:
        return []
    names = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", "generation_config")
    found = [p for p in sorted(Path(directory).iterdir()) if p.is_file() and p.name.startswith(names)]
    if not found:
        raise InputError(f"{directory} holds no tokenizer file (tokenizer.json or tokenizer.model is expected).")
    return [p for p in found if p.suffix in (".json", ".model", ".txt", ".jinja")]


def _fresh(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.tmp")


def _replace(fresh: Path, directory: Path) -> None:
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        os.replace(directory, old)
    os.replace(fresh, directory)
    shutil.rmtree(old, ignore_errors=True)
