"""How much disk every artefact of a run takes, before there is any: A0 to A8 of docs/artefacts.md."""

__all__ = ["disk_bytes", "text_tokens"]

from pathlib import Path

from fusejax.config import RunConfig
from fusejax.models import ModelConfig, count_params
from fusejax.stages.capture_size import documents_per_shard, store_bytes

BYTES_PER_TOKEN = 4.0  # of English text
_UNKNOWN_TOKENS = 10**9
_DOCUMENT_BYTES = 4096.0  # where documents are longer than that, of which nothing is known
_WEIGHT = 2  # bytes: models are kept in the dtype they came in, bfloat16 as a rule
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


def disk_bytes(config: RunConfig, model: ModelConfig, *, tokens: int) -> dict[str, int]:
    """Returns the bytes of each artefact by its name in docs/artefacts.md.

    Args:
      config: the run.
      model: the target.
      tokens: of the training text, in the target's tokens; those of the sources are taken to be as many.
    """
    text = tokens * BYTES_PER_TOKEN
    size = min(float(config.corpus.max_document_bytes), _DOCUMENT_BYTES)
    documents = max(1, round(text / size))
    codec, top_k = config.capture.codec, config.capture.entries(model.vocab_size)
    shard = min(documents_per_shard(documents, int(text), top_k=top_k, codec=codec), documents)

    def store(entries: int) -> int:
        options = {"top_k": entries, "vocab_size": model.vocab_size, "codec": codec, "shard_size": shard}
        return round(store_bytes([size / BYTES_PER_TOKEN] * shard, **options) * documents / shard)

    names = [source.name for source in config.sources]
    target_too = any(fusion.include_target for fusion in config.fusions)
    fused = 0
    for fusion in config.fusions:
        mixed = 1 if fusion.method == "min_ce" else (len(fusion.sources) or len(names)) + fusion.include_target
        fused += store(mixed * top_k)
    params = count_params(model)
    arms = len(config.fusions) + config.train.baseline
    return {
        "A0 corpus": round(text),
        "A1 captured": (len(names) + target_too) * store(top_k),
        "A2 maps": 24 * model.vocab_size * (len(names) + target_too),
        "A3 aligned": (len(names) + target_too) * store(top_k),
        "A4 fused": fused,
        "A6 train states": _CHECKPOINTS * config.memory.state_bytes * params,
        "A7 models": (arms + len(config.merge)) * _WEIGHT * params,
        "A8 export": _WEIGHT * params,
    }
