"""Train states and model parameters on disk, by Orbax; the only file that imports it.

Orbax gives atomic commits, resharding on restore and multi-host writing. It was seen to restore a flipped bit as
wrong weights without a word, to cast silently to the dtype it is asked for, and to leave temporary directories
behind. So here every leaf gets a checksum that does not depend on its sharding, saved as JSON in the same commit
and compared on restore; shapes and dtypes are compared before anything is read; leftovers of killed saves are
removed, and named, when the next save begins.

A checksum mixes each element's bits with its index and sums modulo 2^32. The mix is a bijection, so one changed
element always changes the sum. It runs where the array lives; host arrays pass through one device leaf by leaf.

A model directory (`save_model`) is written beside its place and renamed: `params/` (Orbax), `config.json` in the
Hugging Face form, the tokenizer's files and `checksums.json`.

Not done: asynchronous saving (the train step donates its state, so a copy would have to be held meanwhile), and
falling back to an older step by itself: a damaged checkpoint is an error, going back is asked for with `step=`.
"""

import contextlib
import errno
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fusejax.errors import InputError
from fusejax.parallel.paths import unflatten_paths

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import orbax.checkpoint as ocp

__all__ = [
    "all_steps",
    "drop_steps_after",
    "latest_step",
    "load_model_params",
    "remove_orphans",
    "restore_train_state",
    "save_model",
    "save_train_state",
    "tree_checksums",
]

log = logging.getLogger("fusejax")
CHECKSUMS = "checksums.json"
TEMPORARY = ".orbax-checkpoint-tmp"


def save_train_state(
    directory: str | Path, step: int, state: Any, extra: dict[str, Any] | None = None, *, keep: int | None = 2
) -> None:
    """Saves a pytree of arrays as `directory/step`, committed at once or not at all.

    Args:
        directory: holds the steps of one run; made where absent.
        step: number of optimiser steps done; an existing checkpoint of this step is an error.
        state: pytree of jax or numpy arrays, sharded as they are.
        extra: JSON kept in the same commit (data position, versions).
        keep: newest steps that stay; None keeps all.

    Raises:
        InputError: the step exists, or the directory cannot be written.
    """
    directory = Path(directory).absolute()
    if step in all_steps(directory):
        raise InputError(f"{directory} already holds step {step}; resume from it or take another directory.")
    if keep is not None and keep < 1:
        raise InputError(f"keep must be at least 1 checkpoint or None, got {keep}.")
    remove_orphans(directory)
    record = {"leaves": _describe(state), "extra": extra or {}}
    with _quiet(), _writable(directory), _manager(directory, keep=keep) as manager:
        manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)),
        )


def restore_train_state(directory: str | Path, abstract_state: Any, *, step: int | None = None) -> tuple[Any, dict]:
    """Restores a saved state onto the shardings of `abstract_state` and verifies every leaf.

    Args:
        directory: as given to `save_train_state`.
        abstract_state: pytree of `jax.ShapeDtypeStruct`s (with shardings on a mesh) or arrays, like the saved one.
        step: which checkpoint; None takes the newest.

    Returns:
        (state, extra).

    Raises:
        InputError: no such step; leaves, shapes or dtypes that differ (all are listed); damaged leaves (all are named).
    """
    directory = Path(directory).absolute()
    steps = all_steps(directory)
    if not steps or (step is not None and step not in steps):
        raise InputError(f"no checkpoint of step {step if steps else '(any)'} in {directory}; found steps {steps}.")
    step = steps[-1] if step is None else step
    place = directory / str(step)
    with _quiet(), _manager(directory) as manager:
        with _explained(place):
            record = manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        _compare(record["leaves"], abstract_state, place)
        with _explained(place):
            target = jax.tree.map(_abstract, abstract_state)
            state = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
    _verify(record["leaves"], state, place)
    return state, record["extra"]


