"""Tasks of lm-eval on our models: its `LM` class over a `LanguageModel`, and local files as its tasks.

lm-eval brings the tasks, prompts and metrics; it needs no torch. A task is a name that lm-eval knows (its data then
come from the hub, because the user named it), a YAML file in lm-eval's form, or a data file in a form known here:

* `{"question", "options", "label"}` lines (AGIEval, TruthfulQA): the likeliest of the options, or, where
  there are none or the question asks to think step by step, the last "(X)" of a generated answer;
* `{"examples": [{"input", "target"}]}` (BIG-bench hard): a generated answer, compared exactly;
* `{"question", "answer"}` lines whose answers end in "#### n" (GSM8K): the last number of a generated answer.

Not here: prompts of our own. The few-shot examples of a file are its own first ones (`fewshot`), taken out of the test.
"""

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusejax.errors import InputError
from fusejax.evaluation.language import LanguageModel

__all__ = ["local_examples", "run_local", "run_tasks"]

Example = dict[str, Any]  # kind, prompt, target, and options where there are any


def run_tasks(
    model: LanguageModel,
    tasks: Sequence[str],
    *,
    fewshot: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Runs lm-eval's tasks, by name or by YAML file, and returns {task: {metric: value}}.

    Args:
      model: answers the questions.
      tasks: names that lm-eval knows, or paths of YAML files.
      fewshot: examples in each prompt; None: as the task says.
      limit: examples per task.
      seed: of the choice of examples.

    Raises:
      InputError: lm-eval is not installed, or does not know a task.
    """
    try:
        from lm_eval import evaluator  # pyright: ignore[reportMissingImports]
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(f"tasks need lm-eval ({error}): pip install 'fusejax[eval]'") from error
    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    folders = sorted({str(Path(file).parent) for file in files})
    manager = TaskManager(include_path=folders or None)
    names = [_task_name(Path(task)) if task in files else task for task in tasks]
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise InputError(f"lm-eval knows no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    found = evaluator.simple_evaluate(
        model=_adapter(model),
        tasks=list(names),
        num_fewshot=fewshot,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        fewshot_random_seed=seed,
    )
    results: Mapping[str, Any] = (found or {}).get("results", {})
    return {
        name: {key.split(",")[0]: float(value) for key, value in values.items() if isinstance(value, int | float)}
        for name, values in results.items()
    }


def _task_name(path: Path) -> str:
    if not path.is_file():
        raise InputError(f"no task file at {path}")
    named = re.search(r"^task:\s*[\"']?([^\s\"']+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    if named is None:
        raise InputError(f"{path} names no task; expected a line `task: NAME` as in lm-eval's task files")
    return named[1]


def _adapter(model: LanguageModel) -> Any:
    """lm-eval's `LM` over a `LanguageModel`."""
    from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]

    class Adapter(LM):
        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            answers = model.loglikelihood([request.args for request in requests])
            return [(answer.logprob, answer.greedy) for answer in answers]

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
            return model.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            found = [""] * len(requests)
            groups: dict[str, list[int]] = {}
            for index, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
            for options, indices in groups.items():
                until, longest = _generation_options(json.loads(options))
                prompts = [requests[index].args[0] for index in indices]
                texts = model.generate_until(prompts, until=until, max_new_tokens=longest)
                for index, text in zip(indices, texts, strict=True):
                    found[index] = text
            return found

    return Adapter()


def _generation_options(options: Mapping[str, Any]) -> tuple[list[str], int]:
    """lm-eval's options of a request: stop strings, and how much may be generated."""
    if options.get("do_sample") and float(options.get("temperature", 1.0)) > 0:
        raise InputError(f"this task samples ({dict(options)}); only greedy generation is compared here")
    until = options.get("until") or []
    longest = options.get("max_gen_toks", options.get("max_new_tokens", 256))
    return [until] if isinstance(until, str) else list(until), int(longest)


