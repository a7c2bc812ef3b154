"""One merge from recipe to directory: open, plan, refuse, stream, and say what was done.

Everything that can be known from headers is checked before a byte is written. The output is made in a directory
beside its place (`fusejax.io.stream_write`): weights, configuration, tokenizer and other small files of the base, a
model card with the recipe and the hashes of the inputs, `merge.json` with the same for programs, and for methods with
coefficients `coefficients.json` and a heat map.
"""

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from fusejax.errors import InputError
from fusejax.io.hf import TOKENIZER_FILES
from fusejax.io.manifest import fingerprint_of, write_json
from fusejax.io.models import resolve_model
from fusejax.io.progress import progress
from fusejax.io.stream_read import ModelTensors, StoredTensor, equal_tensors, open_tensors
from fusejax.io.stream_tokens import extended_tokenizer, read_tokens
from fusejax.io.stream_write import Staging, TensorWriter, open_staging, refuse_occupied
from fusejax.merging.plan import MergePlan, ModelFacts, TensorSpec
from fusejax.merging.planner import plan_merge
from fusejax.merging.recipe import Recipe, parse_recipe
from fusejax.stages.merge_configs import compare_configs, output_config, read_config
from fusejax.stages.merge_engine import Made, carry_out
from fusejax.stages.merge_scan import Scan, scan_inputs

__all__ = ["RECORD", "Job", "Options", "identity_of", "opened_job", "perform"]

RECORD = "merge.json"


class Options(NamedTuple):
    """How a merge is carried out; nothing here changes its values."""

    threads: int = 0  # 0: as many as there are processors, at most 8
    nonfinite: str = "error"
    mesh: Any = None
    checkpoint: bool = False  # write a fusejax checkpoint, not a Hugging Face directory
    settings: Mapping[str, Any] | None = None  # of the checkpoint's manifest; None: the recipe
    parents: Mapping[str, str] | None = None  # and the fingerprints there; None: the inputs' hashes


class Job(NamedTuple):
    """A merge that is planned, its inputs open."""

    read: Mapping[str, Any]  # the recipe as it was given
    recipe: Recipe
    plan: MergePlan
    directories: Mapping[str, Path]  # of every model
    models: Mapping[str, ModelTensors]
    configs: Mapping[str, Mapping[str, Any]]  # every model's config.json

    @property
    def targets(self) -> list[str]:
        """The models whose coefficients are counted, in order."""
        return list(dict.fromkeys(ref.model for step in self.plan.tensors for ref in step.targets))


@contextlib.contextmanager
def opened_job(
    read: Mapping[str, Any], directories: Mapping[str, Path], *, scratch: Path | None = None,
    planned: Mapping[str, Job] | None = None,
) -> Iterator[Job]:  # fmt: skip
    """Opens the models of a recipe and plans the merge; reads headers only.

    Args:
        read: the recipe, a mapping as YAML gives it.
        directories: where models lie whose name is no directory and no hub name.
        scratch: where checkpoints are unpacked.
        planned: earlier stages by name, whose results need not exist yet; the job then serves to be explained.

    Raises:
        InputError: whatever makes the merge impossible or senseless.
    """
    recipe = parse_recipe(read)
    listed = [source.model for piece in recipe.slices for source in piece.sources]
    chosen = [recipe.tokenizer] if recipe.tokenizer not in (None, "base", "union", "truncate") else []
    names: list[str] = list(dict.fromkeys(name for name in [recipe.base, *listed, *chosen] if name is not None))
    planned = {name: job for name, job in (planned or {}).items() if name in names}
    places = {name: job.directories[_template(job)] for name, job in planned.items()}
    places |= {name: directories.get(name) or resolve_model(name) for name in names if name not in planned}
    with contextlib.ExitStack() as stack:
        models = {name: _result(job) for name, job in planned.items()}
        for name in names:
            if name not in planned:
                models[name] = stack.enter_context(open_tensors(places[name], scratch=scratch))
        facts = {name: _facts(models[name], places[name], planned.get(name)) for name in names}
        plan = plan_merge(recipe, facts)
        configs = {name: _config(planned[name]) if name in planned else read_config(places[name]) for name in names}
        template = {name: configs[name] for name in (recipe.tokenizer, plan.template) if name in configs}
        plan = plan._replace(notes=(*plan.notes, *compare_configs(template | configs)))
        job = Job(read, recipe, plan, places, models, configs)
        _refuse_twins(job, set(planned))
        yield job


