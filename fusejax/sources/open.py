"""Opening a source whatever computes it: JAX, torch, or a server; behind one function of arrays.

`describe_source` says, without loading weights or using the network, which backend computes a source, how long a
window it reads and what identifies it; `open_source` makes the function that `capture_shard` calls.

A served model is identified by its name and the user's `revision`, not by its address: a server that moved is the
same source, and new weights behind the same name need a new `revision`. A key for a server is read from the
environment variable FUSEJAX_API_KEY and stored nowhere.
"""

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fusejax.errors import InputError
from fusejax.io.manifest import fingerprint_of
from fusejax.io.models import LoadedModel, model_fingerprint, open_config, open_model
from fusejax.io.progress import beat
from fusejax.models.config import ARCHITECTURES
from fusejax.sources.backends_served import Endpoint, ask_models, served_score
from fusejax.sources.backends_torch import load_torch_model, torch_score

__all__ = ["BACKENDS", "Source", "describe_source", "jax_score", "open_source"]

BACKENDS = ("auto", "jax", "torch", "openai")
_API_KEY = "FUSEJAX_API_KEY"

Score = Callable[
    ..., Any
]  # (tokens, labels, positions, segment_ids) [B, T] -> (realised [B, T], TopK [B, T, K] | None)


@dataclass(frozen=True)
class Source:
    """A source that can be opened."""

    name: str  # as the user wrote it
    directory: Path  # model and tokenizer; of a served model the tokenizer alone
    backend: str  # "jax", "torch" or "openai"
    max_positions: int | None = None  # None: unknown here
    vocab_size: int | None = None
    url: str | None = None
    revision: str | None = None
    run_its_code: bool = False
    identity: str | None = None  # in place of what weights or a server say

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the model; reads all weights the first time that it is asked for."""
        if self.identity is not None:
            return self.identity
        if self.url is not None:
            return fingerprint_of({"served": self.name, "revision": self.revision})
        return model_fingerprint(self.directory)


def describe_source(
    directory: Path,
    *,
    name: str,
    backend: str = "auto",
    url: str | None = None,
    revision: str | None = None,
    trust_remote_code: str | None = None,
) -> Source:
    """Returns what computes a source and what identifies it.

    Args:
        directory: holds the model, or the tokenizer alone where it is served.
        name: the model as the user wrote it; also its name on the server.
        backend: one of `BACKENDS`; "auto" takes the server where there is a `url`, JAX where fusejax computes the
            architecture, else torch.
        url: of the server.
        revision: sets apart weights that a server has had under one name.
        trust_remote_code: run the code in the directory, if it repeats `name`.

    Raises:
        InputError: an unknown backend, `url` without the backend or the reverse, an architecture that none computes.
    """
    if backend not in BACKENDS:
        raise InputError(f"unknown backend {backend!r}; known are {', '.join(BACKENDS)}")
    if (url is not None and backend in ("jax", "torch")) or (url is None and backend == "openai"):
        raise InputError(
            f"backend {backend!r} and url {url!r} do not go together; a served model has both, others none"
        )
    if trust_remote_code is not None and trust_remote_code != name:
        raise InputError(
            f"trust_remote_code is {trust_remote_code!r}; to run a model's own code repeat its name, {name!r}"
        )
    directory, trusted = Path(directory), trust_remote_code is not None
    if url is not None:
        return Source(name, directory, "openai", url=url, revision=revision)
    kind = _model_type(directory)
    if backend == "jax" or (backend == "auto" and (kind in ARCHITECTURES or kind is None)):
        config = open_config(directory)
        return Source(name, directory, "jax", config.max_positions, config.vocab_size)
    if backend == "auto" and importlib.util.find_spec("torch") is None:
        raise InputError(
            f"{directory}: fusejax computes {', '.join(ARCHITECTURES)}, not {kind!r}; torch can, and is not installed: "
            "pip install 'fusejax[torch]'"
        )
    values = _config(directory)
    lengths = (values.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"))
    length = next((value for value in lengths if isinstance(value, int) and value > 0), None)
    vocab = values.get("vocab_size")
    vocab = vocab if isinstance(vocab, int) else None
    return Source(name, directory, "torch", length, vocab, run_its_code=trusted)


def open_source(
    source: Source,
    *,
    top_k: int,
    valid_vocab: int,
    context: int,
    compute_dtype: str | None = None,
    endpoint: Endpoint | None = None,
) -> Score:
    """Returns the function that scores a source: `[B, T]` int32 arrays -> (realised logprob, `TopK` or None).

    Args:
        source: from `describe_source`.
        top_k: entries per position; 0 for none.
        valid_vocab: the tokenizer's size; ids from there on get no probability.
        context: positions in the longest window.
        compute_dtype: of activations; None: that of the model's configuration (jax) or float32 (torch). A server
            chooses its own.
        endpoint: how the server is asked; by default with a patience that suits long captures.

    Raises:
        InputError: torch is missing, the server does not answer or is started with too short a context.
    """
    if source.backend == "jax":
        return jax_score(
            open_model(source.directory, compute_dtype=compute_dtype), top_k=top_k, valid_vocab=valid_vocab
        )
    if source.backend == "torch":
        model = load_torch_model(source.directory, dtype=compute_dtype or "float32", run_its_code=source.run_its_code)
        return torch_score(model, top_k=top_k, valid_vocab=valid_vocab)
    endpoint = endpoint or Endpoint(source.url or "", api_key=os.environ.get(_API_KEY))
    served = ask_models(endpoint, source.name)
    if served.max_length is not None and served.max_length < context + 2:
        raise InputError(
            f"{endpoint.root} reads at most {served.max_length} tokens, a window needs {context + 2}; set capture."
            f"context to {served.max_length - 2} or start the server with a larger --max-model-len"
        )
    return served_score(endpoint, served, top_k=top_k, valid_vocab=valid_vocab)


def jax_score(
    model: LoadedModel, *, top_k: int, valid_vocab: int | None = None, mesh: Mapping[str, int] | None = None
) -> Score:
    """Returns the jitted forward pass of a model that fusejax computes; weights are put on the devices once.

    Ids from `valid_vocab` on are padding of the model's vocabulary and get no probability. On a mesh, parameters
    and rows are split over its devices; B is then a multiple of data * fsdp.
    """
    import jax

    from fusejax.models import param_table, score_tokens
    from fusejax.parallel import batch_sharding, make_mesh, param_shardings

    score = partial(score_tokens, cfg=model.config, k=top_k, valid_vocab=valid_vocab)
    if not mesh or all(size == 1 for size in mesh.values()):
        params, rows, score = jax.device_put(model.params), None, jax.jit(score)
    else:
        ours = jax.local_devices()
        made = make_mesh(data=mesh["data"], fsdp=mesh["fsdp"], tensor=mesh["tensor"], devices=ours)
        params = jax.device_put(model.params, param_shardings(param_table(model.config), made))
        rows, score = batch_sharding(made), jax.jit(partial(score, mesh=made))

    def run(tokens: Any, labels: Any, positions: Any, segment_ids: Any) -> Any:
        beat()
        arrays = {"tokens": tokens, "labels": labels, "positions": positions, "segment_ids": segment_ids}
        return score(params, **{name: jax.device_put(array, rows) for name, array in arrays.items()})

    return run


def _model_type(directory: Path) -> str | None:
    kind = _config(directory).get("model_type")
    return kind if isinstance(kind, str) else None


def _config(directory: Path) -> dict[str, Any]:
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # the jax backend's own reader says what is wrong
    return values if isinstance(values, dict) else {}
