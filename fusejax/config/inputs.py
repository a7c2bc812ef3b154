"""What a run starts from: models and text."""

__all__ = ["CorpusConfig", "ImportConfig", "ModelRef", "TextSource"]

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fusejax.config.base import NAME, Config


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


class TextSource(Config):
    """Where documents come from."""

    path: str = Field(
        description="JSONL, parquet, folder of text files, saved dataset, datasets hub name, or `embedded`: the text "
        "that this Python installation holds, in several domains."
    )
    domain: str | None = Field(
        default=None,
        description="Domain of all records, the column of the results table. None: what a record says in its field "
        "`domain`, else 'text'.",
        pattern=NAME,
    )
    format: Literal["jsonl", "parquet", "text", "dataset"] | None = Field(
        default=None, description="None: by the suffix."
    )
    text_field: str = Field(default="text", description="Field that holds the text.")
    spans_field: str | None = Field(
        default=None,
        description="Field with [start, end] ranges of characters of the text that are trained; None: all.",
    )
    messages_field: str | None = Field(
        default=None,
        description="Field with a conversation, in place of a text: {role, content} or ShareGPT's {from, value} "
        "objects. Each model renders it by its own chat template; assistant contents are trained.",
    )
    prompt_fields: tuple[str, ...] = Field(
        default=(), description="Fields that are the user's turn of a conversation of two turns (Alpaca, GSM8K)."
    )
    response_field: str | None = Field(default=None, description="Field that is the assistant's turn.")
    split: str | None = Field(default=None, description="Split of a `datasets` source.")
    limit: int | None = Field(default=None, ge=1, description="Read at most this many documents.")
    limit_bytes: int = Field(3_000_000, ge=1000, description="Bytes per domain of `embedded`.")

    @property
    def is_chat(self) -> bool:
        """Whether records are conversations."""
        return self.messages_field is not None or self.response_field is not None

    @model_validator(mode="after")
    def _one_form(self) -> "TextSource":
        if bool(self.prompt_fields) != (self.response_field is not None):
            raise ValueError("prompt_fields and response_field go together")
        forms = [n for n in ("spans_field", "messages_field", "response_field") if getattr(self, n) is not None]
        if len(forms) > 1:
            raise ValueError(f"{' and '.join(forms)} exclude each other: a record is a text or a conversation")
        return self

    @field_validator("domain")
    @classmethod
    def _no_column_of_the_table(cls, domain: str | None) -> str | None:
        if domain == "mean":
            raise ValueError("a domain may not be called 'mean': that is the table's mean over domains")
        return domain


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
    max_train_bytes: int | None = Field(default=None, ge=1, description="Cap on the bytes of training text per domain.")
    max_eval_bytes: int | None = Field(
        default=None, ge=1, description="Cap on the bytes of valid and of test, per domain."
    )
