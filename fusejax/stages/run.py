"""run: the stages of a configuration in order; also the commands that run one of them."""

__all__ = ["STAGES", "command", "run_stages"]

import contextlib
import json
import time
from collections.abc import Callable, Collection
from typing import Any

from fusejax.config import ModelRef, RunConfig, place_of
from fusejax.errors import InputError, nearest
from fusejax.io.progress import say
from fusejax.io.tokenizers import Tokenizer
from fusejax.parallel.processes import is_first, start_processes
from fusejax.stages.align import align
from fusejax.stages.capture import capture
from fusejax.stages.capture_size import predicted_bytes
from fusejax.stages.command import Result, parse_config
from fusejax.stages.context import Run
from fusejax.stages.convert import export_run
from fusejax.stages.corpus_size import planned_text
from fusejax.stages.disk_check import disk_need
from fusejax.stages.durations import note_duration
from fusejax.stages.evaluate import evaluate_run
from fusejax.stages.flags import check_own_flags
from fusejax.stages.fuse import fuse
from fusejax.stages.lock import exclusive
from fusejax.stages.merge import merge_run
from fusejax.stages.preflight import check_before
from fusejax.stages.prepare import prepare
from fusejax.stages.pretrain_models import pretrain_models
from fusejax.stages.report import report_run
from fusejax.stages.together import meet
from fusejax.stages.train import train
from fusejax.train.faults import active_guard

STAGES: dict[str, Callable[[Run], Any]] = {
    "pretrain": pretrain_models,
    "prepare": prepare,
    "capture": capture,
    "align": align,
    "fuse": fuse,
    "train": train,
    "merge": merge_run,
    "evaluate": evaluate_run,
    "export": export_run,
    "report": report_run,
}
SHARED = ("pretrain", "capture", "align", "fuse", "train")  # by all processes; the others are process 0's alone
COMMON = ("pretrain", "prepare", "capture", "align")  # their artefacts of corpus and target serve several fusions
PER_FUSION = (*COMMON, "fuse", "train")


