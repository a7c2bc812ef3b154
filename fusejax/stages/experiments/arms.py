"""Making the rows of an experiment: one arm with one seed is trained (or merged, or taken as it is) and evaluated.

A row is kept as JSON under a name that follows from what determines it, so an experiment that was stopped goes on,
and several processes may work on one: each takes the rows that nobody has begun.
"""

__all__ = ["Lab", "Row"]

import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fusejax
from fusejax.config import ModelRef, RunConfig
from fusejax.config.experiment import ArmConfig, ExperimentConfig, run_config_of
from fusejax.data.corpus import read_corpus
from fusejax.errors import InputError, nearest
from fusejax.evaluation import Evaluation, by_domain, ensemble_evaluations
from fusejax.io.manifest import read_manifest, write_json
from fusejax.io.models import model_fingerprint
from fusejax.merging.registry import resolve
from fusejax.report import read_series
from fusejax.stages.capture import describe
from fusejax.stages.context import finished
from fusejax.stages.evaluate import score_texts
from fusejax.stages.experiments.shared import SharedRun, key_of
from fusejax.stages.lock import exclusive
from fusejax.stages.run import STAGES
from fusejax.stages.train import train_arm

_BEFORE_TRAINING = ("prepare", "capture", "align", "fuse")
SPLITS = ("valid", "test")
_CURVE = "eval/valid_bits_per_byte"


def _check_merge(name: str, recipe: dict[str, Any]) -> None:
    """Refuses a merge that could not be made once its models have been trained."""
    method, has_base, count = str(recipe["method"]), recipe.get("base") is not None, len(recipe["targets"])
    try:
        resolve(method, recipe.get("parameters") or {}, count, has_base)
        if method == "slerp" and has_base and count > 1:
            raise InputError(f"{method} goes from the base to one other model; leave the base out or give one target.")
    except InputError as error:
        raise InputError(f"arm {name!r}: {error}") from error


def _whole(config: RunConfig) -> dict[str, Any]:
    """All of a configuration, defaults too: a row must not be taken for that of another version's default."""
    return config.model_dump(mode="json", exclude={"output"})


class Row(NamedTuple):
    """What one arm with one seed came to."""

    arm: str
    seed: int
    chosen: Any  # value of the setting that is tuned, None where none is
    bits_per_byte: dict[str, dict[str, float]]  # split -> domain (and "mean") -> bits per byte
    tokens: int  # that were trained on
    seconds: float  # of training and evaluating
    supervised: float | None  # share of the positions that have a distribution
    curve: dict[str, list[float]]  # "tokens" and "valid", over the training


