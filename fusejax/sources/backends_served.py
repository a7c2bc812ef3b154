"""A served model as a source: the log-probabilities that vLLM or SGLang gives for the tokens of a prompt.

vLLM's OpenAI-compatible server answers `POST /v1/completions` with `prompt_logprobs`, a list with one entry per
prompt token: null for the first, else `{token id: {"logprob", "rank", "decoded_token"}}` of the K likeliest
tokens and of the prompt's own. SGLang answers `POST /generate` with `input_token_logprobs` and
`input_top_logprobs`, lists of `[logprob, token id, text]`; `/v1/models` says which of the two serves. Prompts are
token ids of our tokenizer and the answer must name them again: another tokenizer is found at once. Servers take
defaults of sampling from the model's `generation_config.json`, so requests name neutral ones. vLLM cannot write
minus infinity in JSON and says -9999: such an entry says nothing, and such a label is impossible.

The residual is `1 - sum` of what the server says, as it says no more; below `_FLOOR` that is rounding, and the floor
is kept. Requests have time-outs and are repeated, with growing waits, when the server is busy, restarts or sends
half an answer; they are not repeated when it refuses. Progress is kept by the store: a rerun goes on with the
shard that was not finished. Redirects are not followed. Not here: starting a server, chat templates, sampling.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fusejax.errors import InputError
from fusejax.sources.rows import spans
from fusejax.types import TopK

__all__ = ["Endpoint", "ServedModel", "ask_models", "prompt_scores", "served_score"]

_FLOOR = 2.0**-23  # of the residual's mass: what float32 log-probabilities can tell from 0
_NOTHING = -9999.0
_NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
_BUSY = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 60.0
_BROKEN = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, json.JSONDecodeError)

Entry = Mapping[int, float]  # token id -> log-probability


@dataclass(frozen=True)
class Endpoint:
    """Where a model is served, and how patient we are; seconds."""

    url: str  # with or without /v1
    api_key: str | None = None
    timeout: float = 300.0
    attempts: int = 6
    first_wait: float = 1.0  # doubled after every failure
    workers: int = 8  # requests at a time

    @property
    def root(self) -> str:
        """The address without `/v1`."""
        return self.url.rstrip("/").removesuffix("/v1")

    def request(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Returns the JSON answer to a GET, or a POST of `body`, after as many attempts as it takes.

        Raises:
            InputError: the server refuses, or no attempt succeeded; names the address and the last failure.
        """
        headers = {"Content-Type": "application/json"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None if body is None else json.dumps(body).encode()
        address, failure, wait = f"{self.root}{path}", "", self.first_wait
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(wait, _LONGEST_WAIT))
                wait *= 2
            try:
                return self._once(urllib.request.Request(address, data=data, headers=headers))
            except urllib.error.HTTPError as error:
                with error:
                    failure = f"HTTP {error.code}: {_shown(error)}"
                    if error.code not in _BUSY:
                        raise InputError(f"{address} refuses the request ({failure}); {_remedy(failure)}") from error
                    wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except _BROKEN as error:
                failure = f"{type(error).__name__}: {error}"
        raise InputError(
            f"{address} did not answer {self.attempts} times (last: {failure}); check that the server runs and is "
            "reachable, then run the same command again: it goes on where it stopped"
        )

    def _once(self, request: urllib.request.Request) -> Any:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as answer:
            return json.loads(answer.read())


class ServedModel(NamedTuple):
    """What a server says of the model that it serves."""

    name: str
    max_length: int | None  # tokens of prompt and completion together
    sglang: bool


def ask_models(endpoint: Endpoint, name: str) -> ServedModel:
    """Returns the served model of that name, or the only one.

    Raises:
        InputError: several models, none of that name; or no list of models.
    """
    answer = endpoint.request("/v1/models")
    found = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(found, list) or not all(isinstance(m, dict) and isinstance(m.get("id"), str) for m in found):
        raise InputError(f"{endpoint.root}/v1/models gives no list of models: {str(answer)[:200]}")
    names = [model["id"] for model in found]
    if name not in names and len(names) != 1:
        raise InputError(f"{endpoint.root} serves {names}, none of them {name!r}; set `model` to one of these names")
    model = found[names.index(name) if name in names else 0]
    length = model.get("max_model_len")
    return ServedModel(model["id"], length if isinstance(length, int) else None, model.get("owned_by") == "sglang")


