"""A whole run: its configuration, read from YAML and written back."""

__all__ = ["RunConfig", "explain", "load_config", "save_config"]

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator

from fusejax.config.base import Config
from fusejax.config.inputs import CorpusConfig, ModelRef, pretrained_in_order
from fusejax.config.merges import MergeConfig, listed
from fusejax.config.pairwise import PairwiseConfig, written_out
from fusejax.config.stages import (
    AlignConfig,
    CaptureConfig,
    EvaluateConfig,
    FaultsConfig,
    FusionConfig,
    LogConfig,
    LossConfig,
    MemoryConfig,
    MeshConfig,
    TrainConfig,
)
from fusejax.errors import InputError, nearest

_ENSEMBLES = ("ensemble", "ensemble-weighted", "ensemble-top1")  # rows of the table
_RIVALS = {"uld": "index", "alm": "chunks"}  # divergence: what it needs of the alignment


class RunConfig(Config):
    """A whole run: corpus, sources, target, fusions, training, merge, evaluation."""

    output: str = Field(description="Directory of the run's artefacts.")
    seed: int = Field(default=0, ge=0, description="Seed of splits, data order and initialisation.")
    target: ModelRef = Field(description="The model that is trained.")
    sources: tuple[ModelRef, ...] = Field(description="The models whose distributions are fused.", min_length=1)
    corpus: CorpusConfig
    capture: CaptureConfig = CaptureConfig()
    align: AlignConfig = AlignConfig()
    fusions: tuple[FusionConfig, ...] = Field(
        default=(FusionConfig(),), min_length=1, description="Fusions; each trains one target. In short: pairwise."
    )
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    memory: MemoryConfig = MemoryConfig()
    mesh: MeshConfig = MeshConfig()
    faults: FaultsConfig = FaultsConfig()
    log: LogConfig = LogConfig()
    merge: tuple[MergeConfig, ...] = Field(
        default=(), description="One merge of trained targets, or a list of them; none: nothing is merged."
    )
    evaluate: EvaluateConfig = EvaluateConfig()
    export: str | None = Field(
        default=None, description="Trained or merged model to export. None: the first merge, else the first fusion."
    )

    @field_validator(
        "fusions", mode="before", json_schema_input_type=tuple[FusionConfig, ...] | PairwiseConfig | Literal["pairwise"]
    )
    @classmethod
    def _pairwise(cls, value: Any, info: ValidationInfo) -> Any:
        if "sources" not in info.data:  # they have errors of their own, which are told
            return [{}] if isinstance(value, dict | str) else value
        return written_out(value, [source.name for source in info.data["sources"]])

    @field_validator("merge", mode="before", json_schema_input_type=tuple[MergeConfig, ...] | MergeConfig | None)
    @classmethod
    def _merges(cls, value: Any) -> Any:
        return listed(value)

    @property
    def split_seed(self) -> int:
        """The seed of the corpus' splits."""
        return self.seed if self.corpus.seed is None else self.corpus.seed

    @model_validator(mode="after")
    def _names_agree(self) -> "RunConfig":
        names = [source.name for source in self.sources]
        fusions = [fusion.name for fusion in self.fusions]
        merges = [merge.name for merge in self.merge]
        for kind, found in (("sources", names), ("fusions", fusions), ("merges", merges)):
            if len(set(found)) < len(found):
                raise ValueError(f"{kind} must have different names, got {found}; set `name`")
        reserved = {"base", "target", "clm", *_ENSEMBLES, *(f"source-{name}" for name in names)}
        if bad := (reserved | {"merged"}) & set(fusions):
            raise ValueError(f"fusion names {sorted(bad)} are reserved")
        if bad := reserved & set(merges):
            raise ValueError(f"merge names {sorted(bad)} are reserved")
        if bad := set(fusions) & set(merges):
            raise ValueError(f"fusions and merges must have different names, both have {sorted(bad)}; set `name`")
        for fusion in self.fusions:
            if len(set(fusion.sources)) < len(fusion.sources):
                raise ValueError(f"fusion {fusion.name!r} names a source twice: {list(fusion.sources)}")
            if fusion.include_target and "target" in names:
                raise ValueError("a source may not be called 'target' beside include_target; set `name`")
            for name in fusion.sources:
                if name not in names:
                    raise ValueError(f"fusion {fusion.name!r} names source {name!r}; sources are {names}")
        self._models_exist(fusions + ["clm"] * self.train.baseline, merges)
        if "weighted" in self.evaluate.ensembles and not self.corpus.valid and not self.corpus.valid_fraction:
            raise ValueError("evaluate.ensembles weighted takes its weights from the valid split: set valid_fraction")
        if self.loss.clm_weight + self.loss.fusion_weight <= 0:
            raise ValueError("clm_weight and fusion_weight are both 0: nothing would be trained")
        return self

    def _models_exist(self, trained: list[str], merges: list[str]) -> None:
        for merge in self.merge:
            if bad := set(merge.targets) - set(trained):
                which = f"merge {merge.name!r}" if len(merges) > 1 else "merge"
                raise ValueError(f"{which} names targets {sorted(bad)}; trained are {trained}")
        if self.export is not None and self.export not in (made := trained + merges):
            raise ValueError(f"export names {self.export!r}.{nearest(self.export, made)} Models are {made}")

    @property
    def exported(self) -> str:
        """The model that `export` writes."""
        return self.export or [*(merge.name for merge in self.merge), self.fusions[0].name][0]

    def merge_targets(self, merge: MergeConfig) -> tuple[str, ...]:
        """The trained models that a merge takes."""
        return merge.targets or tuple(fusion.name for fusion in self.fusions)

    @property
    def pretrained(self) -> dict[str, ModelRef]:
        """The models that the run makes first, by `place_of` their directories, in the order in which it makes them."""
        return pretrained_in_order((self.target, *self.sources))

    @model_validator(mode="after")
    def _order_of_pretraining(self) -> "RunConfig":
        pretrained_in_order((self.target, *self.sources))
        return self

    @model_validator(mode="after")
    def _whole_logits(self) -> "RunConfig":
        whole = "capture.top_k all" if self.capture.top_k == "all" else None
        positions, divergence = self.align.positions, self.loss.divergence
        if divergence in _RIVALS or positions in _RIVALS.values():
            if _RIVALS.get(divergence) != positions:
                pairs = ", ".join(f"loss.divergence {a} with align.positions {b}" for a, b in _RIVALS.items())
                raise ValueError(
                    f"a rival's loss and its alignment need each other: {pairs}; got {divergence}, {positions}"
                )
            whole = f"loss.divergence {divergence}"
        of_chunks = self.loss.logits_dtype != "float32" or self.loss.z_loss_weight > 0
        if whole and (self.mesh.tensor > 1 or of_chunks):
            raise ValueError(
                f"{whole} is trained from whole logits: set mesh.tensor 1, loss.logits_dtype float32 and "
                "loss.z_loss_weight 0"
            )
        return self

    @property
    def training_attention(self) -> str:
        """The attention of the trained model; it is told where no row holds two documents."""
        plain = self.train.packing or self.memory.attention == "xla"
        return self.memory.attention if plain else f"{self.memory.attention}_rows"

    @property
    def plain_attention(self) -> str:
        """The attention of scoring and of plans, where cuDNN's cannot be had or is not worth it."""
        return "xla" if self.memory.attention == "cudnn" else self.memory.attention

    @model_validator(mode="after")
    def _rows_divide(self) -> "RunConfig":
        rows, cuts = self.train.batch_size, self.train.accumulation * self.mesh.data * self.mesh.fsdp
        if rows % cuts:
            raise ValueError(
                f"train.batch_size {rows} must be a multiple of train.accumulation * mesh.data * mesh.fsdp = {cuts}"
            )
        if self.memory.attention == "cudnn" and self.train.compute_dtype == "float32":
            raise ValueError("memory.attention cudnn computes in 16 bits: set train.compute_dtype bfloat16")
        if self.memory.sequence_parallel and self.train.seq_len % self.mesh.tensor:
            raise ValueError(
                f"memory.sequence_parallel needs a train.seq_len that is a multiple of mesh.tensor, got "
                f"{self.train.seq_len} and {self.mesh.tensor}"
            )
        return self


