"""Training a model on plain text or conversations and keeping it: for the stage `pretrain` and for the quickstart."""

__all__ = ["Encoded", "pretrain"]

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fusejax.data.loader import FusionLoader
from fusejax.errors import InputError
from fusejax.io.manifest import Manifest, read_manifest
from fusejax.io.store import Record
from fusejax.io.tokenizers import EncodedDocument
from fusejax.models import ModelConfig, init_params
from fusejax.parallel import is_first, to_host
from fusejax.stages.fit import Optimization, fit, own_batch_rows, placement, widened
from fusejax.stages.keep import keep_model
from fusejax.stages.together import meet
from fusejax.train.faults import FaultPolicy
from fusejax.train.step import full_params


class Encoded:
    """Encoded documents as the records that a loader reads; of masked ones only the trained labels count."""

    def __init__(self, documents: Sequence[EncodedDocument]):
        self._documents = [document for document in documents if len(document.tokens)]
        self._masked = any(document.spans is not None for document in self._documents)

    def __len__(self) -> int:
        return len(self._documents)

    def __getitem__(self, index: int) -> Record:
        document = self._documents[index]
        arrays = {"tokens": document.tokens, "labels": document.labels}
        if self._masked:  # all documents then have a mask
            trained = np.ones(len(document.tokens)) if document.spans is None else document.spans >= 0
            arrays["mask"] = np.asarray(trained, np.int8)
        return Record(str(index), {}, arrays)

    @property
    def trained_tokens(self) -> int:
        """Labels that are trained in one pass."""
        return sum(len(d.tokens) if d.spans is None else int((d.spans >= 0).sum()) for d in self._documents)


def pretrain(
    directory: Path,
    config: ModelConfig,
    documents: Sequence[EncodedDocument],
    *,
    label: str,
    tokenizer_dir: Path,
    batch_size: int,
    seq_len: int,
    optimization: Optimization,
    seed: int,
    settings: Mapping[str, Any],
    parents: Mapping[str, str],
    start: Any = None,
    epochs: int = 1,
    packing: bool = True,
    mesh: Mapping[str, int] | None = None,
    work: Path | None = None,
    faults: FaultPolicy | None = None,
    **options: Any,
) -> Manifest:
    """Trains a causal language model and keeps it as a model directory; several processes all call it.

    Args:
      directory: its final place.
      config: the architecture.
      documents: as the model's tokenizer, and its chat template, read them.
      label: shown with the progress.
      tokenizer_dir: the model's tokenizer.
      batch_size, seq_len, optimization: rows per step, tokens per row, optimiser and schedule.
      seed: of initialisation and data order.
      settings, parents: what determines the result, for the manifest.
      start: params to train on from, kept in their dtypes; None: random ones.
      epochs, packing: passes over the documents; several documents per row.
      mesh: sizes of its axes.
      work: where checkpoints lie until the model is kept; removed then.
      faults, options: arguments of `fit`.
    """
    records = Encoded(documents)
    if not len(records):
        raise InputError(f"{label}: there is no text to train on; give documents that are not empty")
    loader = FusionLoader(
        records,
        rows=own_batch_rows(placement(config, mesh), batch_size, "pretrain.batch_size"),
        batch_size=batch_size,
        seq_len=seq_len,
        seed=seed,
        epochs=epochs,
        packed=packing,
        use_targets=False,
    )
    work = work or directory.with_name(directory.name + ".training")
    params = init_params(config, jax.random.key(seed)) if start is None else widened(start)
    result = fit(
        label,
        params,
        config,
        loader,
        work,
        optimization=optimization,
        loss={"clm_weight": 1.0, "fusion_weight": 0.0},
        groups=None,
        identity=dict(settings) | dict(parents),
        replaces=directory,
        mesh=mesh,
        faults=faults,
        **({"remat": "dots", "checkpoint_every": 250} | options),  # dots: less memory traffic, faster on CPU too
    )
    kept = jax.tree.map(lambda new, old: to_host(new, dtype=old.dtype), full_params(result.state), start or params)
    facts = {"steps": int(result.state.step), "documents": len(records), "trained_tokens": records.trained_tokens}
    if is_first():
        identity = {"settings": settings, "parents": parents}
        keep_model(directory, config, kept, tokenizer_dir=tokenizer_dir, facts=facts, **identity)
        shutil.rmtree(work, ignore_errors=True)
    meet(f"kept {directory}")
    return read_manifest(directory)
