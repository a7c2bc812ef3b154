"""What a run starts from: models and text."""

__all__ = ["CorpusConfig", "ImportConfig", "ModelRef", "place_of", "pretrained_in_order"]

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fusejax.config.base import NAME, Config
from fusejax.config.pretrain import PretrainConfig
from fusejax.config.text import TextSource


class ImportConfig(Config):
    """Distributions that were captured elsewhere, of the corpus' documents in their order."""

    path: str = Field(description="File, or directory of files.")
    layout: Literal["parquet", "maxtext", "distillkit"] = Field(
        default="parquet", description="List columns as `fusejax` exports them, MaxText's records, DistillKit's rows."
    )
    columns: dict[str, str] = Field(default_factory=dict, description="parquet: our column name -> the file's.")
    normalized: bool = Field(
        default=False, description="maxtext: values are log-probabilities; else logits, normalised over the entries."
    )
    compression: dict[str, Any] | None = Field(
        default=None, description="distillkit: the `logprob_compressor` settings of compressed rows."
    )


class ModelRef(Config):
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
    chat_template: str | None = Field(
        default=None,
        description="How the model renders conversations: a name (openchat_3.5, vicuna, llama-2, llama-3, mistral, "
        "gemma, qwen, phi-3, internlm2, yi, zephyr, chatml) or a jinja file; None: `corpus.chat_template`.",
    )
    distributions: ImportConfig | None = Field(
        default=None,
        description="Of a source: distributions to import in place of a capture; `model` is then the directory of its "
        "tokenizer.",
    )
    trust_remote_code: str | None = Field(
        default=None, description="Run the code in the model's directory; must repeat `model`. torch only."
    )
    pretrain: PretrainConfig | None = Field(
        default=None, description="How the directory `model` is made by the run itself; None: it stands."
    )

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, values: Any) -> Any:
        if isinstance(values, str):
            values = {"model": values}
        if isinstance(values, dict) and not values.get("name") and isinstance(values.get("model"), str):
            values = values | {"name": Path(values["model"]).name}
        return values

    @field_validator("distributions", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        import re

        if not re.match(NAME, name):
            raise ValueError(f"{name!r} is no plain name (letters, digits, '_', '.', '-'); give `name`")
        return name

    @model_validator(mode="after")
    def _no_secret(self) -> "ModelRef":
        """Configurations are kept beside every artefact; a key has no place in them, nor in this message."""
        from urllib.parse import urlsplit

        if urlsplit(self.url or "").query:
            raise ValueError("url must hold no user, password or query; the key is read from FUSEJAX_API_KEY")
        return self

    @model_validator(mode="after")
    def _backend_fits(self) -> "ModelRef":
        needed = {"openai": True, "jax": False, "torch": False}.get(self.backend)
        if needed is not None and needed != (self.url is not None):
            raise ValueError(f"backend {self.backend!r} and url {self.url!r} do not go together")
        if self.trust_remote_code not in (None, self.model):
            raise ValueError(f"trust_remote_code must repeat `model` ({self.model!r}), got {self.trust_remote_code!r}")
        return self

    @model_validator(mode="after")
    def _pretrained_here(self) -> "ModelRef":
        elsewhere = {"url": self.url, "distributions": self.distributions, "revision": self.revision}
        given = [name for name, value in elsewhere.items() if value is not None]
        if self.pretrain is not None and (given or self.backend == "torch"):
            raise ValueError(f"pretrain makes a directory of fusejax's own; leave out {', '.join(given) or 'backend'}")
        return self


def place_of(model: str) -> str:
    """The same text for all ways to write one directory."""
    return os.path.normpath(os.path.abspath(os.path.expanduser(model)))


def pretrained_in_order(refs: Iterable[ModelRef]) -> dict[str, ModelRef]:
    """Returns {place: model} of those that are pretrained, each after the one that it starts from.

    Raises:
      ValueError: one directory is to be made in two ways, or models start from each other.
    """
    made: dict[str, ModelRef] = {}
    for ref in refs:
        if ref.pretrain is not None:
            earlier = made.setdefault(place_of(ref.model), ref)
            if (earlier.pretrain, earlier.chat_template) != (ref.pretrain, ref.chat_template):
                raise ValueError(f"{earlier.name!r} and {ref.name!r} make {ref.model} in different ways")
    ordered: dict[str, ModelRef] = {}

    def add(place: str, behind: tuple[str, ...]) -> None:
        if place in behind:
            circle = " -> ".join(made[name].name for name in (*behind, place))
            raise ValueError(f"pretraining starts in a circle: {circle}")
        options = made[place].pretrain
        start = options.start if options is not None else None
        if start is not None and place_of(start) in made:
            add(place_of(start), (*behind, place))
        ordered.setdefault(place, made[place])

    for place in made:
        add(place, ())
    return ordered


class CorpusConfig(Config):
    """The text of a run."""

    @property
    def has_chat(self) -> bool:
        """Whether any of it is conversations."""
        return any(source.is_chat for source in (*self.train, *self.valid, *self.test))

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
    max_document_bytes: int = Field(
        default=8192, ge=16, description="Longer documents are cut, losslessly, in bytes; conversations stay whole."
    )
    chat_template: str | None = Field(
        default=None, description="Chat template of models that give none; None: the tokenizer's own."
    )
    seed: int | None = Field(default=None, ge=0, description="Of the splits; None: the run's.")
    max_train_bytes: int | None = Field(default=None, ge=1, description="Cap on the bytes of training text per domain.")
    max_eval_bytes: int | None = Field(
        default=None, ge=1, description="Cap on the bytes of valid and of test, per domain."
    )