def explain(error: ValidationError, where: str, model: type[BaseModel] = RunConfig) -> InputError:
    """What is wrong with a configuration, in the words of its file: one line per key, unknown ones with the nearest."""
    lines, found = [], error.errors()
    for item in found:
        path = ".".join(map(str, item["loc"]))
        inner = any(other["loc"][: len(item["loc"])] == item["loc"] for other in found if other is not item)
        if item["type"] == "too_short" and inner:
            continue  # the tuple is short only because its entries are wrong
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            lines.append(f"{path}: unknown key.{nearest(str(item['loc'][-1]), known)} Known: {', '.join(known)}")
        else:
            secret = isinstance(item["input"], dict) or item["loc"][-1:] == ("url",)  # it may hold a password
            shown = "" if secret else f", got {item['input']!r}"
            lines.append(f"{path}: {item['msg'].removeprefix('Value error, ')}{shown}".removeprefix(": "))
    return InputError(f"{where} is not a valid configuration:\n  " + "\n  ".join(lines))


def _fields_at(model: type[BaseModel], location: tuple) -> list[str]:
    """The field names of the nested configuration class at an error's location."""
    for key in location:
        if isinstance(key, int) or key not in model.model_fields:
            continue
        found = [model.model_fields[key].annotation]
        while found:
            annotation = found.pop()
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                model = annotation
                break
            found.extend(getattr(annotation, "__args__", ()))
    return sorted(model.model_fields)


def load_config(path: str | Path) -> RunConfig:
    """Reads and validates a YAML configuration.

    Raises:
      InputError: the file is missing, is no YAML mapping, or has unknown keys or values out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no configuration file at {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}, expected a mapping of configuration keys")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain(error, str(path)) from error


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes the resolved configuration as YAML."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")
