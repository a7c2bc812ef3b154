"""Answer files: the forms that judges read, the same file after an interruption, nothing too long or forgotten."""

import gzip
import json

import pytest

from fusejax.cli import main
from fusejax.data.chat import template_of
from fusejax.errors import InputError
from fusejax.io.models import open_model
from fusejax.io.tokenizers import load_tokenizer
from fusejax.models.generation import generate
from fusejax.stages import answer
from fusejax.stages.answer import batches_of
from fusejax.stages.answer_forms import FORMS, Question, read_questions
from fusejax.stages.chat import prompt_of
from fusejax.stages.command import Result
from tests.stages.tiny import make_model

SHORT = ["--max-new-tokens", "6", "--batch-tokens", "200"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("answer") / "talker", kind="spm_bpe", seed=2)


def _questions(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _answer(model, questions, form, out, *options) -> Result:
    words = ["--model", str(model), "--questions", str(questions), "--format", form, "--out", str(out), *SHORT]
    chat = [] if form == "multipl_e" else ["--template", "vicuna"]
    return answer.command("answer", [*words, *chat, *options])


def _directly(model, talk, *, longest=6):
    """What the model says, one prompt alone."""
    loaded, tokenizer = open_model(model), load_tokenizer(model)
    ids, stop = prompt_of(template_of(tokenizer, "vicuna"), tokenizer, talk)
    stops = {stop, loaded.config.eos_id}
    found = generate(
        loaded.params, loaded.config, [ids], max_new_tokens=longest, stop_ids=stops, valid_vocab=tokenizer.vocab_size
    )
    return b"".join(tokenizer.token_bytes[i] or b"" for i in found[0]).decode(errors="replace").strip()


def test_alpaca_eval_reads_what_each_prompt_alone_is_answered(model, tmp_path):
    asked = ["the cat", "two dogs run over green hills while", "it rained in May and"]
    rows = [{"instruction": text, "dataset": "d", "output": "another's", "generator": "g"} for text in asked]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    result = _answer(model, tmp_path / "q.json", "alpaca_eval", tmp_path / "out.json", "--name", "mine")
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["instruction"] for row in found] == asked
    for row in found:
        assert set(row) == {"instruction", "dataset", "output", "generator"} and row["generator"] == "mine"
        assert row["output"] == _directly(model, [("user", row["instruction"])])
    assert result.data["questions"] == result.data["answers"] == 3 and result.data["too_long"] == 0
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(InputError, match=r"out\.json exists"):
        _answer(model, tmp_path / "q.json", "alpaca_eval", tmp_path / "out.json")
    with pytest.raises(InputError, match="one answer per question"):
        _answer(model, tmp_path / "q.json", "alpaca_eval", tmp_path / "two.json", "--samples", "2")


def test_mt_bench_hears_its_own_first_answer(model, tmp_path):
    rows = [
        {"question_id": 81, "category": "math", "turns": ["a cat", "and a dog"]},
        {"question_id": 82, "category": "coding", "turns": ["on a mat", "saw it"], "reference": ["x", "y"]},
        {"question_id": 83, "category": "writing", "turns": ["hills"]},
    ]
    _answer(model, _questions(tmp_path / "q.jsonl", rows), "mt_bench", tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in found] == [81, 82, 83]
    for row, asked in zip(found[:2], rows, strict=False):
        assert set(row) == {"question_id", "answer_id", "model_id", "choices", "tstamp"} and row["model_id"] == "talker"
        (choice,) = row["choices"]
        first = _directly(model, [("user", asked["turns"][0])])
        talk = [("user", asked["turns"][0]), ("assistant", first), ("user", asked["turns"][1])]
        assert choice == {"index": 0, "turns": [first, _directly(model, talk)]}
    assert len({row["answer_id"] for row in found}) == 3
    assert len(found[2]["choices"][0]["turns"]) == 1


def test_multipl_e_completes_the_prompt_itself_up_to_a_stop_string(model, tmp_path):
    row = {"name": "HumanEval_0_x", "language": "rs", "prompt": "the cat", "tests": "}", "stop_tokens": ["\n}", "e"]}
    _answer(
        model, _questions(tmp_path / "q.jsonl", [row, row | {"name": "HumanEval_1_y"}]), "multipl_e", tmp_path / "out",
        "--samples", "3", "--temperature", "0.8", "--top-p", "0.95",
    )  # fmt: skip
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["HumanEval_0_x.json.gz", "HumanEval_1_y.json.gz"]
    found = json.loads(gzip.decompress((tmp_path / "out" / files[0]).read_bytes()))
    assert {key: found[key] for key in row} == row
    assert (found["temperature"], found["top_p"], found["max_tokens"]) == (0.8, 0.95, 6)
    assert len(found["completions"]) == 3 and not any("e" in text for text in found["completions"])
    assert main(["answer", "--model", str(model), "--questions", str(tmp_path / "q.jsonl"), "--format", "multipl_e",
                 "--out", str(tmp_path / "more" / "out"), "--max-new-tokens", "2", "--json"]) == 0  # fmt: skip