class Lab:
    """An experiment with a directory to work in."""

    def __init__(self, experiment: ExperimentConfig, directory: Path, *, data: Path):
        """Opens nothing yet.

        Args:
          experiment: what is asked.
          directory: of all artefacts; experiments share it, and so what they have in common.
          data: what `{data}` stands for.
        """
        self.experiment, self.directory = experiment, Path(directory)
        self._places = {"models": str(self.directory / "pretrained"), "data": str(data)}
        self._chosen: dict[str, Any] = {}

    def config(self, arm: ArmConfig, seed: int, chosen: Any = None) -> RunConfig:
        """The configuration of one arm's run."""
        return run_config_of(
            self.experiment, arm, seed=seed, chosen=chosen, places=self._places, output=str(self.directory)
        )

    def check(self) -> None:
        """Refuses an experiment of which some arm is no valid configuration or is made of what there is not."""
        names = [arm.name for arm in self.experiment.arms]
        for arm in self.experiment.arms:
            if arm.merge is not None:
                _check_merge(arm.name, arm.merge)
            for seed in self.experiment.seeds_of(arm):
                config = self.config(arm, seed)
                known = ["target", *(f"source:{source.name}" for source in config.sources), *names]
                for member in (*arm.members, *([arm.model] if arm.model else [])):
                    if "/" not in member and member not in known:
                        raise InputError(
                            f"arm {arm.name!r} is made of {member!r}.{nearest(member, known)} "
                            f"Models and arms: {', '.join(known)}"
                        )

    def row(self, arm: ArmConfig, seed: int) -> Row:
        """Makes a row, or reads it where it has been made."""
        return self._row(arm, seed, self._setting(arm))

    def _setting(self, arm: ArmConfig) -> Any:
        """The value that is chosen for an arm on valid text, with its first seed."""
        if arm.tuned_as:
            return self._setting(self.experiment.arm(arm.tuned_as))
        if not arm.tune:
            return None
        if arm.name not in self._chosen:
            seed = self.experiment.seeds_of(arm)[0]
            (values,) = self.experiment.tune.values()
            rows = [self._row(arm, seed, value) for value in values]
            self._chosen[arm.name] = min(rows, key=lambda row: row.bits_per_byte["valid"]["mean"]).chosen
        return self._chosen[arm.name]

    def _row(self, arm: ArmConfig, seed: int, chosen: Any) -> Row:
        config = self.config(arm, seed, chosen)
        inner = [self.experiment.arm(name) for name in self._arms_in(arm)]
        made_of = [_whole(self.config(other, seed, self._setting(other))) for other in inner]
        kind = [arm.clm, arm.model, arm.ensemble, arm.merge]
        key = key_of(_whole(config), kind, made_of, fusejax.__version__)
        rows = self.directory / "rows"
        rows.mkdir(parents=True, exist_ok=True)
        path = rows / f"{key}.json"
        with exclusive(rows, wait=True, name=f".{key}.lock"):
            if not path.is_file():
                found = self._make(arm, seed, SharedRun(config))
                write_json(path, found._replace(arm=arm.name, seed=seed, chosen=chosen)._asdict())
        return Row(**json.loads(path.read_text()))._replace(arm=arm.name, seed=seed)

    def _arms_in(self, arm: ArmConfig) -> list[str]:
        names = {other.name for other in self.experiment.arms}
        return [member for member in arm.members if member in names]

    def _make(self, arm: ArmConfig, seed: int, run: SharedRun) -> Row:
        STAGES["pretrain"](run)  # which has locks of its own
        with exclusive(self.directory, wait=True, name=f".artefacts-{run.corpus_dir.name}.lock"):
            for stage in _BEFORE_TRAINING if arm.trains else _BEFORE_TRAINING[:1]:
                STAGES[stage](run)
        start = time.monotonic()
        paths = [self._path(arm, seed, run, name) for name in self._evaluated(arm)]
        scores = {split: self._scores(run, paths, split) for split in SPLITS}
        facts = read_manifest(paths[0]).facts if arm.trains else {}
        return Row(
            arm.name,
            seed,
            None,
            scores,
            tokens=int(facts.get("tokens", 0)),
            seconds=round(time.monotonic() - start, 1),
            supervised=self._supervised(run) if arm.trains and not arm.clm else None,
            curve=self._curve(run, arm) if arm.trains else {},
        )

    def _evaluated(self, arm: ArmConfig) -> Sequence[str]:
        return arm.ensemble or [arm.model or arm.name]

    def _path(self, arm: ArmConfig, seed: int, run: SharedRun, name: str) -> Path:
        """The directory of a model that an arm is, or is made of; arms are trained or merged first."""
        if name == "target":
            return run.model_path(run.config.target)
        if name.startswith("source:"):
            ref = next(source for source in run.config.sources if source.name == name.removeprefix("source:"))
            return run.model_path(ref)
        if name == arm.name and arm.merge is not None:
            return self._merged(arm, seed, run)
        if name == arm.name:
            made = "clm" if arm.clm else "fused"
            with exclusive(run.directory, wait=True, name=f".{run.model_dir(made).name}.lock"):
                train_arm(run, made, run.fused_dir("fused"))
            return run.model_dir(made)
        if name in {other.name for other in self.experiment.arms}:
            inner = self.experiment.arm(name)
            self.row(inner, seed)
            return self._path(inner, seed, SharedRun(self.config(inner, seed, self._setting(inner))), name)
        return run.model_path(ModelRef(model=name.format(seed=seed, **self._places), name="model"))

    def _merged(self, arm: ArmConfig, seed: int, run: SharedRun) -> Path:
        from fusejax.stages.merge_files import Options, opened_job, perform

        recipe: dict[str, Any] = {"parameters": {}} | dict(arm.merge or {})
        recipe["targets"] = [str(self._path(arm, seed, run, name)) for name in recipe["targets"]]
        if "base" in recipe:
            recipe["base"] = str(self._path(arm, seed, run, recipe["base"]))
        inputs = [*recipe["targets"], *([recipe["base"]] if "base" in recipe else [])]
        parents = {str(number): model_fingerprint(Path(path)) for number, path in enumerate(inputs)}
        settings = {"method": recipe["method"], "parameters": recipe["parameters"]}
        directory = self.directory / "models" / f"merged-{key_of(settings, parents)}"
        directory.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(directory.parent, wait=True, name=f".{directory.name}.lock"):
            if not finished(directory, kind="model", settings=settings, parents=parents):
                how = Options(checkpoint=True, settings=settings, parents=parents)
                scratch = tempfile.TemporaryDirectory(prefix=".merged.", dir=directory.parent)
                with scratch as place, opened_job(recipe, {}, scratch=Path(place)) as job:
                    perform(job, directory, how)
        return directory

    def _scores(self, run: SharedRun, paths: Sequence[Path], split: str) -> dict[str, float]:
        """Bits per byte by domain, of a model or of the mean of several."""
        documents = read_corpus(run.corpus_dir, split)[:]
        domains = [document.domain for document in documents]
        found = [self._evaluation(run, path, documents) for path in paths]
        return by_domain(found[0] if len(found) == 1 else ensemble_evaluations(found), domains)

    def _evaluation(self, run: SharedRun, path: Path, documents: Sequence[Any]) -> Evaluation:
        options = run.config.evaluate
        ref = self._ref(run, path)
        names = [document.id for document in documents]
        return score_texts(
            describe(run, ref),
            run.tokenizer(ref),
            names,
            encoded=dict(zip(names, run.encoder(ref).encode_batch(documents), strict=True)),
            context=options.context,
            batch_tokens=max(options.batch_tokens, options.context),
            label=path.name,
        )

    @staticmethod
    def _ref(run: SharedRun, path: Path) -> ModelRef:
        """The model as the configuration has it (a source renders chat by its own template), else as the target is."""
        for ref in (*run.config.sources, run.config.target):
            if Path(ref.model) == path:
                return ref
        return ModelRef(model=str(path), name="model", chat_template=run.config.target.chat_template)

    @staticmethod
    def _supervised(run: SharedRun) -> float:
        facts = read_manifest(run.fused_dir("fused")).facts
        return facts["supervised"] / max(facts["positions"], 1)

    @staticmethod
    def _curve(run: SharedRun, arm: ArmConfig) -> dict[str, list[float]]:
        path = run.train_dir("clm" if arm.clm else "fused") / "metrics.jsonl"
        steps, values = read_series(path).get(_CURVE, ([], [])) if path.is_file() else ([], [])
        per_step = run.config.train.batch_size * run.config.train.seq_len
        return {"tokens": [step * per_step for step in steps], "valid": values} if steps else {}
