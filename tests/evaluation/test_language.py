"""Questions about text are answered as transformers would, in any batch, and tasks count right answers."""

import gzip
import json
import sys
import types
from functools import cache

import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.evaluation.harness import _answer_of, local_examples, run_local, run_tasks
from fusejax.evaluation.language import Answer, LanguageModel
from fusejax.stages.tasks import open_language_model
from tests.paths import DATA, needs_data

STORIES = DATA / "models" / "stories260K"
PAIRS = [
    ("Once upon a time", ", there was a little girl"),
    ("Once upon a time, ", "there was"),  # the blank belongs to the continuation
    ("", "One day"),
    ("Lily was sad because she lost her favourite toy in the park and", " zebra quantum"),
]


@cache
def stories() -> LanguageModel:
    return open_language_model(STORIES, context=512, batch_tokens=256)


@needs_data
def test_log_likelihoods_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)

    def theirs(context: str, continuation: str) -> tuple[float, bool]:
        blanks = len(context) - len(context.rstrip())
        context, continuation = context[: len(context) - blanks], context[len(context) - blanks :] + continuation
        whole, known = tokenizer(context + continuation).input_ids, len(tokenizer(context).input_ids)
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([whole])).logits[0].double(), -1)
        rows, labels = logprobs[known - 1 : -1], torch.tensor(whole[known:])
        return float(rows.gather(1, labels[:, None]).sum()), bool((rows.argmax(-1) == labels).all())

    answers = stories().loglikelihood(PAIRS)
    for answer, pair in zip(answers, PAIRS, strict=True):
        logprob, greedy = theirs(*pair)
        assert answer.logprob == pytest.approx(logprob, abs=2e-4)
        assert answer.greedy == greedy
    texts = ["".join(pair) for pair in PAIRS]
    for found, text in zip(stories().rolling(texts), texts, strict=True):
        assert found == pytest.approx(theirs("", text)[0], abs=5e-4)


@needs_data
def test_generated_text_ends_at_a_stop_string_and_goes_on_as_greedy_choice_does():
    prompts = ["Once upon a time, there was a little", "Tom and Sam"]
    whole = stories().generate_until(prompts, until=[], max_new_tokens=40)
    assert whole[0].startswith(" girl")  # with its blank
    cut = stories().generate_until(prompts, until=["."], max_new_tokens=40)
    assert cut == [text.split(".")[0] for text in whole]
    for prompt, text in zip(prompts, cut, strict=True):
        assert stories().loglikelihood([(prompt, text)])[0].greedy


@needs_data
def test_prompts_that_do_not_fit_lose_their_beginning_and_are_counted():
    model = open_language_model(STORIES, context=32, batch_tokens=256)
    long = "A cat sat on the mat. " * 20
    assert np.isfinite(model.loglikelihood([(long, "The cat was happy")])[0].logprob)
    assert model.truncated == 1
    with pytest.raises(InputError, match="adds 0 tokens"):
        model.loglikelihood([("A cat", "")])
    with pytest.raises(InputError, match="no room"):
        model.generate_until(["A"], until=[], max_new_tokens=32)


@needs_data
def test_many_short_questions_of_one_length_are_answered_in_several_batches():
    model = open_language_model(STORIES, context=512, batch_tokens=256)
    asked = []
    model._on_batch = asked.append
    pairs = [("A cat", " sat"), ("A cat", " ran")] * 20
    answers = model.loglikelihood(pairs)
    assert sum(asked) == 40 and len(asked) == 10 and len(set(answers)) == 2


class Oracle(LanguageModel):
    """Prefers the continuation that its list names, and generates the next of its texts."""

    def __init__(self, right, texts=()):
        self.right, self.texts, self.truncated = right, list(texts), 0

    def loglikelihood(self, pairs):
        return [Answer(-1.0 if continuation.strip() in self.right else -2.0, True, 1) for _, continuation in pairs]

    def generate_until(self, prompts, *, until, max_new_tokens):
        return [self.texts.pop(0) for _ in prompts]


