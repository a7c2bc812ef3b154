"""An experiment: one configuration of a run, the arms that differ from it, and the seeds they are repeated with.

`{seed}`, `{models}` and `{data}` in strings stand for the seed, the directory of models that experiments share and
the directory of data. `extends: other.yaml` begins with another experiment's `run`.
"""

__all__ = ["ArmConfig", "ExperimentConfig", "load_experiment", "run_config_of"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from fusejax.config.base import NAME, Config
from fusejax.config.run import RunConfig, explain
from fusejax.errors import InputError, nearest


class ArmConfig(Config):
    """One way to make a model (or an ensemble), compared with the others on the same text."""

    name: str = Field(description="Row of the results.", min_length=1, max_length=60)
    set: dict[str, Any] = Field(
        default_factory=dict, description="Changes of the run: `align.chain: true`; `fusion.method` is the fusion's."
    )
    clm_weight: float | None = Field(
        default=None, ge=0, le=1, description="In short for loss.clm_weight, and 1 minus it for loss.fusion_weight."
    )
    clm: bool = Field(default=False, description="Train on CLM alone; the fusion only gives the order of the text.")
    model: str | None = Field(default=None, description="Train nothing: `target`, `source:NAME`, or a directory.")
    ensemble: tuple[str, ...] = Field(default=(), description="Mean probability of models and arms.")
    merge: dict[str, Any] | None = Field(
        default=None, description="method, base, targets (models or arms) and parameters of a merge."
    )
    seeds: tuple[int, ...] | None = Field(default=None, description="Other seeds than the experiment's.")
    tune: bool = Field(default=False, description="Choose `tune` of the experiment for this arm, on valid text.")
    tuned_as: str | None = Field(default=None, description="Take what was chosen for another arm.")

    @model_validator(mode="after")
    def _one_kind(self) -> "ArmConfig":
        kinds = {"clm": self.clm, "model": self.model, "ensemble": self.ensemble, "merge": self.merge}
        given = [name for name, value in kinds.items() if value]
        if len(given) > 1:
            raise ValueError(f"arm {self.name!r} is {' and '.join(given)}: these exclude each other")
        if self.merge is not None and not {"method", "targets"} <= set(self.merge):
            raise ValueError(f"arm {self.name!r}: merge needs method and targets, got {sorted(self.merge)}")
        if not self.trains and (self.tune or self.tuned_as):
            raise ValueError(f"arm {self.name!r} trains nothing, so nothing is tuned for it")
        return self

    @property
    def trains(self) -> bool:
        """Whether the arm trains a model itself."""
        return not (self.model or self.ensemble or self.merge)

    @property
    def members(self) -> tuple[str, ...]:
        """Models and arms that it is made of."""
        if self.merge is None:
            return self.ensemble
        base = self.merge.get("base")
        return (*([base] if base else []), *self.merge["targets"])


class ExperimentConfig(Config):
    """A question, and the arms that answer it."""

    name: str = Field(description="Name of the results' files.", pattern=NAME)
    title: str = Field(description="Heading of the results.")
    question: str = Field(default="", description="What is asked, for the reader of the results.")
    extends: str | None = Field(default=None, description="Experiment file whose `run` is the beginning of this one's.")
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1, description="Of target, order and training.")
    run: dict[str, Any] = Field(description="Configuration of a run; `fusion` in place of `fusions`.")
    baseline: str = Field(default="clm", description="Arm that all are compared with, seed by seed.")
    tune: dict[str, tuple[Any, ...]] = Field(default_factory=dict, description="One setting -> values to choose from.")
    arms: tuple[ArmConfig, ...] = Field(min_length=1)
    scales: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="Name -> changes of the run for other sizes, such as `gpu`."
    )

    @model_validator(mode="after")
    def _names_agree(self) -> "ExperimentConfig":
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"arms must have different names, got {names}")
        if self.baseline not in names:
            raise ValueError(f"baseline {self.baseline!r} is no arm.{nearest(self.baseline, names)}")
        if len(self.tune) > 1:
            raise ValueError(f"tune one setting, got {sorted(self.tune)}")
        by_name = {arm.name: arm for arm in self.arms}
        for arm in self.arms:
            if (arm.tune or arm.tuned_as) and not self.tune:
                raise ValueError(f"arm {arm.name!r} is tuned, but `tune` gives no values")
            if arm.tuned_as and not (arm.tuned_as in by_name and by_name[arm.tuned_as].tune):
                raise ValueError(f"arm {arm.name!r} is tuned as {arm.tuned_as!r}, which is no arm with `tune: true`")
        return self

    def arm(self, name: str) -> ArmConfig:
        """The arm of a name."""
        return next(arm for arm in self.arms if arm.name == name)

    def seeds_of(self, arm: ArmConfig) -> tuple[int, ...]:
        """The seeds of an arm."""
        return self.seeds if arm.seeds is None else arm.seeds


