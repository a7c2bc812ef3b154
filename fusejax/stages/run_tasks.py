"""The tasks of a run (`evaluate.tasks`): every model of its table on local files of questions.

What a model scored is kept in `tasks/NAME/` until the model, a file or an option changes. Prompts are the files' own
text, which no chat template wraps: all models read the same characters.

Deliberately not done: models that torch or a server computes, which are left out and named; tasks of lm-eval, which
fetch data (`fusejax evaluate --model DIR --tasks ...` runs them on one model).
"""

__all__ = ["check_task_files", "tasks_of"]

import json
from collections.abc import Mapping
from pathlib import Path

from fusejax.config import ModelRef, RunConfig
from fusejax.errors import InputError
from fusejax.evaluation.harness import local_examples, run_local
from fusejax.io.manifest import atomic_directory, file_checksum, write_json, write_manifest
from fusejax.io.progress import say
from fusejax.stages.capture import describe
from fusejax.stages.context import Run, finished
from fusejax.stages.tasks import open_language_model

_RESULTS = "results.json"
_ANSWER = 256  # tokens of a generated answer, at most half of what the model reads
Results = dict[str, dict[str, float]]  # task -> metric -> value


def check_task_files(config: RunConfig) -> None:
    """Reads the task files of a configuration.

    Raises:
      InputError: a file is missing, of no known form, or leaves nothing to test.
    """
    options = config.evaluate
    for task in options.tasks:
        if (count := len(local_examples(Path(task)))) <= options.task_fewshot:
            raise InputError(f"{task} has {count} examples, evaluate.task_fewshot shows {options.task_fewshot} of them")


def tasks_of(run: Run, models: Mapping[str, ModelRef]) -> dict[str, Results]:
    """Returns what every model that fusejax computes scores on the run's tasks; empty where there are none."""
    if not run.config.evaluate.tasks:
        return {}
    found = {}
    for name, ref in models.items():
        backend = describe(run, ref).backend
        if backend == "jax":
            found[name] = _tasks_of_one(run, name, ref)
        else:
            say(f"evaluate: {name} is computed by {backend}, so it has no tasks; those need a model that fusejax runs")
    return found


def _tasks_of_one(run: Run, name: str, ref: ModelRef) -> Results:
    options, path = run.config.evaluate, run.model_path(ref)
    settings = {
        "tasks": {task: file_checksum(Path(task)) for task in options.tasks},
        "fewshot": options.task_fewshot,
        "limit": options.task_limit,
        "context": options.context,
        "tokenizer": run.tokenizer(ref).fingerprint,
    }
    parents = {"model": describe(run, ref).fingerprint}
    directory = run.directory / "tasks" / name.replace(":", "-")
    if not finished(directory, kind="tasks", settings=settings, parents=parents):
        run.replace_stale(directory)
        tokens = max(options.batch_tokens, options.context)
        model = open_language_model(path, context=options.context, batch_tokens=tokens)
        results = {}
        for task in options.tasks:
            say(f"evaluate {name}: {task}")
            results[task] = run_local(
                model,
                Path(task),
                fewshot=options.task_fewshot,
                limit=options.task_limit,
                max_new_tokens=min(_ANSWER, model.context // 2),
            )
        directory.parent.mkdir(parents=True, exist_ok=True)
        with atomic_directory(directory) as temporary:
            write_json(temporary / _RESULTS, results)
            facts = {"truncated": model.truncated}
            write_manifest(temporary, kind="tasks", settings=settings, parents=parents, facts=facts)
    return json.loads((directory / _RESULTS).read_text(encoding="utf-8"))