class Lengthy(Oracle):
    """Pays 2 nats for a short option and 3 for a long one."""

    def __init__(self):
        super().__init__([])

    def loglikelihood(self, pairs):
        return [Answer(-2.0 - (len(continuation) > 4), True, 1) for _, continuation in pairs]


def test_local_files_of_every_form_are_scored(tmp_path):
    letters = tmp_path / "letters.jsonl.gz"
    rows = [{"question": "Q", "options": ["A", "B"], "label": [label]} for label in "ABBB"]
    with gzip.open(letters, "wt") as file:
        file.write("\n".join(map(json.dumps, rows)))
    rows = [{"question": "Q", "options": ["A", "a long one"], "label": "a long one"}]
    letters.with_name("long.jsonl").write_text(json.dumps(rows[0]))
    assert run_local(Oracle(["B"]), letters)["accuracy"] == 0.75
    assert run_local(Oracle(["B"]), letters, fewshot=1)["accuracy"] == 1.0
    found = run_local(Lengthy(), letters.with_name("long.jsonl"))
    assert (found["accuracy"], found["accuracy_per_byte"]) == (0.0, 1.0)
    exact = tmp_path / "bbh.json"
    exact.write_text(json.dumps({"examples": [{"input": "1", "target": "True"}, {"input": "2", "target": "(B)"}]}))
    assert run_local(Oracle([], [" True", " So the answer is (B)."]), exact)["accuracy"] == 1.0
    numbers = tmp_path / "gsm.jsonl"
    numbers.write_text(json.dumps({"question": "How many?", "answer": "3+4=7 #### 1,007"}))
    assert run_local(Oracle([], ["it is 1007.00"]), numbers)["accuracy"] == 1.0
    thinking = tmp_path / "mmlu.jsonl"
    thinking.write_text(
        json.dumps({"question": "Q\nA: Let's think step by step.", "options": ["(A)", "(B)"], "label": "(B)"})
    )
    assert run_local(Oracle(["(A)"], ["First (A), no. The answer is (B)."]), thinking)["accuracy"] == 1.0
    with pytest.raises(InputError, match="none is left"):
        run_local(Oracle([]), numbers, fewshot=1)


def test_files_of_other_forms_are_refused(tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a"}')
    with pytest.raises(InputError, match=r"has \['text'\]; expected"):
        local_examples(other)
    with pytest.raises(InputError, match="no task file"):
        local_examples(tmp_path / "missing.json")
    other.write_text("no json")
    with pytest.raises(InputError, match="no JSON"):
        local_examples(other)
    assert _answer_of("none here", "number") is None


@needs_data
def test_every_benchmark_file_that_lies_here_is_read():
    files = sorted(path for path in (DATA / "benchmarks").rglob("*.json*") if "HumanEval" not in path.name)
    assert len(files) > 60
    for path in files:
        for example in local_examples(path):
            assert example["prompt"] and example["target"], path
            assert not example["options"] or example["target"] in example["options"], path


def test_without_the_harness_its_tasks_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", types.ModuleType("lm_eval"))
    with pytest.raises(InputError, match=r"fusejax\[eval\]"):
        run_tasks(Oracle([]), ["hellaswag"])


def test_the_harness_runs_its_tasks_on_the_model(tmp_path):
    """A task file in lm-eval's form over a local file: needs the extra `eval`."""
    pytest.importorskip("lm_eval")
    rows = [{"q": "Q", "choices": ["yes", "no"], "gold": gold} for gold in (0, 0, 1)]
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "tiny_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tiny.yaml").write_text("\n".join(f"{name}: {json.dumps(value)}" for name, value in task.items()))
    found = run_tasks(Oracle(["yes"]), [str(tmp_path / "tiny.yaml")])
    assert found["tiny_choice"]["acc"] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="knows no task nonsense"):
        run_tasks(Oracle([]), ["nonsense"])