def perform(job: Job, out: Path, options: Options) -> dict[str, Any]:
    """Carries a job out and returns its record, which is also written as `merge.json`.

    Raises:
        InputError: an output directory with something in it, an input that is not finite.
    """
    plan = job.plan
    shapes = {step.output: _output_spec(job, step) for step in plan.tensors}
    identity = identity_of(job, options)
    out.parent.mkdir(parents=True, exist_ok=True)
    threads = options.threads or min(os.cpu_count() or 1, 8)
    refuse_occupied(out)
    scan = scan_inputs(plan, job.models, nonfinite=options.nonfinite, threads=threads, sums=options.mesh is None)
    with open_staging(out, identity) as staging:
        _small_files(job, staging)  # first: what is wrong with them is found before hours of work
        writer = TensorWriter(staging.directory, shapes)
        try:
            with progress("merge", total=writer.total, unit="bytes") as bar:
                made = carry_out(
                    plan, job.models, writer, staging, threads=threads, skipped=scan.skipped,
                    mesh=options.mesh, known=scan.energies, tick=bar.update,
                )  # fmt: skip
            writer.finish()
        finally:
            writer.close()
        record = _record(job, made, scan, identity)
        _reports(job, staging, made, record)
        if options.checkpoint:
            from fusejax.stages.merge_checkpoint import convert_in_place

            inputs = {name: facts["xxh3"] for name, facts in record["inputs"].items()}
            convert_in_place(
                staging.directory,
                settings=options.settings or {"recipe": record["recipe"]},
                parents=inputs if options.parents is None else options.parents,
            )
    return record


def identity_of(job: Job, options: Options) -> str:
    """Returns a hash of everything that determines the output of a job."""
    shapes = [(step.output, *_output_spec(job, step)) for step in job.plan.tensors]
    models = {name: model.identity for name, model in job.models.items()}
    kind = [options.nonfinite, options.checkpoint]
    return fingerprint_of({"recipe": job.read, "models": models, "options": kind, "tensors": shapes})


class _Planned(NamedTuple):
    """A tensor that an earlier stage will write."""

    shape: tuple[int, ...]
    dtype: str
    where: str

    def load(self) -> StoredTensor:
        raise RuntimeError(f"{self.where} is not made yet")

    def read_into(self, start: int, out: Any) -> None:
        self.load()


def _result(job: Job) -> ModelTensors:
    """What a job will write, without values."""
    name = str(job.read["name"])
    tensors: dict[str, StoredTensor] = {
        step.output: _Planned(*_output_spec(job, step), name) for step in job.plan.tensors
    }
    return ModelTensors(job.directories[_template(job)], tensors, [], name)


def _facts(model: ModelTensors, directory: Path, planned: Job | None) -> ModelFacts:
    specs = {name: TensorSpec(tensor.shape, tensor.dtype) for name, tensor in model.tensors.items()}
    if planned is not None and planned.plan.rows:
        return ModelFacts(specs, {token: i for i, token in enumerate(planned.plan.tokens) if token is not None})
    return ModelFacts(specs, read_tokens(directory))


def _refuse_twins(job: Job, planned: Collection[str]) -> None:
    """A target given twice would get twice its weight without being asked for."""
    targets = [name for name in job.targets if name not in planned]
    for j, name in enumerate(targets):
        for other in targets[:j]:
            same = job.directories[name].resolve() == job.directories[other].resolve()
            if same or equal_tensors(job.models[name], job.models[other]):
                raise InputError(
                    f"the same model is given twice as a target: {other} and {name}; give it once, with a weight"
                )


def _output_spec(job: Job, step: Any) -> tuple[tuple[int, ...], str]:
    ref = step.base or step.targets[0]
    shape = tuple(job.models[ref.model].tensors[ref.name].shape)
    if step.vocabulary and job.plan.rows:
        shape = (len(job.plan.rows[ref.model]), *shape[1:])
    return shape, step.dtype


