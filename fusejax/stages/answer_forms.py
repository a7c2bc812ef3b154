"""Question files of public benchmarks, and answer files in the form that their judges and tests read.

* `alpaca_eval`: a list or lines of `{"instruction"}`; becomes a list of `{"instruction", "output", "generator"}`.
* `mt_bench`: lines of `{"question_id", "category", "turns"}`; lines of `{"question_id", "answer_id", "model_id",
  "choices": [{"index", "turns"}], "tstamp"}`.
* `multipl_e`: lines of `{"name", "language", "prompt", "tests", "stop_tokens"}`; a directory of `NAME.json.gz`, the
  question with its `completions`.
* `jsonl`: lines of `{"prompt"}` (or `instruction`, `question`) or `{"messages"}`; the lines, each with its `answer`.

Fields of a question that a form does not name are kept where the answer file has room for them.

Deliberately not done: judging. That is the public tools' (`scripts/benchmarks`), with their keys and networks.
"""

__all__ = ["FORMS", "Form", "Question", "Told", "read_questions"]

import gzip
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fusejax.data.messages import Fields, Message, messages_of
from fusejax.errors import InputError
from fusejax.io.manifest import atomic_directory

# FastChat's temperatures by category of question; others 0.7.
_MT_BENCH = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
_OTHER = 0.7
_PROMPTS = ("prompt", "instruction", "question")


class Question(NamedTuple):
    """What a model is asked: turns of a user, each of which it answers."""

    row: dict[str, Any]  # as it was read
    turns: tuple[str, ...]
    history: tuple[Message, ...] = ()  # before the first turn
    temperature: float | None = None  # of this question; None: the command's
    stops: tuple[str, ...] = ()  # strings that end an answer


class Told(NamedTuple):
    """What answer files say of how they were made."""

    name: str  # of the model
    identity: str  # hash of model, questions and options
    temperature: float
    top_p: float
    max_new_tokens: int
    time: float  # seconds since 1970


Answers = Sequence[Sequence[Sequence[str]]]  # per question, per sample, per turn


class Form(NamedTuple):
    """How one benchmark asks and wants to be answered."""

    read: Callable[[dict[str, Any], str], Question]
    write: Callable[[Path, Sequence[Question], Answers, Told], None]
    plain: bool = False  # prompts are continued as they are, without a chat template
    samples: bool = True  # takes several answers to one question


def read_questions(path: Path, form: Form, *, limit: int | None = None) -> list[Question]:
    """Reads a file of questions.

    Raises:
      InputError: no such file, no JSON, or a question without what the form needs.
    """
    if not path.is_file():
        raise InputError(f"no question file at {path}")
    try:
        text = path.read_text(encoding="utf-8")
        try:
            rows = json.loads(text)
        except ValueError:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no JSON and no JSON lines: {error}") from error
    rows = [rows] if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} holds no questions")
    found = []
    for number, row in enumerate(rows[:limit]):
        where = f"{path}, question {number}"
        if not isinstance(row, dict):
            raise InputError(f"{where} is a {type(row).__name__}, expected an object")
        found.append(form.read(row, where))
    return found


def _fields(row: dict[str, Any], where: str, **kinds: type) -> None:
    wrong = [f"{name} ({kind.__name__})" for name, kind in kinds.items() if not isinstance(row.get(name), kind)]
    if wrong:
        raise InputError(f"{where} has {sorted(row)}; missing or of another kind: {', '.join(wrong)}")


def _alpaca_eval(row: dict[str, Any], where: str) -> Question:
    _fields(row, where, instruction=str)
    return Question(row, (row["instruction"],))


def _mt_bench(row: dict[str, Any], where: str) -> Question:
    _fields(row, where, question_id=int, category=str, turns=list)
    if not row["turns"] or not all(isinstance(turn, str) for turn in row["turns"]):
        raise InputError(f"{where}: turns must be texts, got {row['turns']!r}")
    return Question(row, tuple(row["turns"]), temperature=_MT_BENCH.get(row["category"], _OTHER))


def _multipl_e(row: dict[str, Any], where: str) -> Question:
    _fields(row, where, name=str, language=str, prompt=str, tests=str, stop_tokens=list)
    if not re.fullmatch(r"[\w.-]*\w", row["name"]):
        raise InputError(f"{where}: name {row['name']!r} cannot be a file's")
    return Question(row, (row["prompt"],), stops=tuple(row["stop_tokens"]))


def _jsonl(row: dict[str, Any], where: str) -> Question:
    if "messages" in row:
        # The last message is the question; a stand-in answers it, for a record without answers is read as empty.
        talk = messages_of({"messages": [*row["messages"], {"role": "assistant", "content": "?"}]}, _TALK, where)[:-1]
        if not talk or talk[-1][0] != "user":
            raise InputError(f"{where}: the last message must be the user's")
        return Question(row, (talk[-1][1],), history=tuple(talk[:-1]))
    asked = next((row[name] for name in _PROMPTS if isinstance(row.get(name), str)), None)
    if asked is None:
        raise InputError(f"{where} has {sorted(row)}; expected messages, or one of {', '.join(_PROMPTS)}")
    return Question(row, (asked,))


_TALK = Fields(messages="messages")


def _write_alpaca_eval(path: Path, questions: Sequence[Question], answers: Answers, told: Told) -> None:
    rows = []
    for question, samples in zip(questions, answers, strict=True):
        kept = {name: question.row[name] for name in ("instruction", "dataset") if name in question.row}
        rows.append(kept | {"output": samples[0][0], "generator": told.name})
    _write(path, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")


def _write_mt_bench(path: Path, questions: Sequence[Question], answers: Answers, told: Told) -> None:
    lines = []
    for question, samples in zip(questions, answers, strict=True):
        choices = [{"index": index, "turns": list(turns)} for index, turns in enumerate(samples)]
        number = question.row["question_id"]
        answer = {"question_id": number, "answer_id": f"{told.identity[:16]}{number}", "model_id": told.name}
        lines.append(answer | {"choices": choices, "tstamp": told.time})
    _write_lines(path, lines)


def _write_multipl_e(path: Path, questions: Sequence[Question], answers: Answers, told: Told) -> None:
    how = {"temperature": told.temperature, "top_p": told.top_p, "max_tokens": told.max_new_tokens}
    with atomic_directory(path) as place:
        for question, samples in zip(questions, answers, strict=True):
            kept = {name: question.row[name] for name in ("name", "language", "prompt", "tests", "stop_tokens")}
            text = json.dumps(kept | how | {"completions": [turns[0] for turns in samples]})
            (place / f"{question.row['name']}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def _write_jsonl(path: Path, questions: Sequence[Question], answers: Answers, told: Told) -> None:
    del told
    lines = []
    for question, samples in zip(questions, answers, strict=True):
        several = {"answers": [turns[0] for turns in samples]} if len(samples) > 1 else {}
        lines.append(question.row | {"answer": samples[0][0]} | several)
    _write_lines(path, lines)


def _write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


FORMS = {
    "alpaca_eval": Form(_alpaca_eval, _write_alpaca_eval, samples=False),
    "mt_bench": Form(_mt_bench, _write_mt_bench),
    "multipl_e": Form(_multipl_e, _write_multipl_e, plain=True),
    "jsonl": Form(_jsonl, _write_jsonl),
}
