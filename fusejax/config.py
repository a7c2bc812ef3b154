"""The configuration of a run: pydantic models read from YAML, one per stage.

Every field has a description, which `--help` and the JSON schema show. Unknown keys are refused with the
nearest known one. Only `cli` and `stages` see these classes; functions below them take plain values.
Relative paths are relative to the directory in which the command runs.
"""

__all__ = [
    "AlignConfig",
    "CaptureConfig",
    "CorpusConfig",
    "EvaluateConfig",
    "FusionConfig",
    "LossConfig",
    "MergeConfig",
    "MeshConfig",
    "ModelRef",
    "RunConfig",
    "TextSource",
    "TrainConfig",
    "load_config",
    "save_config",
]

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fusejax.errors import InputError, nearest

_NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"


class _Config(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelRef(_Config):
    """A model and its tokenizer."""

    model: str = Field(description="Hugging Face directory, fusejax checkpoint directory, or hub name (org/name).")
    name: str = Field(
        default="", description="Short name in tables and directories; default: the last part of `model`."
    )
    revision: str | None = Field(
        default=None, description="Revision of a hub name; of a served model a label that sets its weights apart."
    )
    backend: Literal["auto", "jax", "torch", "openai"] = Field(
        default="auto",
        description="What computes a source. auto: a server where `url` is given, JAX for the architectures that "
        "fusejax knows, else torch (the extra `torch`).",
    )
    url: str | None = Field(
        default=None,
        description="Address of a vLLM or SGLang server, as http://localhost:8000/v1; `model` is then its name on the "
        "server and the directory or hub name of its tokenizer. A key is read from FUSEJAX_API_KEY.",
        pattern=r"^https?://[^\s/@]+(/[^\s@]*)?$",  # a password in an address would be stored with the run
    )
    trust_remote_code: str | None = Field(
        default=None, description="Run the code in the model's directory; must repeat `model`. torch only."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"model": values}
        if isinstance(values, dict) and not values.get("name") and isinstance(values.get("model"), str):
            values = values | {"name": Path(values["model"]).name}
        return values

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        import re

        if not re.match(_NAME, name):
            raise ValueError(f"{name!r} is no plain name (letters, digits, '_', '.', '-'); give `name`")
        return name

    @model_validator(mode="after")
    def _backend_fits(self) -> "ModelRef":
        needed = {"openai": True, "jax": False, "torch": False}.get(self.backend)
        if needed is not None and needed != (self.url is not None):
            raise ValueError(f"backend {self.backend!r} and url {self.url!r} do not go together")
        if self.trust_remote_code not in (None, self.model):
            raise ValueError(f"trust_remote_code must repeat `model` ({self.model!r}), got {self.trust_remote_code!r}")
        return self


class TextSource(_Config):
    """Where documents come from."""

    path: str = Field(
        description="JSONL, parquet, folder of text files, saved dataset, datasets hub name, or `embedded`: the text "
        "that this Python installation holds, in several domains."
    )
    domain: str = Field(default="text", description="Domain, the column of the results table.", pattern=_NAME)
    format: Literal["jsonl", "parquet", "text", "dataset"] | None = Field(
        default=None, description="None: by the suffix."
    )
    text_field: str = Field(default="text", description="Field that holds the text.")
    split: str | None = Field(default=None, description="Split of a `datasets` source.")
    limit: int | None = Field(default=None, ge=1, description="Read at most this many documents.")
    limit_bytes: int = Field(3_000_000, ge=1000, description="Bytes per domain of `embedded`.")

    @field_validator("domain")
    @classmethod
    def _no_column_of_the_table(cls, domain: str) -> str:
        if domain == "mean":
            raise ValueError("a domain may not be called 'mean': that is the table's mean over domains")
        return domain


class CorpusConfig(_Config):
    """The text of a run."""

    train: tuple[TextSource, ...] = Field(description="Documents that are captured and trained on.", min_length=1)
    valid: tuple[TextSource, ...] = Field(
        default=(), description="Held out for curves; empty: taken from train by a hash."
    )
    test: tuple[TextSource, ...] = Field(
        default=(), description="Held out for the table; empty: taken from train by a hash."
    )
    valid_fraction: float = Field(
        default=0.05, ge=0, lt=0.5, description="Share of train taken where `valid` is empty."
    )
    test_fraction: float = Field(default=0.05, ge=0, lt=0.5, description="Share of train taken where `test` is empty.")
    max_document_bytes: int = Field(default=8192, ge=16, description="Longer documents are cut, losslessly, in bytes.")
    max_train_bytes: int | None = Field(default=None, ge=1, description="Cap on the bytes of training text per domain.")
    max_eval_bytes: int | None = Field(
        default=None, ge=1, description="Cap on the bytes of valid and of test, per domain."
    )


class CaptureConfig(_Config):
    """Running the sources over the corpus."""

    top_k: int = Field(default=10, ge=1, le=1024, description="Entries stored per position.")
    context: int = Field(default=2048, ge=2, description="Tokens per window; cut to the model's own limit.")
    batch_tokens: int = Field(default=16384, ge=1, description="Tokens per forward call.")
    codec: Literal["compact", "float16", "float32"] = Field(
        default="compact",
        description="How distributions are stored: 3 bytes per entry, or log-probabilities as float16 or float32.",
    )
    compute_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Dtype of activations.")
    shard_size: int = Field(default=256, ge=1, description="Documents per shard; a killed run loses at most one shard.")

    @model_validator(mode="before")
    @classmethod
    def _accept_dtype(cls, values: Any) -> Any:
        if isinstance(values, dict) and "dtype" in values and "codec" not in values:
            values = {("codec" if key == "dtype" else key): value for key, value in values.items()}
        return values

    @property
    def dtype(self) -> str:
        """The dtype of log-probabilities as a reader of the store sees them."""
        return "float16" if self.codec == "float16" else "float32"


class AlignConfig(_Config):
    """Carrying distributions to the target's tokenizer."""

    positions: Literal["bytes", "dtw"] = Field(
        default="bytes", description="Pair positions by bytes, or tokens by dynamic time warping as in the papers."
    )
    vocabulary: Literal["coarse", "exact", "min_ed", "statistics"] = Field(
        default="coarse",
        description="Common symbols, identical spellings, least edit distance (FuseLLM), or counts (FuseChat).",
    )
    conditioned: bool = Field(
        default=False, description="Also supervise positions inside a source token, conditioned on the bytes read."
    )
    chain: bool = Field(
        default=False, description="Also supervise long realised tokens by the source's probability of their bytes."
    )
    calibration_bytes: int = Field(
        default=2_000_000, ge=0, description="Text on which coarse symbols that disagree are joined; 0: none are."
    )

    @model_validator(mode="after")
    def _possible(self) -> "AlignConfig":
        if self.positions == "dtw" and self.vocabulary == "coarse":
            raise ValueError("positions dtw needs vocabulary exact, min_ed or statistics; coarse symbols need bytes")
        if self.positions == "bytes" and self.vocabulary == "statistics":
            raise ValueError("vocabulary statistics counts tokens that were aligned as strings: set positions dtw")
        if self.positions == "dtw" and (self.chain or self.conditioned):
            raise ValueError("chain and conditioned need positions bytes")
        return self


class FusionConfig(_Config):
    """One fusion of sources, which trains one target."""

    name: str = Field(default="fused", description="Name of the trained target.", pattern=_NAME)
    sources: tuple[str, ...] = Field(default=(), description="Names of the sources; empty: all of them.")
    method: Literal["min_ce", "avg_ce"] = Field(default="min_ce", description="FuseLLM's fusion function.")
    score: Literal["bits_per_byte", "token_ce"] = Field(
        default="bits_per_byte", description="How sources are compared: per byte, or per own token as in the papers."
    )
    window_bytes: int | None = Field(
        default=256, ge=1, description="Bytes over which sources are compared; None: document."
    )
    include_target: bool = Field(default=False, description="The target's own start distribution takes part (FuseLLM).")
    temperature: float = Field(default=1.0, gt=0, description="Of avg_ce's softmax over negative scores.")
    reward: Literal["score", "exp"] = Field(
        default="score", description="avg_ce weighs by softmax of -score, or of exp(-score) as in the papers."
    )


class LossConfig(_Config):
    """clm_weight * CLM + fusion_weight * D(fused || target), in nats per trained token."""

    clm_weight: float = Field(default=0.9, ge=0, description="Weight of the causal language modelling loss.")
    fusion_weight: float = Field(default=0.1, ge=0, description="Weight of the divergence.")
    divergence: Literal["kl", "ce", "reverse_kl", "jsd"] = Field(default="kl", description="Divergence to the target.")
    tail: Literal["bucket", "renormalize", "zero"] = Field(
        default="bucket", description="What the mass outside top-k does."
    )
    temperature: float = Field(default=1.0, gt=0, description="Temperature of the target's softmax in the divergence.")
    max_members: int = Field(
        default=256, ge=1, description="Gathered token ids per position; larger groups join the rest."
    )

    @model_validator(mode="after")
    def _possible(self) -> "LossConfig":
        if self.divergence == "reverse_kl" and self.tail != "bucket":
            raise ValueError(f"divergence reverse_kl is infinite without a rest: it needs tail bucket, got {self.tail}")
        return self


class TrainConfig(_Config):
    """Training the target."""

    baseline: bool = Field(default=True, description="Also train on CLM alone, from the same start on the same tokens.")
    epochs: int = Field(default=1, ge=1, description="Passes over the corpus.")
    max_steps: int | None = Field(default=None, ge=1, description="Stop after this many optimiser steps.")
    batch_size: int = Field(default=128, ge=1, description="Rows per optimiser step.")
    seq_len: int = Field(default=2048, ge=2, description="Tokens per row.")
    accumulation: int = Field(default=1, ge=1, description="Micro-batches per optimiser step.")
    packing: bool = Field(default=True, description="Several documents per row, without attention across them.")
    learning_rate: float = Field(default=1e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field(default="cosine", description="After the warm-up.")
    warmup_ratio: float = Field(default=0.008, ge=0, le=1, description="Share of the steps spent warming up.")
    adam_b1: float = Field(default=0.9, ge=0, lt=1, description="AdamW beta 1.")
    adam_b2: float = Field(default=0.95, ge=0, lt=1, description="AdamW beta 2.")
    weight_decay: float = Field(default=0.1, ge=0, description="AdamW decay of matrices; norms and biases have none.")
    clip_norm: float = Field(default=1.0, gt=0, description="Global norm to which gradients are clipped.")
    compute_dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Dtype of activations.")
    remat: Literal["none", "dots", "full"] = Field(
        default="none", description="What is recomputed in the backward pass."
    )
    checkpoint_every: int = Field(default=500, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(default=10, ge=1, description="Steps between lines of metrics.jsonl.")
    evaluate_every: int | None = Field(
        default=None, ge=1, description="Steps between bits per byte of the valid split; None: never."
    )
    tensorboard: bool = Field(default=False, description="Also write TensorBoard events.")


class MeshConfig(_Config):
    """Devices per mesh axis; the product must divide the number of devices."""

    data: int = Field(default=1, ge=1, description="Replicas that see different rows.")
    fsdp: int = Field(default=1, ge=1, description="Shards of parameters and rows.")
    tensor: int = Field(default=1, ge=1, description="Shards of heads, mlp and vocabulary.")


class MergeConfig(_Config):
    """Merging the fused targets."""

    method: str = Field(default="sce", description="A method of `fusejax merge --help`.")
    targets: tuple[str, ...] = Field(default=(), description="Trained targets to merge; empty: all fusions.")
    parameters: dict[str, Any] = Field(default_factory=dict, description="Parameters of the method.")


class EvaluateConfig(_Config):
    """Bits per byte on the test split."""

    context: int = Field(default=2048, ge=2, description="Tokens per window; cut to the model's own limit.")
    batch_tokens: int = Field(default=16384, ge=1, description="Tokens per forward call.")
    ensemble: bool = Field(
        default=True, description="Also the mean-probability ensemble of the sources and the target."
    )


class RunConfig(_Config):
    """A whole run: corpus, sources, target, fusions, training, merge, evaluation."""

    output: str = Field(description="Directory of the run's artefacts.")
    seed: int = Field(default=0, ge=0, description="Seed of splits, data order and initialisation.")
    target: ModelRef = Field(description="The model that is trained.")
    sources: tuple[ModelRef, ...] = Field(description="The models whose distributions are fused.", min_length=1)
    corpus: CorpusConfig
    capture: CaptureConfig = CaptureConfig()
    align: AlignConfig = AlignConfig()
    fusions: tuple[FusionConfig, ...] = Field(
        default=(FusionConfig(),), min_length=1, description="Fusions; each trains one target."
    )
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    merge: MergeConfig | None = Field(default=None, description="None: nothing is merged.")
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _names_agree(self) -> "RunConfig":
        names = [source.name for source in self.sources]
        fusions = [fusion.name for fusion in self.fusions]
        for kind, found in (("sources", names), ("fusions", fusions)):
            if len(set(found)) < len(found):
                raise ValueError(f"{kind} must have different names, got {found}; set `name`")
        reserved = {"base", "target", "clm", "merged", "ensemble"}
        if bad := reserved & set(fusions):
            raise ValueError(f"fusion names {sorted(bad)} are reserved")
        for fusion in self.fusions:
            if len(set(fusion.sources)) < len(fusion.sources):
                raise ValueError(f"fusion {fusion.name!r} names a source twice: {list(fusion.sources)}")
            if fusion.include_target and "target" in names:
                raise ValueError("a source may not be called 'target' beside include_target; set `name`")
            for name in fusion.sources:
                if name not in names:
                    raise ValueError(f"fusion {fusion.name!r} names source {name!r}; sources are {names}")
        trained = fusions + ["clm"] * self.train.baseline
        if self.merge and (bad := set(self.merge.targets) - set(trained)):
            raise ValueError(f"merge names targets {sorted(bad)}; trained are {trained}")
        if self.loss.clm_weight + self.loss.fusion_weight <= 0:
            raise ValueError("clm_weight and fusion_weight are both 0: nothing would be trained")
        return self

    @model_validator(mode="after")
    def _rows_divide(self) -> "RunConfig":
        rows, cuts = self.train.batch_size, self.train.accumulation * self.mesh.data * self.mesh.fsdp
        if rows % cuts:
            raise ValueError(
                f"train.batch_size {rows} must be a multiple of train.accumulation * mesh.data * mesh.fsdp = {cuts}"
            )
        return self


def _explain(error: ValidationError, where: str) -> InputError:
    lines, found = [], error.errors()
    for item in found:
        path = ".".join(map(str, item["loc"]))
        inner = any(other["loc"][: len(item["loc"])] == item["loc"] for other in found if other is not item)
        if item["type"] == "too_short" and inner:
            continue  # the tuple is short only because its entries are wrong
        if item["type"] == "extra_forbidden":
            known = _fields_at(RunConfig, item["loc"][:-1])
            lines.append(f"{path}: unknown key.{nearest(str(item['loc'][-1]), known)} Known: {', '.join(known)}")
        else:
            shown = f", got {item['input']!r}" if not isinstance(item["input"], dict) else ""
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
        raise _explain(error, str(path)) from error


def save_config(config: RunConfig, path: str | Path) -> None:
    """Writes the resolved configuration as YAML."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")
