"""answer: a model's answers to a file of questions, in the form that a public judge or test reads.

Questions are answered in batches, the longest first. A batch is written down when it is done, so a command that was
ended goes on with the next one and ends with the file that an undisturbed one writes: which questions share a batch
and what it samples depend on the questions and the options alone.

An answer ends at the template's stop token, at a stop string of the question, at --max-new-tokens or at the end of
the model's positions. A conversation that leaves no position for an answer has an empty one. Both are counted.

Not here: judging, and models that fusejax does not compute.
"""

__all__ = ["command"]

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fusejax.data.chat import ChatTemplate, template_of
from fusejax.data.messages import Message
from fusejax.errors import InputError
from fusejax.io.manifest import fingerprint_of
from fusejax.io.models import LoadedModel, open_model, resolve_model
from fusejax.io.progress import progress, say
from fusejax.io.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from fusejax.models.generation import Sampling
from fusejax.stages.answer_forms import FORMS, Question, Told, read_questions
from fusejax.stages.chat import prompt_of
from fusejax.stages.command import Result, parser, positive_int
from fusejax.stages.tasks import on_device, pieces


class Item(NamedTuple):
    """One answer that is wanted."""

    question: int
    sample: int
    temperature: float


class Batch(NamedTuple):
    """Answers to some items: per item one text per turn."""

    texts: list[list[str]]
    unfinished: int  # answers that were cut at a limit
    too_long: int  # that had no position left and are empty


