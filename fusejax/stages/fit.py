"""Fitting one model: what `train` and pretraining share.

Joins model, loss, optimiser, mesh and loop, which know nothing of each other.
"""

__all__ = [
    "Optimization",
    "fit",
    "loss_function",
    "loss_options",
    "own_batch_rows",
    "peak_share",
    "placement",
    "rules",
    "schedule_and_optimizer",
    "widened",
]

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from fusejax.config import RunConfig
from fusejax.data.loader import FusionLoader
from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST
from fusejax.io.progress import Progress, progress, say
from fusejax.losses.fused import batch_fusion_loss
from fusejax.losses.whole import batch_whole_loss
from fusejax.models import ModelConfig, decay_mask, head_kernel, hidden_states, param_table
from fusejax.models.flops import flops_per_token
from fusejax.parallel import (
    ShardingRules,
    batch_sharding,
    is_first,
    make_mesh,
    own_rows,
    param_shardings,
    process_count,
)
from fusejax.parallel.device_kinds import find_device_kind
from fusejax.stages.resume import set_aside, settle
from fusejax.stages.together import meet
from fusejax.train.faults import FaultPolicy
from fusejax.train.loop import TrainResult
from fusejax.train.loop import train as train_loop
from fusejax.train.optimizer import make_optimizer, make_schedule, warmup_steps_from_ratio
from fusejax.types import EventGroups


