"""train: the target once per fusion, and once on CLM alone, all from the same start on the same tokens."""

__all__ = ["train", "train_arm"]

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fusejax.alignment import event_groups
from fusejax.data.corpus import read_corpus
from fusejax.data.loader import FusionLoader
from fusejax.errors import InputError
from fusejax.evaluation import evaluate_documents
from fusejax.io.manifest import Manifest, read_manifest
from fusejax.io.store import RecordReader
from fusejax.io.tokenizers import check_vocabulary
from fusejax.models import ModelConfig, score_tokens
from fusejax.parallel import is_first, to_host
from fusejax.stages.capture import chat_settings
from fusejax.stages.context import Run
from fusejax.stages.fit import Optimization, fit, loss_options, own_batch_rows, placement, widened
from fusejax.stages.fuse import CHAINS, PARTITIONS
from fusejax.stages.keep import keep_model
from fusejax.stages.lineage import check_lineage
from fusejax.stages.resume import determining, finished_model
from fusejax.stages.together import meet
from fusejax.stages.trained_share import ShareAlarm
from fusejax.train.faults import FaultPolicy
from fusejax.train.step import full_params
from fusejax.types import EventGroups


def train(run: Run) -> dict[str, Manifest]:
    """Trains every arm of the run; finished ones are skipped, interrupted ones go on."""
    arms = [fusion.name for fusion in run.fusions]
    done = {arm: train_arm(run, arm, run.fused_dir(arm)) for arm in arms}
    if run.config.train.baseline and run.only is None:
        # The baseline reads the first fusion's records, so that both see the same rows in the same order.
        done["clm"] = train_arm(run, "clm", run.fused_dir(arms[0]))
    return done


def train_arm(run: Run, arm: str, fused_dir: Path) -> Manifest:
    """Trains one arm on the records of `fused_dir`, `clm` without their distributions; a finished one is skipped."""
    config, options = run.config, run.config.train
    reader = RecordReader(fused_dir, kind="fused")
    fusing = arm != "clm"
    loss: dict[str, Any] = config.loss.model_dump(mode="json")
    if not fusing:
        loss = {"clm_weight": config.loss.clm_weight + config.loss.fusion_weight, "fusion_weight": 0.0}
        loss |= {"z_loss_weight": config.loss.z_loss_weight}
    settings = {"arm": arm, "train": options.model_dump(mode="json", exclude=_WITHOUT_EFFECT), "loss": _said(loss)}
    settings |= {"seed": config.seed, "memory": config.memory.model_dump(mode="json")}
    parents = {"target": run.fingerprint(config.target)}
    # The baseline depends on the text alone: other sources do not train it again.
    parents |= {"fused": reader.manifest.fingerprint} if fusing else {"corpus": _corpus(run)}
    settings = determining(settings | chat_settings(run, config.target))
    directory = run.model_dir(arm)
    if done := finished_model(directory, settings=settings, parents=parents):
        return done
    fusion = next(fusion for fusion in config.fusions if run.fused_dir(fusion.name) == fused_dir)
    check_lineage(run, fusion)
    meet(f"train {arm}")  # nobody looks at what is replaced next
    start = run.model(config.target)
    tokenizer = run.tokenizer(config.target)
    check_vocabulary(tokenizer, start.config.vocab_size, str(start.directory))
    mesh = config.mesh.model_dump()
    loader = FusionLoader(
        reader,
        rows=own_batch_rows(placement(start.config, mesh), options.batch_size, "train.batch_size"),
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        seed=config.seed,
        epochs=options.epochs,
        packed=options.packing,
        use_targets=fusing,
    )
    groups = _groups(reader) if fusing else None
    how = {"mesh": mesh, "accumulation": options.accumulation, "remat": options.remat}
    how |= {"attention": config.training_attention, "sequence_parallel": config.memory.sequence_parallel}
    result = fit(
        f"train {arm}",
        widened(start.params),
        start.config,
        loader,
        run.train_dir(arm),
        optimization=Optimization.of(config),
        loss=loss_options(config) if fusing else loss,
        groups=groups,
        sources=() if groups is None else _rows_of(run.fusion_sources(fusion), groups),
        identity=settings | parents,
        replaces=directory,
        max_steps=options.max_steps,
        compute_dtype=options.compute_dtype,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        tensorboard=options.tensorboard,
        wandb_project=config.log.wandb_project,
        faults=FaultPolicy(**config.faults.model_dump()),
        evaluate=_validation(run, start.config, mesh) if options.evaluate_every else None,
        evaluate_every=options.evaluate_every or 0,
        watch=ShareAlarm(f"train {arm}", read_manifest(run.corpus_dir, kind="corpus").facts["splits"]["train"]),
        **how,
    )
    params = jax.tree.map(lambda new, old: to_host(new, dtype=old.dtype), full_params(result.state), start.params)
    facts = {
        "steps": int(result.state.step),
        "tokens": int(result.state.step) * options.batch_size * options.seq_len,
        "compile_seconds": result.compile_seconds,
        "peak_bytes": result.peak_bytes,
        "how": how,
    }
    if is_first():
        identity = {"settings": settings, "parents": parents}
        keep_model(directory, start.config, params, tokenizer_dir=start.directory, facts=facts, **identity)
        shutil.rmtree(run.train_dir(arm) / "checkpoints", ignore_errors=True)
    meet(f"kept {arm}")
    return read_manifest(directory)


