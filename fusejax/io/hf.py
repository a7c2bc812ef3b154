"""Hugging Face model directories: read into our parameter tree, and written from it, bit for bit.

Reading trusts nothing: every file must lie in the directory itself (no `../`, no absolute path, no link out
of it), pickles are refused, and tensors are checked against the parameter table before and after reading.
All problems are collected and raised once. Tensors are read one at a time from the memory-mapped file, so
that the peak is the model plus one tensor.

Writing makes a temporary directory beside the target and renames it, so that a target is complete or
absent. The config carries the rotary embedding and the dtype in the forms of transformers 4 and 5.

Not here: downloads, remote code, quantised weights, conversion of pickles.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fusejax.errors import InputError
from fusejax.io.progress import beat
from fusejax.models.config import ModelConfig
from fusejax.models.hf_config import model_config_from_hf, model_config_to_hf
from fusejax.models.hf_names import hf_names
from fusejax.models.params import ParamSpec, check_params, param_table
from fusejax.parallel.paths import flatten_paths, unflatten_paths

__all__ = ["TOKENIZER_FILES", "load_hf_model", "read_hf_config", "save_hf_model"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "LICENSE",
)
_DTYPES: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_DTYPE_NAMES = ("float32", "float16", "bfloat16")
_MAX_JSON_BYTES = 200 * 2**20
# buffers that old exports carry and that follow from the config (GPT-NeoX: its causal mask)
_IGNORED = ("rotary_emb.inv_freq", "attention.masked_bias", ".attention.bias")


def read_hf_config(directory: str | os.PathLike[str]) -> ModelConfig:
    """Returns the architecture that `config.json` of a model directory describes.

    Raises:
        InputError: no such directory or file, broken JSON, or an unsupported model; names the file.
    """
    path = _inside(_directory(directory), "config.json")
    try:
        return model_config_from_hf(_read_json(path))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def load_hf_model(directory: str | os.PathLike[str], *, dtype: str | None = None) -> tuple[ModelConfig, dict[str, Any]]:
    """Returns the config of a Hugging Face model directory and its parameters as numpy arrays.

    Args:
        directory: holds `config.json` and `model.safetensors`, or shards and their index.
        dtype: convert the weights to "float32", "float16" or "bfloat16", and compute in it (float32 for
            float16); None keeps the weights as stored.

    Raises:
        InputError: missing, unexpected, misshapen, truncated or non-finite tensors (all of them, with the
            file), pickled weights, paths out of the directory, an unsupported config.
    """
    if dtype is not None and dtype not in _DTYPE_NAMES:
        raise InputError(f"unknown dtype {dtype!r}; known are {', '.join(_DTYPE_NAMES)}")
    root = _directory(directory)
    cfg = read_hf_config(root)
    if dtype is not None:
        cfg = replace(cfg, dtype="bfloat16" if dtype == "bfloat16" else "float32")
    table = param_table(cfg)
    with contextlib.ExitStack() as stack:
        tensors = _Tensors(_open_files(root, stack))
        problems = tensors.compare(table, cfg)
        if problems:
            raise InputError(f"the weights in {root} do not fit its config.json:\n  " + "\n  ".join(problems))
        leaves = {path: tensors.read_leaf(spec, _DTYPE_OF.get(dtype)) for path, spec in table.items()}
        tensors.check_tied_head(cfg)
    if tensors.not_finite:
        raise InputError(
            f"weights in {root} hold NaN or infinity:\n  " + "\n  ".join(tensors.not_finite) + "\n"
            "the checkpoint is damaged or its training diverged; use an earlier one"
        )
    return cfg, unflatten_paths(leaves)


def save_hf_model(
    directory: str | os.PathLike[str],
    cfg: ModelConfig,
    params: Mapping[str, Any],
    *,
    tokenizer_dir: str | os.PathLike[str] | None = None,
    card: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model directory that transformers 4 and 5 load alike; complete, or not at all.

    Args:
        directory: absent or empty.
        cfg: the architecture.
        params: the parameter tree, numpy or jax arrays, float32, float16 or bfloat16; kept bit for bit.
        tokenizer_dir: where `TOKENIZER_FILES` are copied from.
        card: the text of README.md, the model card.
        max_shard_bytes: weights are split into files of at most this size (or one tensor).

    Raises:
        InputError: a target with something in it, parameters that do not fit the config, no tokenizer files.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists and is not empty; name another directory or remove it")
    check_params(params, cfg)
    flat = flatten_paths(params)
    dtypes = sorted({str(leaf.dtype) for leaf in flat.values()})
    if not set(dtypes) <= set(_DTYPE_NAMES):
        raise InputError(f"cannot export weights of dtype {', '.join(dtypes)}; expected {', '.join(_DTYPE_NAMES)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
    try:
        if tokenizer_dir is not None:
            _copy_tokenizer(_directory(tokenizer_dir), staging)
        _write_weights(staging, cfg, flat, max_shard_bytes)
        config = model_config_to_hf(cfg, weights_dtype=str(flat["final_norm.scale"].dtype))
        _write_json(staging / "config.json", config)
        if card is not None:
            (staging / "README.md").write_text(card, encoding="utf-8")
        staging.chmod(0o755)
        os.replace(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


_DTYPE_OF: dict[str | None, Any] = dict(zip(_DTYPE_NAMES, (np.float32, np.float16, ml_dtypes.bfloat16), strict=True))


class _Tensors:
    """The tensors of the open files of one model, by name."""

    def __init__(self, files: Mapping[Path, Any]) -> None:
        self.not_finite: list[str] = []
        self._file_of: dict[str, Path] = {}
        self._files = files
        self._repeated: list[str] = []
        for path, handle in files.items():
            for name in handle.keys():  # noqa: SIM118 - not a mapping
                if name in self._file_of:
                    self._repeated.append(f"{path.name}: {name} is also in {self._file_of[name].name}")
                self._file_of.setdefault(name, path)

    def compare(self, table: Mapping[str, ParamSpec], cfg: ModelConfig) -> list[str]:
        """Returns what is missing, unexpected, repeated or of a wrong shape or dtype."""
        wanted = {name: spec.hf_shape for spec in table.values() for name in spec.hf_names()}
        problems = list(self._repeated)
        head = _head_name(cfg)
        for name, shape in wanted.items():
            if name not in self._file_of:
                hint = " (if the head is tied, set tie_word_embeddings)" if name == head else ""
                problems.append(f"missing: {name} {shape}{hint}")
                continue
            found = self._files[self._file_of[name]].get_slice(name)
            where = f"{self._file_of[name].name}: {name}"
            if tuple(found.get_shape()) != shape:
                problems.append(f"{where} has shape {tuple(found.get_shape())}, expected {shape}{_hint(name, cfg)}")
            if found.get_dtype() not in _DTYPES:
                problems.append(f"{where} has dtype {found.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        allowed_head = head if cfg.tie_embeddings else None
        problems += [
            f"{path.name}: {name} is not part of this architecture"
            for name, path in self._file_of.items()
            if name not in wanted and name != allowed_head and not name.endswith(_IGNORED)
        ]
        return problems

    def read_leaf(self, spec: ParamSpec, dtype: Any, *, allocate: Callable[..., np.ndarray] = np.empty) -> np.ndarray:
        """Returns one leaf in our layout, its tensors read one after another into what `allocate` gives."""
        if not spec.stack and allocate is np.empty:
            return np.ascontiguousarray(spec.from_hf(self._read(spec.hf_name, dtype)))
        names = spec.hf_names()
        first = spec.from_hf(self._read(names[0], dtype))
        leaf = allocate(spec.shape, first.dtype)
        entries = leaf.reshape(len(names), *spec.layer_shape)
        entries[0] = first
        for i, name in enumerate(names[1:], start=1):
            tensor = self._read(name, dtype)
            if tensor.dtype != leaf.dtype:
                raise InputError(
                    f"{self._file_of[name]}: {name} is {tensor.dtype}, but layer 0 is {leaf.dtype}; "
                    "give a dtype to convert to"
                )
            entries[i] = spec.from_hf(tensor)
        return leaf

    def check_tied_head(self, cfg: ModelConfig) -> None:
        """Raises where a head is stored though the config says that it is the embedding, and it is not."""
        name = _head_name(cfg)
        if not cfg.tie_embeddings or name not in self._file_of:
            return
        head, embedding = self._read(name, None), self._read(_embedding_name(cfg), None)
        if head.dtype != embedding.dtype or not np.array_equal(head, embedding):
            raise InputError(
                f"{self._file_of[name]}: {name} differs from the embedding although "
                "tie_word_embeddings is true; set it to false to keep the head"
            )

    def _read(self, name: str, dtype: Any) -> np.ndarray:
        path = self._file_of[name]
        tensor = self._files[path].get_tensor(name)
        beat()
        if not np.isfinite(tensor).all() and f"{path.name}: {name}" not in self.not_finite:
            self.not_finite.append(f"{path.name}: {name}")
        if dtype is None or tensor.dtype == dtype:
            return tensor
        with np.errstate(over="ignore"):
            converted = tensor.astype(dtype)
        if np.isfinite(tensor).all() and not np.isfinite(converted).all():
            raise InputError(f"{path}: {name} overflows {np.dtype(dtype)}; convert to bfloat16 or float32")
        return converted


def _open_files(root: Path, stack: contextlib.ExitStack) -> dict[Path, Any]:
    files: dict[Path, Any] = {}
    for path in _weight_files(root):
        try:
            files[path] = stack.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from error
    return files


def _weight_files(root: Path) -> list[Path]:
    """Returns the safetensors files of a model, each proven to lie in its directory."""
    if (root / INDEX).exists():
        index = _read_json(_inside(root, INDEX))
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{root / INDEX}: weight_map must map tensor names to file names")
        return [_inside(root, name) for name in sorted(set(weight_map.values()))]
    if (root / SINGLE).exists() or (root / SINGLE).is_symlink():
        return [_inside(root, SINGLE)]
    pickles = sorted(p.name for p in root.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if pickles:
        raise InputError(
            f"{root} holds pickled weights ({', '.join(pickles[:3])}), which can run code and are not read; "
            "convert them with transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OUT)"
        )
    raise InputError(f"{root} holds no {SINGLE} and no {INDEX}; expected a Hugging Face model directory")


def _inside(root: Path, name: str) -> Path:
    """Returns the path of a file of the directory; refuses one that is elsewhere."""
    if Path(name).name != name or name in ("", ".", "..") or "\\" in name:
        raise InputError(f"{root}: the file name {name!r} leads out of the directory; expected a plain name")
    path = root / name
    if not path.is_file():
        raise InputError(f"{path} does not exist or is no file")
    if path.suffix not in (".json", ".safetensors"):
        raise InputError(f"{path}: expected a .safetensors file; pickled weights are not read")
    if path.resolve().parent != root.resolve():
        raise InputError(f"{path} is a link out of its directory; put the file itself there")
    return path


def _directory(directory: str | os.PathLike[str]) -> Path:
    root = Path(directory)
    if not root.is_dir():
        raise InputError(f"{root} is no directory; expected a Hugging Face model directory")
    return root


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise InputError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_JSON_BYTES} are read")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is no valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _embedding_name(cfg: ModelConfig) -> str:
    return f"{hf_names(cfg.architecture)['embed']}.weight"


def _head_name(cfg: ModelConfig) -> str:
    return f"{hf_names(cfg.architecture)['head']}.weight"


def _hint(name: str, cfg: ModelConfig) -> str:
    if name in (_embedding_name(cfg), _head_name(cfg)):
        return f" (vocab_size of config.json is {cfg.vocab_size})"
    return ""


def _copy_tokenizer(source: Path, target: Path) -> None:
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not {"tokenizer.json", "tokenizer.model"} & set(names):
        raise InputError(f"{source} holds neither tokenizer.json nor tokenizer.model; expected a tokenizer directory")
    for name in names:
        shutil.copyfile(source / name, target / name)


def _hf_tensors(cfg: ModelConfig, flat: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields Hugging Face names and contiguous tensors, one at a time."""
    sharing: dict[str, list[tuple[ParamSpec, np.ndarray]]] = {}  # name -> the leaves in that tensor
    for path, spec in param_table(cfg).items():
        sharing.setdefault(spec.hf_name, []).append((spec, np.asarray(flat[path])))
    for members in sharing.values():
        spec, leaf = members[0]
        for i, name in enumerate(spec.hf_names()):
            beat()
            entries = [spec.to_hf(leaf.reshape(-1, *spec.layer_shape)[i]) for spec, leaf in members]
            if spec.fused is None:
                # contiguous: safetensors writes the memory of an array, whatever its strides
                yield name, np.ascontiguousarray(entries[0])
                continue
            if len({part.dtype for part in entries}) > 1:
                raise InputError(f"{name} holds leaves of different dtypes; convert the parameters to one")
            whole = np.empty(spec.hf_shape, leaf.dtype)
            for (member, _), part in zip(members, entries, strict=True):
                if member.fused is not None:
                    member.fused.put(whole, part)
            yield name, whole


def _write_weights(target: Path, cfg: ModelConfig, flat: Mapping[str, Any], max_shard_bytes: int) -> None:
    """Writes one file, or numbered shards and their index."""
    shards: list[list[str]] = []
    total = 0

    def flush(pending: dict[str, np.ndarray]) -> None:
        save_file(pending, target / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    pending: dict[str, np.ndarray] = {}
    for name, tensor in _hf_tensors(cfg, flat):
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > max_shard_bytes:
            flush(pending)
        pending[name] = tensor
        total += tensor.nbytes
    flush(pending)
    if len(shards) == 1:
        os.replace(target / "shard-0", target / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.replace(target / f"shard-{i}", target / file_name)
        weight_map |= dict.fromkeys(names, file_name)
    _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
