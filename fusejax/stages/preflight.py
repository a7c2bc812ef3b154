"""What can be told before any work: a mistake in the last stage must not be found after days of the first."""

__all__ = ["check_before"]

import importlib.util
from collections.abc import Collection
from pathlib import Path

from fusejax.config import place_of
from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST
from fusejax.io.models import open_config
from fusejax.io.tokenizers import check_vocabulary
from fusejax.merging.registry import MERGE_METHODS, resolve
from fusejax.models.cudnn import check_cudnn
from fusejax.stages.capture import describe
from fusejax.stages.context import Run
from fusejax.stages.disk_check import disk_need
from fusejax.stages.fit import Optimization, placement, schedule_and_optimizer
from fusejax.stages.flags import check_own_flags
from fusejax.stages.pretrain_models import check_pretraining
from fusejax.stages.run_tasks import check_task_files


def check_before(run: Run, names: Collection[str]) -> None:
    """Checks flags, models, tokenizers, mesh, row length, disk, merges and task files of the stages that will run.

    Weights are not read; hub names are downloaded here.

    Raises:
      InputError: what would fail later, in the words of the stage that it concerns.
    """
    check_own_flags()
    config = run.config
    later = config.pretrained if "pretrain" in names else {}  # models that need not stand yet
    if "pretrain" in names:
        check_pretraining(run)
    if {"capture", "align", "train"} & set(names):
        for ref in (*run.participants.values(), config.target):
            if place_of(ref.model) in later:
                continue
            path = run.model_path(ref)
            source = describe(run, ref)
            if source.vocab_size is not None:
                check_vocabulary(run.tokenizer(ref), source.vocab_size, str(path))
            run.encoder(ref)  # has a chat template where the corpus has conversations
    if "train" in names:
        coming = place_of(config.target.model) in later
        path = Path(config.target.model) if coming else run.model_path(config.target)
        model = run.outlook(config.target).config if coming else open_config(path)
        if config.train.seq_len > model.max_positions:
            raise InputError(f"train.seq_len is {config.train.seq_len}, but {path} has {model.max_positions} positions")
        placement(model, config.mesh.model_dump())
        if config.memory.attention == "cudnn":
            check_cudnn(config.train.compute_dtype, None)
        schedule_and_optimizer(model, Optimization.of(config), 1)
        if config.log.wandb_project is not None and importlib.util.find_spec("wandb") is None:
            raise InputError("log.wandb_project is set, but wandb is not installed: pip install wandb, or unset it")
    if not (need := disk_need(run, names)).fits:
        raise InputError(f"the disk is too small: {need.text}. Make room, or set `output` on another disk")
    if "merge" in names:
        _check_merges(run, trained_now="train" in names)
    if "evaluate" in names:
        check_task_files(config)


def _check_merges(run: Run, *, trained_now: bool) -> None:
    """Refuses merges that cannot be made, all of them at once."""
    problems = []
    for merge in run.config.merge:
        targets = run.config.merge_targets(merge)
        missing = [arm for arm in targets if not trained_now and not (run.model_dir(arm) / MANIFEST).is_file()]
        if missing:
            problems.append(f"merge {merge.name!r} takes {', '.join(missing)}: train first (fusejax train CONFIG)")
        try:
            resolve(merge.method, merge.parameters, len(targets), True)
        except InputError as error:
            known = MERGE_METHODS.get(merge.method)
            few = known is not None and known.max_targets is not None and len(targets) > known.max_targets
            named = f" It was given {', '.join(targets)}; choose with `targets`." if few else ""
            problems.append(f"merge {merge.name!r}: {error}{named}")
    if problems:
        raise InputError("\n".join(problems))