def run_local(
    model: LanguageModel, path: Path, *, fewshot: int = 0, limit: int | None = None, max_new_tokens: int = 256
) -> dict[str, float]:
    """Runs a data file as a task and returns {"accuracy", "stderr", "examples"}.

    Where all its questions have options, also "accuracy_per_byte": of the option with the highest log-probability per
    UTF-8 byte, for which long options are no worse than short ones.

    Args:
      model: answers the questions.
      path: see the module.
      fewshot: examples shown in each prompt.
      limit: examples that are tested.
      max_new_tokens: of generated answers.
    """
    examples = local_examples(path)
    shown, tested = examples[:fewshot], examples[fewshot:][:limit]
    if not tested:
        raise InputError(f"{path} has {len(examples)} examples, {fewshot} of them shown: none is left to test")
    shots = "".join(f"{example['prompt']} {example['solution']}\n\n" for example in shown)
    chosen = [example for example in tested if example["options"]]
    right, per_byte = _right_choices(model, chosen, shots)
    written = [example for example in tested if not example["options"]]
    if written:
        prompts = [shots + example["prompt"] for example in written]
        texts = model.generate_until(prompts, until=["\n\n", "\nQ:"], max_new_tokens=max_new_tokens)
        right += [_answer_of(text, e["kind"]) == e["target"] for text, e in zip(texts, written, strict=True)]
    share = sum(right) / len(right)
    found = {"accuracy": share, "stderr": (share * (1 - share) / len(right)) ** 0.5, "examples": len(right)}
    return found if written else found | {"accuracy_per_byte": sum(per_byte) / len(per_byte)}


def _right_choices(model: LanguageModel, examples: list[Example], shots: str) -> tuple[list[bool], list[bool]]:
    """Whether the likeliest option is the right one, for each example; and the likeliest per byte."""
    pairs = [(shots + example["prompt"], f" {option}") for example in examples for option in example["options"]]
    answers = iter(model.loglikelihood(pairs))
    right, per_byte = [], []
    for example in examples:
        options = example["options"]
        scores = {option: next(answers).logprob for option in options}
        right.append(max(options, key=scores.__getitem__) == example["target"])
        rates = {option: score / len(f" {option}".encode()) for option, score in scores.items()}
        per_byte.append(max(options, key=rates.__getitem__) == example["target"])
    return right, per_byte


def local_examples(path: Path) -> list[Example]:
    """Reads a data file's examples: `kind`, `prompt`, `solution` (shown), `target` (compared), `options`.

    Raises:
      InputError: no such file, or none of the forms that the module names.
    """
    if not path.is_file():
        raise InputError(f"no task file at {path}")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            text = file.read()
        try:
            rows = json.loads(text)
        except ValueError:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON and no JSON lines: {error}") from error
    rows = rows.get("examples", [rows]) if isinstance(rows, dict) else rows
    return [_example(row, f"{path}, example {index}") for index, row in enumerate(rows)]


def _example(row: Any, where: str) -> Example:
    if isinstance(row, dict):
        if {"input", "target"} <= set(row):
            prompt = f"Q: {row['input']}\nA:"
            return {
                "kind": "exact",
                "prompt": prompt,
                "solution": row["target"],
                "target": row["target"],
                "options": [],
            }
        if {"question", "label"} <= set(row) and isinstance(row["label"], list | str):
            label = row["label"][0] if isinstance(row["label"], list) else row["label"]
            options = [] if row["question"].endswith("step by step.") else list(row.get("options") or [])
            label = label if options else label.strip("()")
            return {"kind": "letter", "prompt": row["question"], "solution": label, "target": label, "options": options}
        if {"question", "answer"} <= set(row) and "####" in str(row["answer"]):
            target = _number(row["answer"].split("####")[-1])
            prompt = f"Question: {row['question']}\nAnswer:"
            return {"kind": "number", "prompt": prompt, "solution": row["answer"], "target": target, "options": []}
    found = sorted(row) if isinstance(row, dict) else type(row).__name__
    raise InputError(f"{where}: has {found}; expected question+options+label, input+target, or question+answer (####)")


def _answer_of(text: str, kind: str) -> str | None:
    if kind == "exact":
        return text.strip().split("answer is")[-1].strip().rstrip(".").strip()
    if kind == "letter":
        letters = re.findall(r"\(([A-Z])\)", text) or re.findall(r"\b([A-Z])\b", text)
        return letters[-1] if letters else None
    return _number(text)


def _number(text: str) -> str | None:
    """The last number of a text, without separators of thousands and trailing zeros of a fraction."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    if not found:
        return None
    number = found[-1].replace(",", "")
    return number.rstrip("0").rstrip(".") if "." in number else number