def served_score(
    endpoint: Endpoint, model: ServedModel, *, top_k: int, valid_vocab: int
) -> Callable[..., tuple[np.ndarray, TopK | None]]:
    """Returns a function of (tokens, labels, positions, segment_ids), each `[B, T]`, that asks the server.

    It returns the log-probability `[B, T]` (nats) of each label and the `TopK` `[B, T, top_k]`, None if top_k is 0.
    Every segment of a row is a prompt; the results at padding are 0 and empty.

    Raises:
        InputError: from the function; see `Endpoint.request` and `prompt_scores`.
    """

    def ask(prompt: list[int]) -> list[Entry]:
        if model.sglang:
            body = {"input_ids": prompt, "sampling_params": _NEUTRAL | {"max_new_tokens": 1}, "return_logprob": True}
            body |= {"logprob_start_len": 0, "top_logprobs_num": top_k}
            return _from_sglang(endpoint.request("/generate", body), prompt, top_k)
        body = {"model": model.name, "prompt": prompt, "prompt_logprobs": top_k, "max_tokens": 1, **_NEUTRAL}
        return _from_vllm(endpoint.request("/v1/completions", body), prompt)

    def score(
        tokens: np.ndarray, labels: np.ndarray, positions: np.ndarray, segment_ids: np.ndarray
    ) -> tuple[np.ndarray, TopK | None]:
        shape = tokens.shape
        realised, residual = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        ids = np.full((*shape, top_k), -1, np.int32)
        logprobs = np.full((*shape, top_k), -np.inf, np.float32)
        found = spans(segment_ids, positions)
        prompts = [[*tokens[row, start:stop].tolist(), int(labels[row, stop - 1])] for row, start, stop in found]
        with ThreadPoolExecutor(endpoint.workers) as pool:
            for (row, start, stop), entries in zip(found, pool.map(ask, prompts), strict=True):
                at = row, slice(start, stop)
                realised[at], topk = prompt_scores(entries, labels[at], top_k=top_k, valid_vocab=valid_vocab)
                ids[at], logprobs[at], residual[at] = topk
        return realised, TopK(ids, logprobs, residual) if top_k else None

    return score


def prompt_scores(
    entries: Sequence[Entry], labels: np.ndarray, *, top_k: int, valid_vocab: int
) -> tuple[np.ndarray, TopK]:
    """Returns the labels' log-probabilities `[N]` and the `TopK` `[N, top_k]` of a server's entries.

    The prompt's own token, which a server adds where it is not among the likeliest, is no entry then. Ids from
    `valid_vocab` on are padding of the model's vocabulary; their mass counts to the residual.

    Raises:
        InputError: an entry that lacks its label.
    """
    realised = np.empty(len(labels), np.float32)
    ids = np.full((len(labels), top_k), -1, np.int32)
    logprobs = np.full((len(labels), top_k), -np.inf, np.float64)
    for t, (entry, label) in enumerate(zip(entries, labels.tolist(), strict=True)):
        if label not in entry:
            raise InputError(
                f"the server's answer at position {t} says nothing about token {label} of the prompt; "
                "expected the same tokenizer here and there"
            )
        realised[t] = entry[label] if entry[label] > _NOTHING else -np.inf
        said = [item for item in entry.items() if item[1] > _NOTHING]
        likeliest = sorted(said, key=lambda item: (-item[1], item[0]))[:top_k]
        kept = [(token, logprob) for token, logprob in likeliest if 0 <= token < valid_vocab]
        if kept:
            ids[t, : len(kept)], logprobs[t, : len(kept)] = zip(*kept, strict=True)
    rest = np.maximum(1.0 - np.exp(logprobs).sum(axis=-1), _FLOOR)
    return realised, TopK(ids, logprobs.astype(np.float32), np.log(rest).astype(np.float32))


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


def _from_vllm(answer: Any, prompt: Sequence[int]) -> list[Entry]:
    try:
        found = answer["choices"][0].get("prompt_logprobs")
    except (TypeError, KeyError, IndexError, AttributeError) as error:
        raise InputError(f"the server's answer holds no choices: {str(answer)[:200]}") from error
    if found is None:
        raise InputError("the server gives no prompt_logprobs; expected vLLM's OpenAI-compatible server, or SGLang's")
    return _checked(
        found, prompt, lambda entry: {int(token): float(value["logprob"]) for token, value in entry.items()}
    )


def _from_sglang(answer: Any, prompt: Sequence[int], top_k: int) -> list[Entry]:
    try:
        own = answer["meta_info"]["input_token_logprobs"]
        likeliest = answer["meta_info"].get("input_top_logprobs") if top_k else [[] for _ in own]
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"the server's answer holds no input_token_logprobs: {str(answer)[:200]}") from error
    if not isinstance(likeliest, list) or len(likeliest) != len(own):
        raise InputError("the server's answer holds no input_top_logprobs; expected those of SGLang's /generate")
    return _checked(
        list(zip(own, likeliest, strict=True)),
        prompt,
        lambda pair: {int(entry[1]): float(entry[0]) for entry in [*(pair[1] or []), pair[0]]},
    )


def _checked(found: Any, prompt: Sequence[int], read: Callable[[Any], Entry]) -> list[Entry]:
    """Returns the entries of all prompt tokens but the first, which nothing predicts."""
    if not isinstance(found, list) or len(found) != len(prompt):
        count = len(found) if isinstance(found, list) else type(found).__name__
        raise InputError(f"the server scores {count} tokens of a prompt of {len(prompt)}; expected all of them")
    try:
        return [read(entry) for entry in found[1:]]
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise InputError(f"the server's log-probabilities are not as documented: {str(found[1])[:200]}") from error


def _shown(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(400).decode("utf-8", "replace").strip() or str(error.reason)
    except (OSError, http.client.HTTPException):
        return str(error.reason)


def _remedy(failure: str) -> str:
    if "logprobs" in failure:
        return "lower capture.top_k, or start vLLM with a larger --max-logprobs"
    return "check `url`, `model`, FUSEJAX_API_KEY and capture.context against the server's settings"


def _seconds(header: str | None) -> float:
    try:
        return float(header or 0)
    except ValueError:
        return 0.0
