"""Training a small model from scratch on plain text, for the quickstart and for experiments."""

__all__ = ["pretrain"]

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fusejax.data.loader import FusionLoader
from fusejax.io.manifest import Manifest
from fusejax.io.store import Record
from fusejax.io.tokenizers import load_tokenizer
from fusejax.models import ModelConfig, init_params
from fusejax.stages.fit import Optimization, fit
from fusejax.stages.keep import keep_model


class _Texts:
    """Encoded documents as the records that a loader reads."""

    def __init__(self, tokenizer: Any, texts: Sequence[str]):
        self._documents = [d for d in tokenizer.encode_batch(list(texts)) if len(d.tokens)]

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Record:
        document = self._documents[index]
        return Record(str(index), {}, {"tokens": document.tokens, "labels": document.labels})


def pretrain(
    directory: Path,
    config: ModelConfig,
    texts: Sequence[str],
    *,
    name: str,
    tokenizer_dir: Path,
    batch_size: int,
    seq_len: int,
    learning_rate: float,
    seed: int,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    epochs: int = 1,
) -> Manifest:
    """Trains a causal language model from random parameters and keeps it as a model directory.

    Args:
      directory: its final place; checkpoints lie beside it until it is done.
      config: the architecture.
      texts: documents.
      name: shown with the progress.
      tokenizer_dir: the model's tokenizer.
      batch_size, seq_len: rows per step and tokens per row.
      learning_rate: peak of a cosine schedule.
      seed: of initialisation and data order.
      settings, parents: what determines the result, for the manifest.
      epochs: passes over the texts.
    """
    loader = FusionLoader(
        _Texts(load_tokenizer(tokenizer_dir), texts),
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        epochs=epochs,
        use_targets=False,
    )
    work = directory.with_name(directory.name + ".training")
    params = init_params(config, jax.random.key(seed))
    result = fit(
        f"train source {name}" if name != "target" else "train target",
        params,
        config,
        loader,
        work,
        optimization=Optimization(learning_rate, warmup_ratio=0.02),
        loss={"clm_weight": 1.0, "fusion_weight": 0.0},
        groups=None,
        identity=dict(settings) | dict(parents),
        remat="dots",  # less memory traffic: faster on CPU too
        checkpoint_every=250,
    )
    params = jax.tree.map(np.asarray, result.state.params)
    kept = keep_model(
        directory,
        config,
        params,
        tokenizer_dir=tokenizer_dir,
        settings=settings,
        parents=parents,
        facts={"steps": int(result.state.step)},
    )
    import shutil

    shutil.rmtree(work, ignore_errors=True)
    return kept