class Speaker:
    """A model that answers.

    Args:
      model: on its device.
      tokenizer: of the model.
      template: of its conversations; None: prompts are continued as they are.
      max_new_tokens: of one answer.
      sampling: beside the temperature.
      seed: of the sampling.
    """

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self._model, self._tokenizer, self._template = model, tokenizer, template
        self._longest, self._sampling, self._seed = max_new_tokens, sampling, seed
        self._unfinished = self._too_long = 0

    def prompt(self, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
        """The ids of what is said so far, and those that end an answer."""
        if self._template is not None:
            trimmed: list[Message] = [(m[0], m[1].strip(), *m[2:]) for m in messages]
            ids, stop = prompt_of(self._template, self._tokenizer, trimmed)
            return ids, [stop]
        text = messages[-1][1]
        found = self._tokenizer.encode(text, end=False)
        if not len(found.tokens):
            raise InputError(f"the prompt {text[:40]!r} has no token that another could follow")
        return [*found.tokens[:1].tolist(), *found.labels.tolist()], []

    def answer(self, questions: Sequence[Question], temperature: float, number: int) -> Batch:
        """Answers all turns of questions; `number` sets the batch's sampling apart from others'."""
        self._unfinished = self._too_long = 0
        talks: list[list[Message]] = [list(question.history) for question in questions]
        texts: list[list[str]] = [[] for _ in questions]
        for turn in range(max(len(question.turns) for question in questions)):
            rows = [row for row, question in enumerate(questions) if turn < len(question.turns)]
            for row in rows:
                talks[row].append(("user", questions[row].turns[turn]))
            seed = int(np.random.SeedSequence([self._seed, number, turn]).generate_state(1)[0] >> 1)
            said = self._turn([talks[row] for row in rows], questions[rows[0]].stops, temperature, seed)
            for row, text in zip(rows, said, strict=True):
                talks[row].append(("assistant", text))
                texts[row].append(text)
        return Batch(texts, self._unfinished, self._too_long)

    def _turn(
        self, talks: Sequence[Sequence[Message]], until: Sequence[str], temperature: float, seed: int
    ) -> list[str]:
        """Answers together what leaves room for `max_new_tokens`, and each of the others alone."""
        prompts = [self.prompt(talk) for talk in talks]
        room = [self._model.config.max_positions - len(ids) for ids, _ in prompts]
        together = [row for row, left in enumerate(room) if left >= self._longest]
        alone = [[row] for row, left in enumerate(room) if 0 < left < self._longest]
        self._too_long += sum(left < 1 for left in room)
        found = [""] * len(talks)
        for rows in [together] * bool(together) + alone:
            longest = min(self._longest, *(room[row] for row in rows))
            stops = prompts[rows[0]][1]
            sampling = self._sampling._replace(temperature=temperature)
            texts = self._continued([prompts[row][0] for row in rows], longest, stops, until, sampling, seed)
            for row, text in zip(rows, texts, strict=True):
                found[row] = text if self._template is None else text.strip()
        return found

    def _continued(
        self,
        prompts: Sequence[Sequence[int]],
        longest: int,
        stops: Sequence[int],
        until: Sequence[str],
        sampling: Sampling,
        seed: int,
    ) -> list[str]:
        texts, ended = [""] * len(prompts), np.zeros(len(prompts), bool)
        steps = pieces(self._model, self._tokenizer, prompts, longest, stops=stops, sampling=sampling, seed=seed)
        for state in steps:
            texts = [self._text(ids) for ids in state.ids]
            cut = [any(stop in text for stop in until) for text in texts]
            ended = np.asarray(state.finished) | np.array(cut, bool)
            if ended.all():
                break
        self._unfinished += int((~ended).sum())
        return [text[: min([text.find(stop) for stop in until if stop in text], default=None)] for text in texts]

    def _text(self, ids: Sequence[int]) -> str:
        known = self._tokenizer.token_bytes
        return b"".join(known[i] or b"" for i in ids).decode(errors="replace")


class Log:
    """The batches that are done, a line each, in a file beside the answers.

    Raises:
      InputError: the file is of other questions, of another model or of other options.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path, self.done = path, dict[int, Batch]()
        if not path.is_file():
            path.write_text(json.dumps({"identity": identity}) + "\n", encoding="utf-8")
        lines = path.read_text(encoding="utf-8").split("\n")
        whole = lines[:-1]  # what a killed process wrote of a line is left out, and overwritten
        if not whole or json.loads(whole[0]) != {"identity": identity}:
            raise InputError(f"{path} holds answers by another model or with other options: remove it, or change --out")
        for line in whole[1:]:
            found = json.loads(line)
            self.done[found["batch"]] = Batch(found["texts"], found["unfinished"], found["too_long"])
        if lines[-1]:
            path.write_text("\n".join(whole) + "\n", encoding="utf-8")

    def add(self, number: int, batch: Batch) -> None:
        """Writes a batch down."""
        self.done[number] = batch
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"batch": number} | batch._asdict()) + "\n")


def batches_of(
    questions: Sequence[Question], lengths: Sequence[int], samples: int, temperature: float | None, room: int
) -> list[list[Item]]:
    """Cuts what is wanted into batches of one temperature and one number of turns, the longest prompts first.

    Args:
      questions: all of them.
      lengths: tokens of each question's first prompt and of its answers.
      samples: answers per question.
      temperature: of all; None: each question's own, else 0.
      room: tokens of a batch.
    """
    items = []
    for number, question in enumerate(questions):
        own = temperature if temperature is not None else question.temperature or 0.0
        items += [Item(number, sample, own) for sample in range(samples)]

    def kind(item: Item) -> tuple[float, int, tuple[str, ...]]:
        question = questions[item.question]
        return item.temperature, len(question.turns), question.stops

    found: list[list[Item]] = []
    for item in sorted(items, key=lambda item: (kind(item), -lengths[item.question])):
        first = found[-1][0] if found else None
        if first is None or kind(first) != kind(item) or (len(found[-1]) + 1) * lengths[first.question] > room:
            found.append([])
        found[-1].append(item)
    return found


def command(name: str, words: list[str]) -> Result:
    """`fusejax answer --model DIR --questions FILE --format FORM --out PATH`."""
    given = _arguments(name).parse_args(words)
    form = FORMS[given.format]
    if given.samples > 1 and not form.samples:
        raise InputError(f"{given.format} takes one answer per question, got --samples {given.samples}")
    if given.out.exists():
        raise InputError(f"{given.out} exists: remove it, or name another --out")
    questions = read_questions(given.questions, form, limit=given.limit)
    path = resolve_model(given.model)
    tokenizer = load_tokenizer(path)
    template = None if form.plain or given.plain else template_of(tokenizer, given.template)
    model = open_model(path, compute_dtype=given.dtype)
    check_vocabulary(tokenizer, model.config.vocab_size, str(path))
    sampling = Sampling(0.0, given.top_k, given.top_p)
    speaker = Speaker(
        on_device(model), tokenizer, template,
        max_new_tokens=given.max_new_tokens, sampling=sampling, seed=given.seed,
    )  # fmt: skip
    lengths = [
        len(speaker.prompt([*q.history, ("user", q.turns[0])])[0]) + len(q.turns) * given.max_new_tokens
        for q in questions
    ]
    batches = batches_of(questions, lengths, given.samples, given.temperature, given.batch_tokens)
    kept = {key: value for key, value in vars(given).items() if key not in ("model", "questions", "out", "name")}
    identity = fingerprint_of(
        [model.fingerprint, template and template.fingerprint, [question.row for question in questions], kept]
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    log = Log(given.out.with_name(f"{given.out.name}.partial"), identity)
    with progress("answer", total=sum(map(len, batches)), unit="answers") as bar:
        for number, batch in enumerate(batches):
            if number not in log.done:
                asked = [questions[item.question] for item in batch]
                log.add(number, speaker.answer(asked, batch[0].temperature, number))
            bar.update(len(batch))
    answers: list[list[list[str]]] = [[[]] * given.samples for _ in questions]
    for number, batch in enumerate(batches):
        for item, turns in zip(batch, log.done[number].texts, strict=True):
            answers[item.question][item.sample] = turns
    told = Told(
        given.name or path.name, identity, given.temperature or 0.0, given.top_p, given.max_new_tokens, time.time()
    )
    form.write(given.out, questions, answers, told)
    log.path.unlink()
    return _result(given.out, len(questions), list(log.done.values()))


def _result(out: Path, questions: int, done: Sequence[Batch]) -> Result:
    counts = {name: sum(getattr(batch, name) for batch in done) for name in ("unfinished", "too_long")}
    data: dict[str, Any] = {"questions": questions, "answers": sum(len(t) for b in done for t in b.texts)} | counts
    if counts["unfinished"]:
        say(f"{counts['unfinished']} answers reached --max-new-tokens or the end of the model's positions")
    if counts["too_long"]:
        say(f"{counts['too_long']} conversations were longer than the model reads: their answers are empty")
    return Result(data | {"out": str(out)}, f"{data['answers']} answers -> {out}")


def _arguments(name: str) -> argparse.ArgumentParser:
    made = parser(name, "Answer a file of questions, for a judge or a test to read. Goes on where it was ended.")
    made.add_argument("--model", required=True, help="Hugging Face directory, fusejax checkpoint, or hub name")
    made.add_argument("--questions", required=True, type=Path, help="JSON list or JSON lines")
    made.add_argument("--format", required=True, choices=sorted(FORMS), help="of questions and answers")
    made.add_argument("--out", required=True, type=Path, help="new file (multipl_e: new directory)")
    made.add_argument("--name", help="of the model in the answers; default: the last part of --model")
    made.add_argument("--template", help="a named template or a jinja file; default: the tokenizer's own")
    made.add_argument("--plain", action="store_true", help="continue prompts as they are, without a chat template")
    made.add_argument("--samples", type=positive_int, default=1, help="answers to each question")
    made.add_argument(
        "--temperature", type=float, help="0 takes the likeliest token; default: mt_bench by category, else 0"
    )
    made.add_argument("--top-p", type=float, default=1.0, help="share of the mass that is sampled from")
    made.add_argument("--top-k", type=int, default=0, help="tokens that are sampled from; 0: all")
    made.add_argument("--max-new-tokens", type=positive_int, default=1024, help="of one answer")
    made.add_argument("--seed", type=int, default=0, help="of the sampling")
    made.add_argument("--limit", type=positive_int, help="questions to answer")
    made.add_argument("--batch-tokens", type=positive_int, default=16384, help="tokens of a batch")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="of activations; default: the model's")
    return made
