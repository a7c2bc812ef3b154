"""merge: several targets become one, in parameter space (artefact A7).

Models are streamed from file to file (`merge_files`, `merge_engine`): by the command between any directories, by the
stage of a run from what the run has trained to checkpoints of their own.
"""

__all__ = ["command", "merge_run"]

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, Manifest, fingerprint_of, read_manifest
from fusejax.io.stream_write import refuse_occupied
from fusejax.merging import MERGE_METHODS
from fusejax.stages.merge_recipes import extended, flags_to_parameters, read_recipes

if TYPE_CHECKING:  # a merge of files needs neither Orbax nor the configuration of runs
    from fusejax.config import MergeConfig
    from fusejax.stages.command import Result
    from fusejax.stages.context import Run
    from fusejax.stages.merge_files import Job, Options


def merge_run(run: "Run") -> list[Manifest]:
    """Makes every merge of a run's trained targets that is not made yet.

    Raises:
      InputError: a target is not there; told before anything is merged.
    """
    for merge in run.config.merge:
        for arm in run.config.merge_targets(merge):
            if not (run.model_dir(arm) / MANIFEST).is_file():
                raise InputError(f"merge {merge.name!r} takes {run.model_dir(arm)}, which is not there: train it first")
    return [_merge_one(run, merge) for merge in run.config.merge]


def _merge_one(run: "Run", options: "MergeConfig") -> Manifest:
    """Merges trained targets of a run into a checkpoint, unless that is done."""
    from fusejax.io.models import model_fingerprint
    from fusejax.stages.context import finished
    from fusejax.stages.merge_files import Options, opened_job, perform

    arms = list(run.config.merge_targets(options))
    base = run.model_path(run.config.target)
    settings = {"method": options.method, "parameters": options.parameters, "targets": arms}
    parents = {arm: model_fingerprint(run.model_dir(arm)) for arm in arms}
    parents["base"] = run.fingerprint(run.config.target)
    directory = run.model_dir(options.name)
    if done := finished(directory, kind="model", settings=settings, parents=parents):
        return done
    run.replace_stale(directory)
    recipe: dict[str, Any] = {
        "method": options.method,
        "base": str(base),
        "targets": [str(run.model_dir(arm)) for arm in arms],
    }
    recipe["parameters"] = dict(options.parameters)
    if options.method == "slerp" and len(arms) > 1:
        del recipe["base"]  # the arc goes from one target to the other
    directory.parent.mkdir(parents=True, exist_ok=True)
    how = Options(checkpoint=True, settings=settings, parents=parents)
    scratch = tempfile.TemporaryDirectory(prefix=f".{options.name}.", dir=directory.parent)
    with scratch as place, opened_job(recipe, {}, scratch=Path(place)) as job:
        perform(job, directory, how)
    return read_manifest(directory)


def command(name: str, words: list[str]) -> "Result":
    """`fusejax merge --method M --base DIR --targets DIR DIR --out DIR`, `--recipe FILE`, or `merge CONFIG`."""
    if words and not words[0].startswith("-"):
        from fusejax.stages.run import command as run_command

        return run_command(name, words)
    given, extra = _arguments(name).parse_known_args(words)
    recipes = _recipes(given, flags_to_parameters(extra))
    refuse_occupied(given.out)
    return _explain(recipes) if given.explain else _merge(recipes, given)


def _arguments(name: str) -> argparse.ArgumentParser:
    from fusejax.stages.merge_scan import NONFINITE

    made = argparse.ArgumentParser(
        prog=f"fusejax {name}",
        description=f"Merge models in parameter space. Methods: {_methods()}. Parameters of a method: --name value.",
        epilog="--json prints one JSON object as the last line of standard output.",
        allow_abbrev=False,
    )
    made.add_argument("--method", help="merge method")
    made.add_argument("--base", help="model the targets were trained from: directory or hub name")
    made.add_argument("--targets", nargs="+", default=[], help="models to merge: directories or hub names")
    made.add_argument("--recipe", type=Path, help="YAML: method, base, targets, parameters, or a recipe of mergekit")
    made.add_argument("--into", type=Path, help="a finished merge (linear, task_arithmetic) to add --targets to")
    made.add_argument("--out", type=Path, required=True, help="new directory")
    made.add_argument("--format", choices=("hf", "checkpoint"), default="hf", help="what to write (default hf)")
    made.add_argument("--dtype", help="dtype of the output (default: of the inputs)")
    made.add_argument("--tokenizer", help="base, union or truncate, where vocabularies differ")
    made.add_argument("--nonfinite", choices=NONFINITE, default="error", help="what a NaN in an input does")
    made.add_argument("--threads", type=int, default=0, help="workers (default: processors, at most 8)")
    made.add_argument("--mesh", help="merge on devices, such as data=1,fsdp=8,tensor=1")
    made.add_argument("--explain", action="store_true", help="say what would be done, and stop")
    return made


