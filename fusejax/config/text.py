"""Where text comes from."""

__all__ = ["TextSource"]

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from fusejax.config.base import NAME, Config


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
    where: dict[str, Any] = Field(
        default_factory=dict,
        description="Read only records with these values of their fields: {field: value} or {field: [value, ...]}.",
    )
    folds: int = Field(default=1, ge=1, description="Deal the documents that `where` lets through into so many parts.")
    fold: tuple[int, ...] = Field(
        default=(), description="Parts to read, from 0: the n-th document is of part n mod folds."
    )
    skip: int = Field(default=0, ge=0, description="Leave out the first documents, of those that `where` lets through.")
    limit: int | None = Field(default=None, ge=1, description="Read at most this many documents, after those skipped.")
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

    @model_validator(mode="after")
    def _records_to_choose(self) -> "TextSource":
        if self.path == "embedded" and (self.skip or self.where or self.fold):
            raise ValueError("skip, where and fold choose records of files and datasets; `embedded` has none")
        if (self.folds > 1) != bool(self.fold) or any(not 0 <= part < self.folds for part in self.fold):
            got = f"folds {self.folds}, fold {list(self.fold)}"
            raise ValueError(f"fold must name parts from 0 to folds - 1, got {got}")
        return self

    @field_validator("where")
    @classmethod
    def _plain_values(cls, where: dict[str, Any]) -> dict[str, Any]:
        for field, wanted in where.items():
            values = wanted if isinstance(wanted, list | tuple) else [wanted]
            if not values or not all(isinstance(value, str | int | float | bool) for value in values):
                raise ValueError(f"where {field!r} must be a text, a number, true or false, or a list of them")
        return where

    @field_validator("domain")
    @classmethod
    def _no_column_of_the_table(cls, domain: str | None) -> str | None:
        if domain == "mean":
            raise ValueError("a domain may not be called 'mean': that is the table's mean over domains")
        return domain
