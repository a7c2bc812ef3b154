"""quickstart: the whole of FuseLLM on text that every Python installation holds.

Three small specialists with different tokenizers and architectures are trained on three domains, and one
generalist target on all of them; then the stages of `fusejax run` do the rest. Nothing is downloaded. The numbers
are what comes out: no setting was chosen by looking at the test text.
"""

__all__ = ["command", "quickstart"]

import json
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

from fusejax.config import RunConfig
from fusejax.data.corpus import Document, cut_documents
from fusejax.data.tokenizer_training import train_tokenizer
from fusejax.io.manifest import atomic_directory, fingerprint_of, read_manifest, write_manifest
from fusejax.io.models import cache_dir
from fusejax.io.progress import say
from fusejax.io.tokenizers import load_tokenizer
from fusejax.models import ModelConfig
from fusejax.stages.command import Result, parser
from fusejax.stages.context import Run, finished
from fusejax.stages.durations import note_duration
from fusejax.stages.fit import Optimization
from fusejax.stages.lock import exclusive
from fusejax.stages.prepare import embedded_documents, prepare, sample_documents
from fusejax.stages.pretrain import pretrain
from fusejax.stages.run import STAGES


class Scale(NamedTuple):
    """The sizes of a quickstart; bytes are per domain."""

    corpus_bytes: int = 3_000_000  # collected
    source_bytes: int = 1_400_000  # a specialist is trained on
    target_bytes: int = 400_000  # the target is trained on, of each domain
    fusion_bytes: int = 330_000  # captured, and trained on in every arm
    eval_bytes: int = 60_000  # valid, and test
    vocab_size: int = 2048
    width: int = 128
    layers: int = 4
    seq_len: int = 256
    batch_size: int = 2  # on few tokens many small steps learn more than few large ones


FULL = Scale()
FAST = Scale(
    corpus_bytes=700_000,
    source_bytes=150_000,
    target_bytes=60_000,
    fusion_bytes=50_000,
    eval_bytes=15_000,
    vocab_size=512,
    width=64,
    layers=2,
    seq_len=128,
)

# Tokenizer, heads that share keys, and window: no two sources alike.
SOURCES: dict[str, dict[str, Any]] = {
    "python": {"tokenizer": "byte_bpe", "architecture": "llama", "kv_heads": 4, "window": None},
    "prose": {"tokenizer": "unigram", "architecture": "llama", "kv_heads": 2, "window": None},
    "c": {"tokenizer": "spm_bpe", "architecture": "mistral", "kv_heads": 2, "window": 64},
}
TARGET: dict[str, Any] = {"tokenizer": "spm_bpe", "architecture": "llama", "kv_heads": 2, "window": None}
LEARNING_RATE = 3e-3
FUSION_LEARNING_RATE = 1e-3


def quickstart(out: Path, *, scale: Scale, seed: int, cache: Path) -> dict[str, Any]:
    """Runs everything and returns `result.json`; finished parts of an earlier run are kept."""
    run = Run(_config(out, scale, seed, models={}))
    run.start()
    with exclusive(out):
        return _quickstart(run, scale, seed, cache)