def _recipes(given: argparse.Namespace, parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """The recipes of all stages; flags go into the last."""
    if given.into and (given.recipe or given.method or given.base):
        raise InputError("--into takes the recipe of the merge it adds to; leave --recipe, --method and --base out")
    if given.into:
        if not given.targets:
            raise InputError("--into needs --targets, the models to add")
        recipes = [extended(given.into, given.targets, parameters)]
    else:
        recipes = read_recipes(given.recipe) if given.recipe else [{}]
        last = recipes[-1]
        flags = {"method": given.method, "base": given.base, "targets": given.targets}
        last |= {key: value for key, value in flags.items() if value}
        if parameters:
            last["parameters"] = (last.get("parameters") or {}) | parameters
        if not given.recipe and not (given.method and given.targets and (given.base or not _needs_base(given.method))):
            raise InputError("merge needs --method, --base and --targets, or a --recipe that has them")
    recipes[-1] |= {key: value for key in ("dtype", "tokenizer") if (value := getattr(given, key))}
    return recipes


def _needs_base(method: str) -> bool:
    return method not in MERGE_METHODS or MERGE_METHODS[method].needs_base


def _merge(recipes: list[dict[str, Any]], given: argparse.Namespace) -> "Result":
    from fusejax.stages.command import Result
    from fusejax.stages.merge_files import opened_job

    stages = given.out.with_name(f".{given.out.name}.stages")
    places: dict[str, Path] = {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    options = _options(given)
    with tempfile.TemporaryDirectory(prefix=f".{given.out.name}.", dir=given.out.parent) as scratch:
        for read in recipes[:-1]:
            place = places[read["name"]] = stages / read["name"]
            with opened_job(read, places, scratch=Path(scratch)) as job:
                _perform_stage(job, place, options._replace(checkpoint=False))
        with opened_job(recipes[-1], places, scratch=Path(scratch)) as job:
            record = _perform(job, given.out, options)
            targets, method = job.targets, job.recipe.method
            base = job.recipe.base
    shutil.rmtree(stages, ignore_errors=True)
    inputs = {model: facts["xxh3"] for model, facts in record["inputs"].items()}
    data = {
        "method": method,
        "parameters": dict(recipes[-1].get("parameters") or {}),
        "base": {base: inputs.get(base, "")} if base else {},
        "targets": {target: inputs[target] for target in targets},
        "tensors": record["tensors"],
        "skipped": record["skipped"],
        "notes": record["notes"],
        "out": str(given.out),
    }
    data["fingerprint"] = fingerprint_of({key: value for key, value in data.items() if key != "out"})
    text = f"{method} of {len(targets)} targets -> {given.out}"
    text += "".join(f"\nnote: {note}" for note in record["notes"])
    if record["skipped"]:
        text += f"\n{len(record['skipped'])} tensors are the base's, as an input was not finite; see README.md there"
    return Result(data, text)


def _perform(job: "Job", out: Path, options: "Options") -> dict[str, Any]:
    from fusejax.stages.merge_files import perform

    return perform(job, out, options)


def _perform_stage(job: "Job", place: Path, options: "Options") -> None:
    """Makes an intermediate model, unless a killed merge has left it finished."""
    import json

    from fusejax.stages.merge_files import RECORD, identity_of

    if (place / RECORD).is_file():
        if json.loads((place / RECORD).read_text(encoding="utf-8"))["identity"] == identity_of(job, options):
            return
        shutil.rmtree(place)
    _perform(job, place, options)


def _options(given: argparse.Namespace) -> "Options":
    from fusejax.stages.merge_files import Options

    if given.threads < 0:
        raise InputError(f"--threads must be at least 1, got {given.threads}")
    return Options(given.threads, given.nonfinite, _mesh(given.mesh), given.format == "checkpoint")


def _mesh(text: str | None) -> Any:
    if text is None:
        return None
    from fusejax.parallel import make_mesh

    try:
        sizes = {key: int(value) for key, value in (part.split("=") for part in text.split(","))}
        if unknown := set(sizes) - {"data", "fsdp", "tensor"}:
            raise ValueError(f"unknown axes {sorted(unknown)}")
        return make_mesh(data=sizes.get("data", 1), fsdp=sizes.get("fsdp", 1), tensor=sizes.get("tensor", 1))
    except ValueError as error:
        raise InputError(f"--mesh must be like data=1,fsdp=8,tensor=1, got {text!r}: {error}") from error


def _explain(recipes: list[dict[str, Any]]) -> "Result":
    from fusejax.stages.command import Result
    from fusejax.stages.merge_explain import explain, explanation_text
    from fusejax.stages.merge_files import opened_job

    stages, planned = [], {}
    for read in recipes:
        with opened_job(read, {}, planned=planned) as job:
            stages.append(explain(job))
        if "name" in read:
            planned[read["name"]] = job
    text = "\n\n".join(explanation_text(found) for found in stages)
    return Result(stages[0] if len(stages) == 1 else {"stages": stages}, text)


def _methods() -> str:
    return ", ".join(sorted(MERGE_METHODS))