def all_steps(directory: str | Path) -> list[int]:
    """Returns the committed steps in ascending order, [] where there are none."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(entry.name) for entry in directory.iterdir() if entry.name.isdigit() and entry.is_dir())


def latest_step(directory: str | Path) -> int | None:
    """Returns the newest committed step, or None."""
    steps = all_steps(directory)
    return steps[-1] if steps else None


def drop_steps_after(directory: str | Path, step: int) -> list[int]:
    """Removes the checkpoints of steps beyond `step`, for a run that goes back; returns and logs them."""
    dropped = [found for found in all_steps(directory) if found > step]
    for found in dropped if jax.process_index() == 0 else []:
        log.warning("removing the checkpoint of step %d in %s: the run goes back to step %d", found, directory, step)
        shutil.rmtree(Path(directory) / str(found))
    return dropped


def remove_orphans(directory: str | Path) -> list[Path]:
    """Removes what a killed save left in a checkpoint directory; returns and logs what was removed."""
    directory = Path(directory)
    if not directory.is_dir() or jax.process_index() != 0:
        return []
    orphans = sorted(entry for entry in directory.iterdir() if TEMPORARY in entry.name)
    for orphan in orphans:
        log.warning("removing %s, left by a save that did not finish", orphan)
        shutil.rmtree(orphan, ignore_errors=True)
    return orphans


def save_model(
    directory: str | Path, params: Any, config: dict[str, Any], *, tokenizer_dir: str | Path | None = None
) -> None:
    """Writes a model directory that `load_model_params` reads; replaces an existing one only when complete.

    Args:
        directory: the model directory.
        params: nested dict of arrays.
        config: the Hugging Face config as a dict, written to config.json.
        tokenizer_dir: a folder whose tokenizer files are copied.
    """
    directory = Path(directory).absolute()
    fresh = _fresh(directory)
    first = jax.process_index() == 0
    with _writable(directory):
        if first:
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        _barrier("fusejax_model_begin")
        leaves = _describe(params)
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(fresh / "params", params)
        if first:
            (fresh / CHECKSUMS).write_text(json.dumps({"leaves": leaves}, indent=1) + "\n", encoding="utf-8")
            (fresh / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            for name in _tokenizer_files(tokenizer_dir):
                shutil.copyfile(name, fresh / name.name)
            _replace(fresh, directory)
        _barrier("fusejax_model_end")


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
    target = unflatten_paths({path: jax.ShapeDtypeStruct(e["shape"], _dtype(e["dtype"])) for path, e in leaves.items()})
    if shardings is None:
        # Placed on one device leaf by leaf would need the model to fit there: numpy is asked for instead.
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
    else:
        if jax.tree.structure(shardings) != jax.tree.structure(target):
            raise InputError(f"the shardings name other leaves than the model in {directory}: {sorted(leaves)}.")
        restore_args = jax.tree.map(
            lambda t, s: ocp.ArrayRestoreArgs(sharding=s, global_shape=t.shape, dtype=t.dtype), target, shardings
        )
    with _quiet(), _explained(directory), ocp.PyTreeCheckpointer() as checkpointer:
        params = checkpointer.restore(directory / "params", item=target, restore_args=restore_args)
    _verify(leaves, params, directory)
    return params


def tree_checksums(tree: Any) -> dict[str, str]:
    """Returns {leaf path: 8 hex digits}, the same for every sharding and device count."""
    sums = {path: _leaf_checksum(leaf) for path, leaf in _flatten(tree).items()}
    return {path: f"{int(value):08x}" for path, value in sums.items()}


def _mix(x: jax.Array) -> jax.Array:
    """The finaliser of murmur3: a bijection of uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _leaf_checksum(x: Any) -> jax.Array | int:
    if isinstance(x, jax.Array):
        return _device_checksum(x)
    x = np.asarray(x)
    if x.dtype.itemsize == 8:  # without x64 a device would cut these to 32 bits
        x = np.ascontiguousarray(x).reshape(x.shape or (1,)).view(np.uint32)
    return _device_checksum(jnp.asarray(x))


@jax.jit
def _device_checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(8 * x.dtype.itemsize, 32)}")).astype(jnp.uint32)
    index = jnp.zeros_like(words)
    for axis, size in enumerate(words.shape):
        index = index * np.uint32(size % 2**32) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return jnp.sum(_mix(words ^ _mix(index + np.uint32(1))), dtype=jnp.uint32)


def _describe(tree: Any) -> dict[str, dict[str, Any]]:
    sums = tree_checksums(tree)
    return {
        path: {"shape": list(np.shape(leaf)), "dtype": str(leaf.dtype), "checksum": sums[path]}
        for path, leaf in _flatten(tree).items()
    }


def _flatten(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _dtype(name: str) -> np.dtype:
    return jnp.dtype(name)  # jnp knows bfloat16 by name


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compare(saved: dict[str, dict], expected: Any, place: Path) -> None:
    wanted = _flatten(expected)
    problems = [f"{path}: not in the checkpoint" for path in wanted if path not in saved]
    problems += [f"{path}: in the checkpoint only" for path in saved if path not in wanted]
    for path, leaf in wanted.items():
        entry = saved.get(path)
        if entry and (tuple(entry["shape"]), entry["dtype"]) != (tuple(leaf.shape), str(leaf.dtype)):
            problems.append(f"{path}: saved {entry['dtype']}{entry['shape']}, expected {leaf.dtype}{list(leaf.shape)}")
    if problems:
        raise InputError(
            f"the checkpoint {place} belongs to another model or optimiser:\n  " + "\n  ".join(problems) + "\nUse the "
            "configuration it was written with, or start in a new directory."
        )


def _verify(saved: dict[str, dict], tree: Any, place: Path) -> None:
    found = tree_checksums(tree)
    bad = [path for path, entry in saved.items() if found.get(path) != entry["checksum"]]
    if bad:
        raise InputError(
            f"{place} is damaged: the checksum of {', '.join(bad)} differs from the one saved. Nothing was loaded; "
            "restore the directory from a copy, or ask for an earlier step."
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


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def _manager(directory: Path, *, keep: int | None = None) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=False)
    with _writable(directory):
        return ocp.CheckpointManager(directory, options=options)


@contextlib.contextmanager
def _writable(directory: Path) -> Iterator[None]:
    """Clears a failed write away; InputError where another directory helps, else OSError (a full disk)."""
    try:
        yield
    except (OSError, ValueError) as error:
        # TensorStore gives errors of the operating system as the text of a ValueError.
        told = re.search(r"os_error_code='(\d+)'", str(error))
        code = int(told.group(1)) if told else getattr(error, "errno", None)
        if isinstance(error, InputError) or code is None:
            raise
        remove_orphans(directory)
        shutil.rmtree(_fresh(directory), ignore_errors=True)
        if code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR):
            text = f"cannot write {directory}: {os.strerror(code)}. Choose a directory that can be written."
            raise InputError(text) from error
        text = f"cannot write {directory}: {os.strerror(code)}. What was there before is intact; make room and go on"
        raise OSError(code, text) from error


@contextlib.contextmanager
def _explained(place: Path) -> Iterator[None]:
    """Orbax reports a missing file in 30 kB of TensorStore text that does not name the cause."""
    try:
        yield
    except (InputError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # too little memory is not a damaged file
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:300]
        raise InputError(
            f"{place} cannot be read: {type(error).__name__}: {reason}. Files are missing or damaged; restore the "
            "directory from a copy, or ask for an earlier step."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's and absl's notes from the user's terminal while it runs, and puts the levels back."""
    loggers = [logging.getLogger(name) for name in ("absl", "orbax")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