def test_an_answering_that_was_ended_goes_on_to_the_same_file(model, tmp_path, monkeypatch):
    rows = [{"id": n, "prompt": "the cat " * (1 + n % 4)} for n in range(9)]
    questions = _questions(tmp_path / "q.jsonl", rows)
    options = ("--temperature", "1", "--samples", "2", "--seed", "5")
    _answer(model, questions, "jsonl", tmp_path / "whole.jsonl", *options)
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert [row["id"] for row in whole] == list(range(9))
    assert all(row["answer"] == row["answers"][0] and len(row["answers"]) == 2 for row in whole)
    assert len({text for row in whole for text in row["answers"]}) > 6, "samples differ"

    added = answer.Log.add

    def die_after_two(self, number, batch):
        if len(self.done) == 2:
            self.path.write_text(self.path.read_text() + '{"batch": 2, "te')  # as a killed process leaves it
            raise KeyboardInterrupt
        added(self, number, batch)

    monkeypatch.setattr(answer.Log, "add", die_after_two)
    with pytest.raises(KeyboardInterrupt):
        _answer(model, questions, "jsonl", tmp_path / "cut.jsonl", *options)
    monkeypatch.undo()
    with pytest.raises(InputError, match="with other options: remove it"):
        _answer(model, questions, "jsonl", tmp_path / "cut.jsonl", *options, "--top-k", "5")
    answered = []
    monkeypatch.setattr(
        answer.Speaker, "answer", lambda *given, own=answer.Speaker.answer: answered.append(1) or own(*given)
    )
    _answer(model, questions, "jsonl", tmp_path / "cut.jsonl", *options)
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert answered, "what was done is not done again, the rest is"


def test_what_does_not_fit_is_counted_and_the_rest_is_answered(model, tmp_path):
    talk = [{"role": "system", "content": "be"}, {"role": "user", "content": "the cat sat"}]
    tokenizer = load_tokenizer(model)
    template = template_of(tokenizer, "vicuna")
    tight = next(
        text
        for text in ("cat " * 9 + "x" * n for n in range(60))
        if 64 - len(prompt_of(template, tokenizer, [("user", text)])[0]) == 3
    )
    rows = [{"prompt": "the cat " * 60}, {"messages": talk}, {"question": tight}]
    result = _answer(model, _questions(tmp_path / "q.jsonl", rows), "jsonl", tmp_path / "out.jsonl", "--limit", "3")
    found = [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert result.data["too_long"] == 1 and found[0] == ""
    assert found[1] == _directly(model, [("system", "be"), ("user", "the cat sat")])
    assert found[2] == _directly(model, [("user", tight)], longest=3)
    assert result.data["unfinished"] >= 1


def test_batches_hold_one_kind_of_question_and_fit():
    one, two = Question({}, ("a",)), Question({}, ("a", "b"), temperature=0.7)
    found = batches_of([one, two, one, two, one], [10, 40, 30, 40, 20], 2, None, 80)
    assert sorted(item for batch in found for item in batch) == sorted(
        (q, s, 0.7 if q in (1, 3) else 0.0) for q in range(5) for s in range(2)
    )
    lengths = [10, 40, 30, 40, 20]
    for batch in found:
        assert len({(item.temperature, item.question in (1, 3)) for item in batch}) == 1
        assert len(batch) == 1 or len(batch) * max(lengths[item.question] for item in batch) <= 80
    assert batches_of([one, two], [10, 10], 1, 0.2, 80)[0][0].temperature == 0.2


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("alpaca_eval", {"prompt": "x"}, r"missing or of another kind: instruction \(str\)"),
        ("mt_bench", {"question_id": 1, "category": "math", "turns": [1]}, "turns must be texts"),
        ("mt_bench", {"question_id": "1", "category": "math", "turns": ["a"]}, r"question_id \(int\)"),
        ("multipl_e", {"name": "../x", "language": "a", "prompt": "", "tests": "", "stop_tokens": []}, "cannot be a"),
        ("jsonl", {"text": "x"}, "expected messages, or one of prompt"),
        ("jsonl", {"messages": [{"role": "assistant", "content": "x"}]}, "last message must be the user's"),
        ("jsonl", ["x"], "is a list, expected an object"),
    ],
)
def test_questions_of_another_form_are_refused(tmp_path, form, row, message):
    with pytest.raises(InputError, match=message):
        read_questions(_questions(tmp_path / "q.jsonl", [row, row]), FORMS[form])
    with pytest.raises(InputError, match="no question file"):
        read_questions(tmp_path / "none", FORMS[form])
    (tmp_path / "bad").write_text("{no")
    with pytest.raises(InputError, match="no JSON"):
        read_questions(tmp_path / "bad", FORMS[form])