class Optimization(NamedTuple):
    """The optimiser and its schedule; see `fusejax.config.TrainConfig` and `MemoryConfig`."""

    learning_rate: float
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.008
    adam_b1: float = 0.9
    adam_b2: float = 0.95
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moments_dtype: Literal["float32", "bfloat16", "int8"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"

    @classmethod
    def of(cls, config: RunConfig) -> "Optimization":
        """What a configuration says."""
        given = config.train.model_dump() | config.memory.model_dump()
        return cls(**{name: given[name] for name in cls._fields})


def fit(
    label: str,
    params: Any,
    config: ModelConfig,
    loader: FusionLoader,
    directory: Path,
    *,
    optimization: Optimization,
    loss: Mapping[str, Any],
    groups: EventGroups | None,
    identity: Mapping[str, Any],
    replaces: Path,
    sources: Sequence[str] = (),
    mesh: Mapping[str, int] | None = None,
    max_steps: int | None = None,
    accumulation: int = 1,
    compute_dtype: str = "float32",
    remat: str = "none",
    attention: str = "auto",
    sequence_parallel: bool = False,
    checkpoint_every: int = 500,
    log_every: int = 10,
    tensorboard: bool = False,
    wandb_project: str | None = None,
    faults: FaultPolicy | None = None,
    evaluate: Callable[[Any, int], Mapping[str, float]] | None = None,
    evaluate_every: int = 0,
    watch: Callable[[int, Mapping[str, float]], None] | None = None,
) -> TrainResult:
    """Trains `params` in `directory`, going on from its last checkpoint; refuses one of another training.

    Args:
      label: shown with the progress.
      params, config: nested dict of arrays to start from, and their architecture.
      loader: batches; batch n belongs to update n.
      directory: checkpoints, metrics.jsonl.
      optimization: optimiser and schedule.
      loss: see `loss_function`.
      groups: event groups, one row per source; None without fusion.
      identity: what determines the result; see `settle`.
      replaces: the model's directory; a model that stands there was made otherwise and is set aside.
      sources: a name for each row of `groups`, for the metrics.
      mesh: sizes of the mesh axes; None or all 1: one device.
      max_steps: stop earlier than the loader's end.
      accumulation, compute_dtype, remat, checkpoint_every, log_every, tensorboard: see `TrainConfig`.
      attention, sequence_parallel: see `MemoryConfig`; wandb_project: see `LogConfig`; faults: see `FaultsConfig`.
      evaluate, evaluate_every: callback between steps, see `fusejax.train.loop.train`.
      watch: sees the number and the metrics of each step; may raise.
    """
    config = dataclasses.replace(config, dtype=compute_dtype, remat=remat, attention=attention)
    total = min(len(loader), max_steps or len(loader))
    schedule, optimizer = schedule_and_optimizer(config, optimization, total)
    placed = placement(config, mesh)
    plan = dict(identity) | {"total_steps": total, "optimization": optimization._asdict()}
    how = {"mesh": dict(mesh or {}), "accumulation": accumulation, "remat": remat, "attention": attention}
    _begin(directory, plan, how | {"sequence_parallel": sequence_parallel}, faults or FaultPolicy(), replaces)
    tokens_per_step = loader.batch_size * loader.seq_len
    with progress(label, total=total * tokens_per_step, unit="tokens") as bar:
        return train_loop(
            params,
            loader,
            loss_fn=loss_function(config, groups, dict(loss), placed.get("mesh"), rules(sequence_parallel)),
            optimizer=optimizer,
            total_steps=total,
            accumulation=accumulation,
            checkpoint_dir=directory / "checkpoints",
            checkpoint_every=checkpoint_every,
            metrics=directory / "metrics.jsonl",
            log_every=log_every,
            tensorboard_dir=directory / "tensorboard" if tensorboard else None,
            wandb_project=wandb_project,
            schedule=schedule,
            annotate=peak_share(config, loader.seq_len, devices=math.prod((mesh or {}).values())),
            faults=faults or FaultPolicy(),
            evaluate=evaluate,
            evaluate_every=evaluate_every,
            on_step=_reporter(bar, tokens_per_step, watch),
            names=sources,
            **placed,
        )


def _begin(
    directory: Path, plan: Mapping[str, Any], how: Mapping[str, Any], faults: FaultPolicy, replaces: Path
) -> None:
    """Makes the training's directory ready, and then only sets aside the model that it replaces."""
    if is_first():
        settle(directory, plan, dict(how) | {"processes": process_count()}, on_changed=faults.on_changed_settings)
        if (replaces / MANIFEST).is_file():
            say(f"{replaces}: settings or inputs have changed, making it again")
            set_aside(replaces)
    meet(f"plan {directory}")


def schedule_and_optimizer(config: ModelConfig, options: Optimization, total: int) -> tuple[Any, Any]:
    """The schedule and AdamW behind clipping."""
    schedule = make_schedule(
        options.schedule,
        peak=options.learning_rate,
        total_steps=total,
        warmup_steps=warmup_steps_from_ratio(options.warmup_ratio, total),
    )
    optimizer = make_optimizer(
        schedule,
        b1=options.adam_b1,
        b2=options.adam_b2,
        weight_decay=options.weight_decay,
        clip_norm=options.clip_norm,
        decay_mask=decay_mask(config),
        moments_dtype=options.moments_dtype,
        param_dtype=options.param_dtype,
    )
    return schedule, optimizer


def _reporter(
    bar: Progress, tokens_per_step: int, watch: Callable[[int, Mapping[str, float]], None] | None
) -> Callable[[int, Mapping[str, float]], None]:
    """Shows each step; steps of an earlier run do not count in the rate."""
    last = 0

    def on_step(step: int, values: Mapping[str, float]) -> None:
        nonlocal last
        if not last:
            last = step - 1
            bar.start_at(last * tokens_per_step)
        names = ("loss", "clm_nats", "fusion_nats", "peak_share")
        shown = {name: values[name] for name in names if values.get(name)}
        bar.update((step - last) * tokens_per_step, step=step, **shown)
        last = step
        if watch is not None:
            watch(step, values)

    return on_step


def peak_share(
    config: ModelConfig, seq_len: int, *, devices: int
) -> Callable[[Mapping[str, float]], dict[str, float]] | None:
    """Returns what adds the share of the devices' peak to a step's metrics; None where the peak is not known.

    Counted are the multiply-adds that the model needs, forward once and backward twice, not those computed again.
    """
    kind = find_device_kind(jax.devices()[0].device_kind)
    if kind is None:
        return None
    per_token, peak = flops_per_token(config, seq_len), kind.bf16_flops * max(devices, 1)
    return lambda values: {"peak_share": values["tokens_per_second"] * per_token / peak}


def rules(sequence_parallel: bool) -> ShardingRules:
    """Where logical axes lie; parameters and batches lie alike with both values."""
    return ShardingRules.sequence_parallel() if sequence_parallel else ShardingRules()


def loss_options(config: RunConfig) -> dict[str, Any]:
    """What `loss_function` needs of a configuration to train on its fused distributions."""
    whole = config.capture.top_k == "all" or config.loss.divergence in ("uld", "alm")
    return config.loss.model_dump(mode="json") | {"whole": whole}


def loss_function(
    config: ModelConfig,
    groups: EventGroups | None,
    loss: Mapping[str, Any],
    mesh: Any,
    rules: ShardingRules | None = None,
) -> Any:
    """Returns `(params, batch, denominator) -> (loss, metrics)` for `make_train_step`.

    Args:
      config: the model.
      groups: see `batch_fusion_loss`.
      loss: its options; `whole` is set where it must be computed from whole logits.
      mesh: of the arrays.
      rules: where the model's logical axes lie; the default ones if None.
    """
    options = dict(loss)
    compute = batch_fusion_loss
    if options.pop("whole", False):
        compute, options = batch_whole_loss, _without(options, "max_members", "logits_dtype", "z_loss_weight")

    def loss_fn(params: Any, batch: Any, denominator: Any) -> Any:
        given = batch.tokens, batch.positions, batch.segment_ids
        hidden = hidden_states(params, config, *given, mesh=mesh, rules=rules)
        head, layout = head_kernel(params, config)
        head = head.astype(hidden.dtype)
        placed = {"mesh": mesh, "rules": rules}
        divergence = partial(compute, head_layout=layout, denominator=denominator, **placed, **options)
        return divergence(hidden, head, batch, groups)

    return loss_fn


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def placement(
    config: ModelConfig, mesh: Mapping[str, int] | None, *, devices: Sequence[Any] | None = None
) -> dict[str, Any]:
    """The mesh and shardings that the loop needs, or nothing for one device.

    Raises:
      InputError: too few devices, dimensions of the model that the mesh does not divide, or processes without a
        part of the mesh.
    """
    used = math.prod((mesh or {}).values())
    if process_count() > 1 and used != jax.device_count():
        raise InputError(
            f"`mesh` has {used} devices, the {process_count()} processes have {jax.device_count()}; a training by "
            f"several processes uses all, for example mesh.fsdp {jax.device_count()}"
        )
    if not mesh or used == 1:
        return {}
    try:
        made = make_mesh(data=mesh["data"], fsdp=mesh["fsdp"], tensor=mesh["tensor"], devices=devices)
        shardings = param_shardings(param_table(config), made)
    except ValueError as error:
        raise InputError(f"`mesh`: {error}") from error
    return {"mesh": made, "param_shardings": shardings, "batch_sharding": batch_sharding(made)}


def own_batch_rows(placed: Mapping[str, Any], batch_size: int, option: str) -> list[int] | None:
    """The rows of each batch that lie on this process's devices; None: all.

    Raises:
      InputError: the mesh does not divide the batch; names the option that says how large it is.
    """
    if not placed:
        return None
    try:
        return own_rows(placed["batch_sharding"], batch_size)
    except ValueError as error:
        raise InputError(f"{option} {batch_size} must be a multiple of mesh.data * mesh.fsdp") from error


def widened(params: Any) -> Any:
    """Weights in float32, whatever they are stored in: a step of 1e-5 is lost in bfloat16's rounding."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