def _small_files(job: Job, staging: Staging) -> None:
    """Configuration, tokenizer, chat template and generation settings of the template."""
    source, plan = job.directories[_template(job)], job.plan
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, staging.directory / name)
    if job.recipe.tokenizer == "union" and plan.rows:
        (staging.directory / "tokenizer.json").write_text(extended_tokenizer(source, plan.tokens), encoding="utf-8")
    write_json(staging.directory / "config.json", _config(job))


def _config(job: Job) -> dict[str, Any]:
    dtypes = {step.output: step.dtype for step in job.plan.tensors}
    return output_config(job.plan, job.configs, _template(job), dtypes)


def _template(job: Job) -> str:
    """The model whose small files are copied; that of the chosen tokenizer where one is named."""
    chosen = job.recipe.tokenizer
    return chosen if chosen is not None and chosen in job.directories else job.plan.template


def _record(job: Job, made: Mapping[str, Made], scan: Scan, identity: str) -> dict[str, Any]:
    from fusejax import __version__

    return {
        "fusejax": __version__,
        "recipe": dict(job.read),
        "inputs": {
            name: {"xxh3": fingerprint_of(found), "tensors": len(found)} for name, found in scan.digests.items()
        },
        "output": fingerprint_of({tensor: found.xxh3 for tensor, found in made.items()}),
        "tensors": len(made),
        "skipped": dict(scan.skipped),
        "notes": list(job.plan.notes),
        "identity": identity,
    }


def _reports(job: Job, staging: Staging, made: Mapping[str, Made], record: dict[str, Any]) -> None:
    coefficients = {tensor: found.coefficients for tensor, found in made.items() if found.coefficients is not None}
    write_json(staging.directory / RECORD, record)
    if coefficients:
        write_json(staging.directory / "coefficients.json", coefficients)
    uniform = {len(factors) for factors in coefficients.values()}
    if job.recipe.method in ("sce", "varm") and uniform == {len(job.targets)}:
        from fusejax.report.coefficients import plot_coefficients

        names = [Path(name).name for name in job.targets]
        plot_coefficients(coefficients, names, staging.directory / "coefficients.png")
    (staging.directory / "README.md").write_text(_card(job, record, coefficients), encoding="utf-8")


def _card(job: Job, record: Mapping[str, Any], coefficients: Mapping[str, list[float]]) -> str:
    base = job.recipe.base
    lines = ["---", "library_name: transformers", "tags:", "- merge", "- fusejax", "---", "", "# Merged model", ""]
    lines += [f"Made by fusejax {record['fusejax']} with `{job.recipe.method}`" + (f" from `{base}`." if base else ".")]
    lines += ["", "```yaml", yaml.safe_dump(dict(job.read), sort_keys=False).rstrip(), "```", "", "## Inputs", ""]
    lines += ["| model | tensors read | xxh3 of their bytes |", "|---|---|---|"]
    lines += [f"| `{name}` | {facts['tensors']} | `{facts['xxh3']}` |" for name, facts in record["inputs"].items()]
    if coefficients and len({len(c) for c in coefficients.values()}) == 1:
        means = [sum(c[j] for c in coefficients.values()) / len(coefficients) for j in range(len(job.targets))]
        lines += ["", "## Coefficients", "", "Mean over matrices; each of them is in `coefficients.json`.", ""]
        lines += [f"* `{name}`: {mean:.4f}" for name, mean in zip(job.targets, means, strict=True)]
        if job.recipe.method in ("sce", "varm"):
            lines += ["", "![coefficient of every matrix](coefficients.png)"]
    if record["skipped"]:
        lines += ["", "## Kept from the base, as an input was not finite", ""]
        lines += [f"* `{tensor}`: {', '.join(files)}" for tensor, files in record["skipped"].items()]
    if record["notes"]:
        lines += ["", "## Notes", "", *(f"* {note}" for note in record["notes"])]
    return "\n".join(lines) + "\n"