def _validation(run: Run, config: ModelConfig, mesh: Mapping[str, int]) -> Callable[[Any, int], dict[str, float]]:
    """Bits per byte of the valid split as a callback of the training loop; it changes nothing of the training.

    On a mesh every process computes all of it, on its part of the parameters.
    """
    documents = read_corpus(run.corpus_dir, "valid")[:]
    if not documents:
        raise InputError("train.evaluate_every is set, but the valid split is empty; give `corpus.valid` or unset it")
    tokenizer, options = run.tokenizer(run.config.target), run.config.evaluate
    context = min(options.context, config.max_positions)
    names = [document.id for document in documents]
    encoded = dict(zip(names, run.encoder(run.config.target).encode_batch(documents), strict=True))
    config = dataclasses.replace(config, dtype=run.config.train.compute_dtype, attention=run.config.plain_attention)
    placed = placement(config, mesh)
    whole = NamedSharding(placed["mesh"], PartitionSpec()) if placed else None
    score = jax.jit(partial(score_tokens, cfg=config, valid_vocab=tokenizer.vocab_size), out_shardings=whole)

    def evaluate(params: Any, step: int) -> dict[str, float]:
        found = evaluate_documents(
            lambda tokens, labels, positions, segments: score(
                params, tokens=tokens, labels=labels, positions=positions, segment_ids=segments
            )[0],
            SimpleNamespace(encode=encoded.__getitem__),
            names,
            context=context,
            batch_size=max(1, options.batch_tokens // context),
        )
        return {"valid_bits_per_byte": found.bits_per_byte}

    return evaluate


def _corpus(run: Run) -> str:
    return read_manifest(run.corpus_dir, kind="corpus").fingerprint


def _rows_of(sources: list[str], groups: EventGroups) -> list[str]:
    """Names of the rows of the group tables: the sources in order, and the chains' where there are any."""
    return [*sources, CHAINS][: groups.offsets.shape[0]]


def _said(loss: Mapping[str, Any]) -> dict[str, Any]:
    """The loss's options as manifests have them: later ones only where they say something else than was always done."""
    return {name: value for name, value in loss.items() if (name, value) not in _ALWAYS.items()}


_ALWAYS = {"unsupervised": "clm", "z_loss_weight": 0.0}
_WITHOUT_EFFECT = {"baseline", "checkpoint_every", "evaluate_every", "log_every", "tensorboard"}


def _groups(reader: RecordReader) -> EventGroups:
    """The event groups of every source, stacked: offsets [S, V + 1], members [S, V]."""
    with np.load(reader.directory / PARTITIONS, allow_pickle=False) as arrays:
        groups = [event_groups(symbols) for symbols in arrays["symbol_of_target"]]
    return EventGroups(np.stack([g.offsets for g in groups]), np.stack([g.members for g in groups]))