def _quickstart(run: Run, scale: Scale, seed: int, cache: Path) -> dict[str, Any]:
    start, out = time.monotonic(), run.directory
    corpus = prepare(run)
    texts = _pretraining_texts(run, scale)
    cache.mkdir(parents=True, exist_ok=True)
    with exclusive(cache, wait=True):
        models = _pretrained(texts, scale, seed, cache, corpus.fingerprint)
    run = Run(_config(out, scale, seed, models=models))
    run.start()
    for name, stage in STAGES.items():
        begin = time.monotonic()
        stage(run)
        note_duration(out, name, time.monotonic() - begin)
        say(f"{name}: done in {time.monotonic() - begin:.1f} s")
    result = json.loads((out / "result.json").read_text())
    result |= {
        "seconds": round(time.monotonic() - start, 1),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "export": str(out / "export"),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    STAGES["report"](run)
    return result


def _config(out: Path, scale: Scale, seed: int, *, models: dict[str, Path]) -> RunConfig:
    """The configuration of the run; a copy is written beside its artefacts, for `fusejax run`."""
    names = list(models)[:-1] or ["unknown"]
    tokens = 16 * scale.seq_len
    return RunConfig.model_validate(
        {
            "output": str(out),
            "seed": seed,
            "target": {"name": "target", "model": str(models.get("target", "unknown"))},
            "sources": [{"name": name, "model": str(models.get(name, "unknown"))} for name in names],
            "corpus": {
                "train": [{"path": "embedded", "limit_bytes": scale.corpus_bytes}],
                "max_document_bytes": scale.seq_len * 2,
                "max_train_bytes": scale.fusion_bytes,
                "max_eval_bytes": scale.eval_bytes,
            },
            "capture": {"context": scale.seq_len, "batch_tokens": tokens},
            "loss": {"clm_weight": 0.9, "fusion_weight": 0.1},  # the papers'; docs/results.md says what others give
            "fusions": [{"name": "fused"}, {"name": "pairwise", "sources": names[:1], "include_target": True}],
            "train": {
                "batch_size": scale.batch_size,
                "seq_len": scale.seq_len,
                "learning_rate": FUSION_LEARNING_RATE,
                "warmup_ratio": 0.05,
                "remat": "dots",
                "checkpoint_every": 200,
                "log_every": 10,
                "evaluate_every": 250,
            },
            "merge": {"method": "sce"},
            "evaluate": {"context": scale.seq_len, "batch_tokens": tokens},
        }
    )


def _pretraining_texts(run: Run, scale: Scale) -> dict[str, list[Document]]:
    """Pieces of documents, by domain, that no split of the run's corpus holds; none of a held-out document."""
    from fusejax.data.corpus import read_corpus, split_documents

    used = {document.id for document in read_corpus(run.corpus_dir, "train")}
    found = {}
    for domain, documents in embedded_documents(scale.corpus_bytes).items():
        options = run.config.corpus
        train = split_documents(
            documents, valid=options.valid_fraction, test=options.test_fraction, seed=run.config.seed
        )["train"]
        pieces = cut_documents(train, max_bytes=options.max_document_bytes)
        found[domain] = sample_documents([piece for piece in pieces if piece.id not in used])
    return found


def _pretrained(texts: dict[str, list[Document]], scale: Scale, seed: int, cache: Path, corpus: str) -> dict[str, Path]:
    """Trains the sources and the target, or finds them in the cache; the target comes last."""
    recipes = dict(zip(texts, SOURCES.values(), strict=False)) | {"target": TARGET}
    paths = {}
    for name, recipe in recipes.items():
        domains = [name] if name in texts else list(texts)
        size = scale.source_bytes if name in texts else scale.target_bytes
        documents = [d for domain in domains for d in _first_bytes(texts[domain], size)]
        # The recipe and the text determine a model, so runs with other outputs share it.
        settings = {"recipe": recipe, "scale": scale._asdict(), "seed": seed, "domains": domains}
        settings["texts"] = fingerprint_of([document.text for document in documents])
        parents = {"corpus": corpus}
        directory = cache / f"{name}-{fingerprint_of([settings, parents])[:16]}"
        paths[name] = directory
        if finished(directory, kind="model", settings=settings, parents=parents):
            say(f"{name}: found in {cache}")
            continue
        tokenizer_dir = _tokenizer(directory.with_suffix(".tokenizer"), recipe["tokenizer"], documents, scale)
        pretrain(
            directory,
            _architecture(recipe, scale, tokenizer_dir),
            load_tokenizer(tokenizer_dir).encode_batch([document.text for document in documents]),
            label=f"train source {name}" if name != "target" else "train target",
            tokenizer_dir=tokenizer_dir,
            batch_size=scale.batch_size,
            seq_len=scale.seq_len,
            optimization=Optimization(LEARNING_RATE, warmup_ratio=0.02),
            seed=seed,
            settings=settings,
            parents=parents,
        )
    return paths


def _tokenizer(directory: Path, kind: str, documents: list[Document], scale: Scale) -> Path:
    """Trains a tokenizer, or returns the one that stands."""
    texts = [document.text for document in documents]
    settings = {"kind": kind, "vocab_size": scale.vocab_size, "texts": fingerprint_of(texts)}
    if not finished(directory, kind="tokenizer", settings=settings, parents={}):
        with atomic_directory(directory) as temporary:
            train_tokenizer(texts, kind=kind, vocab_size=scale.vocab_size, out_dir=temporary)
            write_manifest(temporary, kind="tokenizer", settings=settings)
    read_manifest(directory, kind="tokenizer")
    return directory


def _architecture(recipe: dict[str, Any], scale: Scale, tokenizer_dir: Path) -> ModelConfig:
    tokenizer = load_tokenizer(tokenizer_dir)
    return ModelConfig(
        architecture=recipe["architecture"],
        vocab_size=tokenizer.vocab_size,
        hidden_size=scale.width,
        intermediate_size=-(-scale.width * 8 // 3 // 8) * 8,
        num_layers=scale.layers,
        num_heads=4,
        num_kv_heads=recipe["kv_heads"],
        max_positions=scale.seq_len,
        sliding_window=recipe["window"],
        tie_embeddings=True,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
    )


def _first_bytes(documents: list[Document], size: int) -> list[Document]:
    kept, used = [], 0
    for document in documents:
        used += document.n_bytes
        if used > size:
            break
        kept.append(document)
    return kept


def command(name: str, words: list[str]) -> Result:
    """`fusejax quickstart --out DIR [--fast]`."""
    arguments = parser(name, "FuseLLM from end to end on this machine's own text: CPU, no network, about six minutes.")
    arguments.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="directory of the run")
    arguments.add_argument("--fast", action="store_true", help="smaller models and less text, for tests")
    arguments.add_argument("--seed", type=int, default=0, help="seed of splits, initialisation and data order")
    arguments.add_argument(
        "--cache", type=Path, default=cache_dir() / "quickstart", help="where trained sources are kept"
    )
    given = arguments.parse_args(words)
    result = quickstart(given.out, scale=FAST if given.fast else FULL, seed=given.seed, cache=given.cache)
    text = f"{result['table']}\n\n{given.out / 'report.html'}; {result['seconds']:.0f} s"
    return Result({key: value for key, value in result.items() if key != "table"}, text)