def run_stages(
    config: RunConfig, names: tuple[str, ...] = tuple(STAGES), *, only: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Runs stages in their order and returns {stage: seconds}; several processes all call it.

    Args:
      config: of the run.
      names: the stages.
      only: names of fusions; nothing is made that they do not need, and several such runs may go side by side, of
        which one makes what they share while the others wait. None: all fusions.

    Raises:
      InputError: a mistake that can be mended; or another run works in the directory.
    """
    run = Run(config, only=only)
    seconds: dict[str, float] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(active_guard().watching(config.faults.watchdog_seconds))
        if is_first():
            run.start()
            stack.enter_context(exclusive(run.directory, shared=only is not None))
            check_before(run, names)
        meet("start")
        if only is not None:
            _make_what_is_shared(run, [name for name in names if name in COMMON], seconds)
            names = tuple(name for name in names if name not in COMMON)
            if is_first():
                for fusion in run.fusions:
                    stack.enter_context(exclusive(run.directory, name=f".fusion-{fusion.name}.lock"))
        _run_in_order(run, names, seconds)
    return seconds


def _make_what_is_shared(run: Run, names: list[str], seconds: dict[str, float]) -> None:
    """Makes corpus, target's and sources' distributions, each by one process; others of the same wait until it is."""
    sources = [name for name in sorted(run.participants) if name != "target"]
    for part, locks in ((Run(run.config, only=()), ["common"]), (run, [f"source-{name}" for name in sources])):
        with contextlib.ExitStack() as stack:
            if is_first():
                for lock in locks:
                    stack.enter_context(exclusive(run.directory, wait=True, name=f".{lock}.lock"))
            meet("locked")
            _run_in_order(part, [name for name in names if part.only == () or name != "prepare"], seconds)


def _run_in_order(run: Run, names: Collection[str], seconds: dict[str, float]) -> None:
    for name, stage in STAGES.items():
        if name not in names:
            continue
        start = time.monotonic()
        active_guard().attend(f"in {name}")
        if name in SHARED:
            stage(run)
        elif is_first():
            with active_guard().watching(None):  # those who wait watch it: not all of its long work is counted
                stage(run)
        meet(name)
        took = time.monotonic() - start
        seconds[name] = round(seconds.get(name, 0.0) + took, 2)
        if is_first():
            note_duration(run.directory, name, took)
        say(f"{name}: done in {took:.1f} s")


def command(name: str, words: list[str]) -> Result:
    """`fusejax run CONFIG [--stages a,b] [--only NAME] [--dry-run]`, `fusejax <stage> CONFIG`, `fusejax schema`."""
    if name == "schema":
        return Result(RunConfig.model_json_schema(), json.dumps(RunConfig.model_json_schema(), indent=2))
    words, stages = _take(words, "--stages")
    words, wanted = _take(words, "--only")
    only = None if wanted is None else _comma_separated(wanted)
    dry_run = "--dry-run" in words
    words = [word for word in words if word != "--dry-run"]
    description = (
        STAGES[name].__doc__
        if name in STAGES
        else (
            "All stages: " + " ".join(STAGES) + ". --stages a,b runs some of them; --only NAME,NAME runs "
            f"{' '.join(PER_FUSION)} for these fusions; --dry-run prints what would be done."
        )
    )
    config = parse_config(name, words, description or "")
    names = (name,) if name in STAGES else _stage_names(stages, PER_FUSION if only is not None else tuple(STAGES))
    if only is not None and (bad := [stage for stage in names if stage not in PER_FUSION]):
        raise InputError(
            f"--only goes with {', '.join(PER_FUSION)}; {', '.join(bad)} need every fusion: leave --only out"
        )
    if only == ():
        raise InputError(f"--only names none. Fusions: {', '.join(fusion.name for fusion in config.fusions)}")
    check_own_flags()  # before anything reads them: XLA would end the process
    if dry_run:
        return _dry_run(config, names, only)
    start_processes()
    seconds = run_stages(config, names, only=only)
    if not is_first():
        return Result({"stage_seconds": seconds, "output": config.output})
    result_file = Run(config).directory / "result.json"
    found = json.loads(result_file.read_text()) if result_file.is_file() and "evaluate" in names else {}
    table = found.pop("table", "")
    return Result(found | {"stage_seconds": seconds, "output": config.output}, table)


def _take(words: list[str], flag: str) -> tuple[list[str], str | None]:
    """Removes `flag value` or `flag=value` from the words."""
    for index, word in enumerate(words):
        if word == flag:
            if index + 1 == len(words):
                raise InputError(f"{flag} needs a value")
            return words[:index] + words[index + 2 :], words[index + 1]
        if word.startswith(flag + "="):
            return words[:index] + words[index + 1 :], word[len(flag) + 1 :]
    return words, None


def _comma_separated(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _stage_names(text: str | None, default: tuple[str, ...]) -> tuple[str, ...]:
    if text is None:
        return default
    names = _comma_separated(text)
    for name in names:
        if name not in STAGES:
            raise InputError(f"--stages names {name!r}.{nearest(name, STAGES)} Stages: {', '.join(STAGES)}")
    if not names:
        raise InputError(f"--stages names none. Stages: {', '.join(STAGES)}")
    return names


def _model(run: Run, ref: ModelRef) -> str:
    """Where a model lies, or will."""
    return ref.model if place_of(ref.model) in run.config.pretrained else str(run.model_path(ref))


def _tokenizer(run: Run, ref: ModelRef) -> Tokenizer | None:
    """The tokenizer of a model; None: it is trained first."""
    return run.outlook(ref).tokenizer if place_of(ref.model) in run.config.pretrained else run.tokenizer(ref)


def _dry_run(config: RunConfig, names: tuple[str, ...], only: tuple[str, ...] | None) -> Result:
    """Checks what can be checked without weights and says what would be done."""
    run = Run(config, only=only)
    steps: list[tuple[str, str]] = []
    text = planned_text(run) if "capture" in names else None
    sizes = {}
    for ref in config.pretrained.values():
        found = run.outlook(ref).config
        what = f"{found.architecture}, {found.num_layers} layers of {found.hidden_size}, {found.vocab_size} tokens"
        steps.append(("pretrain", f"{ref.name}: {what} -> {ref.model}"))
    for name, ref in run.participants.items():
        tokenizer = _tokenizer(run, ref)
        predicted = "" if tokenizer is None else f", {tokenizer.vocab_size} tokens"
        if text is not None and tokenizer is not None:
            sizes[name] = round(predicted_bytes(run, ref, text.documents, tokenizer=tokenizer) * text.scale)
            predicted += f", about {sizes[name] / 1e6:.1f} MB" + text.note
        what = f"{name}: {_model(run, ref)}{predicted} -> {run.captured_dir(name)}"
        steps.append(("capture", what))
        steps.append(("align", f"{name}: {config.align.vocabulary} symbols -> {run.aligned_dir(name)}"))
    target = _model(run, config.target)
    for fusion in run.fusions:
        names_of = ", ".join(run.fusion_sources(fusion))
        steps.append(("fuse", f"{fusion.name}: {fusion.method} over {names_of} -> {run.fused_dir(fusion.name)}"))
        steps.append(("train", f"{fusion.name}: from {target} -> {run.model_dir(fusion.name)}"))
    if config.train.baseline and only is None:
        steps.append(("train", f"clm: from {target} -> {run.model_dir('clm')}"))
    for merge in config.merge:
        of = ", ".join(config.merge_targets(merge))
        steps.append(("merge", f"{merge.name}: {merge.method} of {of} -> {run.model_dir(merge.name)}"))
    steps.insert(0, ("prepare", f"{', '.join(s.path for s in config.corpus.train)} -> {run.corpus_dir}"))
    steps.append(("evaluate", f"bits per byte of every model -> {run.directory / 'result.json'}"))
    steps.append(("export", f"{config.exported} as a Hugging Face directory -> {run.directory / 'export'}"))
    steps.append(("report", f"-> {run.directory / 'report.html'}"))
    order = list(STAGES)
    wanted = sorted((step for step in steps if step[0] in names), key=lambda step: order.index(step[0]))
    need = disk_need(run, names)
    lines = [f"{stage:<9} {what}" for stage, what in wanted] + [f"disk: {need.text}"]
    if not need.fits:
        lines.append("IT DOES NOT FIT: make room, or set `output` on another disk")
    plan = [{"stage": s, "what": w} for s, w in wanted]
    data = {"dry_run": plan, "disk_free_bytes": need.free, "disk_needed_bytes": need.parts, "fits": need.fits}
    data |= {"predicted_capture_bytes": sizes}
    if text is not None:
        data |= {"sampled": not text.exact}
    return Result(data, "\n".join(lines), 0 if need.fits else 2)
