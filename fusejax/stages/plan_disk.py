"""How much disk every artefact of a run takes, before there is any: A0 to A8 of docs/artefacts.md."""

__all__ = ["disk_assumptions", "disk_bytes", "text_tokens", "weight_dtype"]

import json
from pathlib import Path
from typing import Any

from fusejax.config import ModelRef, RunConfig, place_of
from fusejax.models import ModelConfig, count_params
from fusejax.stages.capture_size import documents_per_shard, store_bytes

BYTES_PER_TOKEN = 4.0  # of English text
_UNKNOWN_TOKENS = 10**9
_DOCUMENT_BYTES = 4096.0  # where documents are longer than that, of which nothing is known
_WIDTH = {"float32": 4, "float16": 2, "bfloat16": 2}
_CHECKPOINTS = 3  # two are kept while a third is written


def text_tokens(config: RunConfig) -> tuple[int, str]:
    """Returns the training tokens of a run and where the figure comes from."""
    sizes = [Path(source.path).stat().st_size for source in config.corpus.train if Path(source.path).is_file()]
    if sizes and len(sizes) == len(config.corpus.train):
        limit = config.corpus.max_train_bytes
        total = sum(min(size, limit) if limit else size for size in sizes)
        return int(total / BYTES_PER_TOKEN), f"the files of corpus.train at {BYTES_PER_TOKEN:g} bytes per token"
    if config.train.max_steps:
        tokens = config.train.max_steps * config.train.batch_size * config.train.seq_len
        return tokens, "train.max_steps * train.batch_size * train.seq_len"
    return _UNKNOWN_TOKENS, "assumed; give --tokens"


def weight_dtype(config: RunConfig, ref: ModelRef | None = None) -> str:
    """Returns the dtype that trained models are kept in, which is the target's own: bfloat16 where nothing tells.

    Args:
      config: the run.
      ref: one of its models; None: the target.
    """
    ref = ref or config.target
    made = config.pretrained.get(place_of(ref.model))
    if made is not None and made.pretrain is not None:
        start = made.pretrain.start
        return "float32" if start is None else weight_dtype(config, ModelRef(model=start))
    path = Path(ref.model).expanduser() / "config.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    said = found.get("dtype") or found.get("torch_dtype")
    return said if said in _WIDTH else "bfloat16"


def disk_assumptions(config: RunConfig) -> dict[str, Any]:
    """Returns what the estimate takes for granted, by name."""
    found = {"text_bytes_per_token": BYTES_PER_TOKEN, "document_bytes": _document_bytes(config)}
    kept = {"dtype_of_models": weight_dtype(config), "train_state_bytes_per_parameter": config.memory.state_bytes}
    return found | kept | {"train_states_kept": _CHECKPOINTS}


def _document_bytes(config: RunConfig) -> float:
    return min(float(config.corpus.max_document_bytes), _DOCUMENT_BYTES)


def disk_bytes(config: RunConfig, model: ModelConfig, *, tokens: int, documents: int | None = None) -> dict[str, int]:
    """Returns the bytes of each artefact by its name in docs/artefacts.md.

    Args:
      config: the run.
      model: the target.
      tokens: of the training text, in the target's tokens; those of the sources are taken to be as many.
      documents: of the training text; None: as many as documents of 4 KiB make.
    """
    text = tokens * BYTES_PER_TOKEN
    documents = documents or max(1, round(text / _document_bytes(config)))
    codec, top_k = config.capture.codec, config.capture.entries(model.vocab_size)
    shard = config.capture.shard_size or documents_per_shard(documents, int(text), top_k=top_k, codec=codec)
    shard = min(shard, documents)

    def store(entries: int) -> int:
        options = {"top_k": entries, "vocab_size": model.vocab_size, "codec": codec, "shard_size": shard}
        return round(store_bytes([tokens / documents] * shard, **options) * documents / shard)

    names = [source.name for source in config.sources]
    target_too = any(fusion.include_target for fusion in config.fusions)
    fused = 0
    for fusion in config.fusions:
        mixed = 1 if fusion.method == "min_ce" else (len(fusion.sources) or len(names)) + fusion.include_target
        fused += store(mixed * top_k)
    params, width = count_params(model), _WIDTH[weight_dtype(config)]
    arms = len(config.fusions) + config.train.baseline
    return {
        "A0 corpus": round(text),
        "A1 captured": (len(names) + target_too) * store(top_k),
        "A2 maps": 24 * model.vocab_size * (len(names) + target_too),
        "A3 aligned": (len(names) + target_too) * store(top_k),
        "A4 fused": fused,
        "A6 train states": _CHECKPOINTS * config.memory.state_bytes * params,
        "A7 models": (arms + len(config.merge)) * width * params,
        "A8 export": width * params,
    }
