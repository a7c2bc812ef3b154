"""A whole run in miniature: text files, tokenizers and random models that a test can afford."""

import atexit
import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path

import jax
import numpy as np

from fusejax.config import RunConfig
from fusejax.data.tokenizer_training import train_tokenizer
from fusejax.io.hf import save_hf_model
from fusejax.io.tokenizers import load_tokenizer
from fusejax.models import ModelConfig, init_params

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "two",
    "dogs",
    "run",
    "over",
    "green",
    "hills",
    "while",
    "it",
    "rained",
    "in",
    "May",
]


def texts(count: int, *, seed: int) -> list[str]:
    """Sentences of few words, so that a tiny model can learn something."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(4, 30))).capitalize() + ".\n" for _ in range(count)]


def write_jsonl(path: Path, found: list[str]) -> Path:
    """One {"id", "text"} line per text."""
    lines = (json.dumps({"id": str(i), "text": text}) for i, text in enumerate(found))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_model(directory: Path, *, kind: str, seed: int, vocab_size: int = 340, padded: int = 0, **changes) -> Path:
    """A random Llama in Hugging Face form with a tokenizer of its own."""
    tokenizer_dir = directory.with_name(directory.name + "-tokenizer")
    train_tokenizer(texts(300, seed=seed), kind=kind, vocab_size=vocab_size, out_dir=tokenizer_dir)
    tokenizer = load_tokenizer(tokenizer_dir)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + padded,
        hidden_size=16,
        intermediate_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        max_positions=64,
        tie_embeddings=True,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        initializer_range=0.2,
    )
    config = dataclasses.replace(config, **changes)
    params = jax.tree.map(np.asarray, init_params(config, jax.random.key(seed)))
    save_hf_model(directory, config, params, tokenizer_dir=tokenizer_dir)
    return directory


@functools.cache
def _models() -> Path:
    """The three models, made once per test process."""
    place = Path(tempfile.mkdtemp(prefix="fusejax-tiny-"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    make_model(place / "target", kind="spm_bpe", seed=2)
    make_model(place / "a", kind="byte_bpe", seed=3)
    make_model(place / "b", kind="unigram", seed=4, padded=7)
    return place


def make_config(root: Path, **changes) -> RunConfig:
    """Two sources and a target with three different tokenizers, two fusions and their merge."""
    data = write_jsonl(root / "train.jsonl", texts(60, seed=1))
    shutil.copytree(_models(), root, dirs_exist_ok=True)
    values = {
        "output": str(root / "run"),
        "target": str(root / "target"),
        "sources": [str(root / "a"), str(root / "b")],
        "corpus": {"train": [{"path": str(data), "domain": "words"}], "valid_fraction": 0.1, "test_fraction": 0.2},
        "capture": {"top_k": 4, "context": 32, "batch_tokens": 256, "shard_size": 8},
        "fusions": [
            {"name": "fused", "window_bytes": 32},
            {"name": "mixed", "method": "avg_ce", "include_target": True},
        ],
        "train": {"batch_size": 4, "seq_len": 32, "learning_rate": 1e-2, "max_steps": 4, "log_every": 1},
        "loss": {"max_members": 64},
        "merge": {"method": "sce"},
        "evaluate": {"context": 32, "batch_tokens": 128},
    }
    return RunConfig.model_validate(values | changes)


_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_qwen_tokenizer(directory: Path) -> None:
    """Few pieces, but split as Qwen2's own, which transformers wants."""
    train_tokenizer(texts(200, seed=3), kind="byte_bpe", vocab_size=320, out_dir=directory)
    spec = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False}
    spec["normalizer"] = {"type": "NFC"}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, letters]}
    (directory / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
