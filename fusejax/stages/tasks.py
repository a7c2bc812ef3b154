"""evaluate --tasks: accuracy on tasks. Also what generates text for other commands."""

__all__ = ["answer_pieces", "command", "on_device", "open_language_model", "pieces"]

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fusejax.errors import InputError
from fusejax.evaluation.harness import run_local, run_tasks
from fusejax.evaluation.language import Continuations, LanguageModel
from fusejax.io.models import LoadedModel, open_model, resolve_model
from fusejax.io.progress import beat, say
from fusejax.io.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from fusejax.models.generation import Sampling
from fusejax.sources.open import jax_score
from fusejax.stages.command import Result, parser, positive_int

_PIECE = 16  # tokens between two looks for stop strings
_LOCAL = (".json", ".jsonl", ".json.gz", ".jsonl.gz")


def open_language_model(directory: Path, *, context: int, batch_tokens: int, dtype: str | None = None) -> LanguageModel:
    """Opens a model that fusejax computes, to score and to generate."""
    model, tokenizer = open_model(directory, compute_dtype=dtype), load_tokenizer(directory)
    check_vocabulary(tokenizer, model.config.vocab_size, str(directory))
    model = on_device(model)
    return LanguageModel(
        jax_score(model, top_k=1, valid_vocab=tokenizer.vocab_size),
        partial(pieces, model, tokenizer),
        tokenizer,
        context=min(context, model.config.max_positions),
        batch_tokens=batch_tokens,
    )


def on_device(model: LoadedModel) -> LoadedModel:
    """Puts the weights on the first device, once."""
    import jax

    return model._replace(params=jax.device_put(model.params))


def pieces(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stops: Sequence[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
) -> Iterator[Continuations]:
    """Continues prompts a few tokens at a time; `stops` end a row beside the model's own stop tokens."""
    import jax.numpy as jnp
    import numpy as np

    from fusejax.models.generation import continue_generation, start_generation

    stops = sorted({*_stop_ids(model, tokenizer), *stops})
    state = start_generation(model.params, model.config, prompts, max_new_tokens=max_new_tokens, seed=seed)
    first, total = int(state.count), int(state.tokens.shape[1])
    while True:
        state = continue_generation(
            model.params,
            state,
            jnp.asarray(stops or [-1], jnp.int32),
            cfg=model.config,
            steps=_PIECE,
            sampling=sampling,
            valid_vocab=tokenizer.vocab_size,
        )
        found = np.asarray(state.tokens)[:, first : int(state.count)]
        beat()
        finished = np.asarray(state.finished)
        ends = np.isin(found, stops)
        ids = [row[: end.argmax() if end.any() else None].tolist() for row, end in zip(found, ends, strict=True)]
        yield Continuations(ids, finished)
        if finished.all() or int(state.count) == total:
            return


def answer_pieces(
    model: LoadedModel,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    stops: Sequence[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
) -> Iterator[str]:
    """Yields the text that follows a prompt, longer and longer; a character that is not whole yet waits."""
    for state in pieces(model, tokenizer, [prompt], max_new_tokens, stops=stops, sampling=sampling, seed=seed):
        data = b"".join(tokenizer.token_bytes[i] or b"" for i in state.ids[0])
        last = state.finished.all() or len(state.ids[0]) == max_new_tokens
        yield data.decode(errors="replace" if last else "ignore")


def _stop_ids(model: LoadedModel, tokenizer: Tokenizer) -> list[int]:
    """The ids that end a turn: of the tokenizer, of the model's config and of its generation config."""
    found = {tokenizer.eos_id}
    own = model.config.eos_id
    found |= set(own) if isinstance(own, tuple) else {own}
    path = model.directory / "generation_config.json"
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(told) if isinstance(told, list) else {told}
    return sorted(i for i in found if isinstance(i, int) and 0 <= i < model.config.vocab_size)


def command(name: str, words: list[str]) -> Result:
    """`fusejax evaluate --model DIR --tasks A B`."""
    arguments = parser(
        name,
        "Accuracy on tasks: names or YAML files of lm-eval (the extra `eval`), or local files of questions "
        "(question+options+label lines, BIG-bench hard, GSM8K).",
    )
    arguments.add_argument("--model", required=True, help="Hugging Face directory, fusejax checkpoint, or hub name")
    arguments.add_argument("--tasks", required=True, nargs="+", help="task names, task YAML files, or data files")
    arguments.add_argument("--fewshot", type=int, help="examples in each prompt; default: as the task says, 0 of files")
    arguments.add_argument("--limit", type=positive_int, help="examples per task")
    arguments.add_argument("--context", type=positive_int, default=2048, help="tokens; cut to the model's limit")
    arguments.add_argument("--batch-tokens", type=positive_int, default=16384, help="tokens per forward call")
    arguments.add_argument("--max-new-tokens", type=positive_int, default=256, help="of answers to local files")
    arguments.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations; default: the model's")
    given = arguments.parse_args(words)
    if given.fewshot is not None and given.fewshot < 0:
        raise InputError(f"--fewshot must be at least 0, got {given.fewshot}")
    path = resolve_model(given.model)
    model = open_language_model(path, context=given.context, batch_tokens=given.batch_tokens, dtype=given.dtype)
    local = [task for task in given.tasks if task.endswith(_LOCAL)]
    results: dict[str, dict[str, float]] = {}
    for task in local:
        say(f"evaluate {path.name}: {task}")
        results[task] = run_local(
            model, Path(task), fewshot=given.fewshot or 0, limit=given.limit, max_new_tokens=given.max_new_tokens
        )
    if others := [task for task in given.tasks if task not in local]:
        results |= run_tasks(model, others, fewshot=given.fewshot, limit=given.limit)
    data: dict[str, Any] = {"tasks": results, "truncated": model.truncated}
    if model.truncated:
        say(f"{model.truncated} prompts did not fit in the context and lost their beginning")
    return Result(data, _table(results))


def _table(results: dict[str, dict[str, float]]) -> str:
    width = max(map(len, results))
    lines = []
    for task, values in results.items():
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        lines.append(f"{task:<{width}}  {shown}")
    return "\n".join(lines)
