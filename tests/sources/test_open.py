"""Which backend a source gets, and what a configuration may say about it."""

import json

import pytest
from pydantic import ValidationError

from fusejax.config import ModelRef
from fusejax.errors import InputError
from fusejax.sources.open import BACKENDS, describe_source

LLAMA = {
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
}


def test_auto_takes_the_server_then_jax(tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    source = describe_source(tmp_path, name="m")
    assert (source.backend, source.max_positions, source.vocab_size, source.url) == ("jax", 77, 96, None)
    served = describe_source(tmp_path, name="m", url="http://localhost:1/v1")
    assert (served.backend, served.max_positions) == ("openai", None)


def test_a_directory_without_a_model_is_said_by_the_reader(tmp_path) -> None:
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        describe_source(tmp_path, name="m")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(InputError, match="lacks vocab_size"):
        describe_source(tmp_path, name="m")


def test_the_configuration_knows_the_same_backends() -> None:
    assert ModelRef.model_fields["backend"].annotation.__args__ == BACKENDS


@pytest.mark.parametrize(
    "options",
    [
        {"backend": "openai"},
        {"backend": "torch", "url": "http://x/v1"},
        {"url": "ftp://x"},
        {"url": "http://user:secret@x/v1"},
        {"trust_remote_code": "other"},
        {"trust_remote_code": True},
    ],
)
def test_what_does_not_fit_is_no_configuration(options) -> None:
    with pytest.raises(ValidationError):
        ModelRef(model="org/name", **options)


def test_what_fits_is_one() -> None:
    assert ModelRef(model="org/name", url="http://localhost:8000/v1").name == "name"
    assert ModelRef(model="org/name", backend="torch", trust_remote_code="org/name").backend == "torch"