def load_experiment(path: Path, *, scale: str | None = None) -> ExperimentConfig:
    """Reads an experiment; of `extends` the run is taken, and changed by this one's.

    Raises:
      InputError: no such file, no YAML mapping, unknown keys, or no such scale.
    """
    values = _mapping(path)
    if values.get("extends"):
        base = load_experiment(path.parent / values["extends"])
        values["run"] = _merged(base.run, values.get("run") or {})
        values["scales"] = base.scales | (values.get("scales") or {})
    try:
        found = ExperimentConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, str(path), ExperimentConfig) from error
    if scale is None:
        return found
    if scale not in found.scales:
        known = ", ".join(found.scales) or "none"
        raise InputError(f"{path} has no scale {scale!r}; it has: {known}")
    return found.model_copy(update={"run": _merged(found.run, found.scales[scale])})


def _mapping(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no experiment at {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}, expected a mapping")
    return values


def run_config_of(
    experiment: ExperimentConfig,
    arm: ArmConfig,
    *,
    seed: int,
    chosen: Any = None,
    places: Mapping[str, str],
    output: str,
) -> RunConfig:
    """The configuration of one arm with one seed.

    Args:
      experiment: the whole.
      arm: one of its arms.
      seed: of target, order and training.
      chosen: the value of the setting that is tuned; None: as the run has it.
      places: what `{models}` and `{data}` stand for.
      output: directory.

    Raises:
      InputError: the arm changes what there is not, or the result is no valid configuration.
    """
    values = _merged(experiment.run, {})
    changes = dict(arm.set)
    if arm.clm_weight is not None:
        changes |= {"loss.clm_weight": arm.clm_weight, "loss.fusion_weight": round(1 - arm.clm_weight, 12)}
    if chosen is not None:
        changes |= dict.fromkeys(experiment.tune, chosen)
    for key, value in changes.items():
        _set(values, key.split("."), value)
    values = _filled(values, {"seed": str(seed)} | dict(places))
    fusion = {"name": "fused"} | values.pop("fusion", {})
    values |= {"output": output, "seed": seed, "fusions": [fusion]}
    where = f"experiment {experiment.name}, arm {arm.name!r}"
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, where) from error


def _merged(base: Any, changes: Any) -> Any:
    """A deep copy of mappings, with changes. A dotted key reaches into a mapping.

    Lists are replaced, but for those whose entries have names: there an entry changes its namesake, or is added.
    """
    if _named(base) and _named(changes):
        new = {entry["name"]: entry for entry in changes}
        made = [_merged(entry, new.pop(entry["name"], {})) for entry in base]
        return [*made, *(_merged(entry, {}) for entry in new.values())]
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    made = {key: _merged(value, {}) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in changes.items():
        if "." in key:
            _set(made, key.split("."), value)
        else:
            made[key] = _merged(made[key], value) if isinstance(made.get(key), dict | list) else value
    return made


def _named(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(e, dict) and "name" in e for e in value)


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    *parents, last = path
    place: Any = values
    for key in parents:
        if isinstance(place, list):
            place = place[int(key)] if key.isdecimal() and int(key) < len(place) else None
        else:
            place = place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise InputError(f"cannot set {'.'.join(path)}: {key!r} holds {place!r}")
    if isinstance(place, list):
        place[int(last)] = value
    else:
        place[last] = value


def _filled(value: Any, places: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, places) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(inner, places) for inner in value]
    if not isinstance(value, str):
        return value
    if value == "{seed}":
        return int(places["seed"])
    for name, text in places.items():
        value = value.replace("{" + name + "}", text)
    return value
