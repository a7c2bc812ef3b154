"""What tasks ask of a model: the probability of a continuation, of a whole text, and text that goes on.

Questions are answered in batches of fixed shapes, the longest first, so that few programs are compiled. A prompt that
is too long loses its beginning; that is counted in `truncated`, and `on_batch` hears of progress.

A text begins with the start token, as in training. A continuation is what the tokens of `context + continuation` add
to those of `context`: the convention of lm-eval, so that numbers can be compared. Generated text is made of the bytes
of its tokens: a blank at its start stays.

Not here: tasks, few-shot prompts, metrics (`fusejax.evaluation.harness`), loading of models.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusejax.errors import InputError
from fusejax.evaluation.documents import evaluate_documents

__all__ = ["Answer", "Continuations", "Generator", "LanguageModel"]

# (tokens, labels, positions, segment_ids) [B, T] -> (log-probability [B, T], TopK [B, T, 1])
Scorer = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], tuple[Any, Any]]
_SHORTEST = 64  # widths of batches are this times a power of two


class Answer(NamedTuple):
    """What a model says of a continuation."""

    logprob: float  # nats
    greedy: bool  # whether the model would have taken each of its tokens
    tokens: int


class Continuations(NamedTuple):
    """Ids that were generated so far, and which rows have met a stop token."""

    ids: list[list[int]]
    finished: np.ndarray  # [B] bool


# (prompts, max_new_tokens) -> the continuations so far, again and again, until all have ended
Generator = Callable[[Sequence[Sequence[int]], int], Iterator[Continuations]]


class LanguageModel:
    """A scorer, a generator and a tokenizer, behind questions about text.

    Args:
      score: (tokens, labels, positions, segment_ids), [B, T] int32 each -> log-probabilities and the likeliest id.
      generate: continues prompts; None where nothing is generated.
      tokenizer: has `encode_batch`, `token_bytes`, `start_id`.
      context: most positions the model reads at once.
      batch_tokens: tokens per call of `score`, and per batch of prompts.
      on_batch: told how many questions each batch has answered.
    """

    def __init__(
        self,
        score: Scorer,
        generate: Generator | None,
        tokenizer: Any,
        *,
        context: int,
        batch_tokens: int = 16384,
        on_batch: Callable[[int], None] | None = None,
    ):
        self._score, self._generate, self._tokenizer = score, generate, tokenizer
        self.context, self._batch_tokens = context, batch_tokens
        self._on_batch = on_batch or (lambda count: None)
        self.truncated = 0  # questions whose beginning did not fit

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[Answer]:
        """Answers, for each (context, continuation), what the continuation's log-probability is, in nats.

        Raises:
          InputError: a continuation without tokens of its own, or longer than the model reads.
        """
        questions = [self._question(index, *pair) for index, pair in enumerate(pairs)]
        answers: list[Answer | None] = [None] * len(pairs)
        for batch in _batches(questions, self._batch_tokens, self.context):
            for (index, *_), answer in zip(batch, self._answer(batch), strict=True):
                answers[index] = answer
            self._on_batch(len(batch))
        return [answer for answer in answers if answer is not None]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Returns the log-probability of whole texts in nats; each token is predicted once."""
        found = [0.0] * len(texts)
        encoded = {text: self._tokenizer.encode(text, end=False) for text in texts if text}
        scored = evaluate_documents(
            lambda *arrays: self._score(*arrays)[0],
            _Encoded(encoded),
            texts,
            context=self.context,
            batch_size=max(1, self._batch_tokens // self.context),
        )
        for document in scored.documents:
            found[document.index] = -document.nll_nats
        self._on_batch(len(texts))
        return found

    def generate_until(self, prompts: Sequence[str], *, until: Sequence[str], max_new_tokens: int) -> list[str]:
        """Continues prompts up to the first of the strings `until`, a stop token, or `max_new_tokens`.

        Raises:
          InputError: no generator, or more new tokens than the model has positions.
        """
        if self._generate is None:
            raise InputError("this model was opened to score text, not to generate any")
        room = self.context - max_new_tokens
        if room < 1:
            raise InputError(f"max_new_tokens {max_new_tokens} leaves no room in a context of {self.context}")
        encoded = [self._ids(text)[-room:] for text in prompts]
        self.truncated += sum(len(self._ids(text)) > room for text in prompts)
        found = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda index: -len(encoded[index]))
        width = max(map(len, encoded), default=1) + max_new_tokens
        rows = max(1, self._batch_tokens // width)
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            for index, text in zip(
                chosen, self._continue([encoded[i] for i in chosen], until, max_new_tokens), strict=True
            ):
                found[index] = text
            self._on_batch(len(chosen))
        return found

    def text(self, ids: Sequence[int]) -> str:
        """The text of generated ids, special tokens left out."""
        known = self._tokenizer.token_bytes
        return b"".join(known[i] or b"" for i in ids if i < len(known)).decode(errors="replace")

    def _continue(self, prompts: list[list[int]], until: Sequence[str], max_new_tokens: int) -> list[str]:
        assert self._generate is not None
        texts = [""] * len(prompts)
        for state in self._generate(prompts, max_new_tokens):
            texts = [self.text(ids) for ids in state.ids]
            ended = [
                bool(end) or any(stop in text for stop in until)
                for end, text in zip(state.finished, texts, strict=True)
            ]
            if all(ended):
                break
        return [_cut(text, until) for text in texts]

    def _ids(self, text: str) -> list[int]:
        """The ids of a text after the start token, where the tokenizer has one."""
        document = self._tokenizer.encode(text, end=False)
        return [*document.tokens[:1].tolist(), *document.labels.tolist()] if len(document.tokens) else self._short(text)

    def _short(self, text: str) -> list[int]:
        """The ids of a text that predicts nothing: a start token alone, or a single token without one."""
        start = self._tokenizer.start_id
        if start is not None and not text:
            return [int(start)]
        ids = self._tokenizer.encode(text + " ", start=False, end=False).tokens[:1].tolist() if text else []
        if not ids:
            raise InputError("an empty prompt needs a tokenizer with a start token")
        return ids

    def _question(self, index: int, context: str, continuation: str) -> tuple[int, list[int], int]:
        blanks = len(context) - len(context.rstrip())
        if blanks:  # as lm-eval: a blank belongs to the word that follows it
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        whole = self._ids(context + continuation)
        known = len(self._ids(context)) if context or self._tokenizer.start_id is not None else 1
        own = len(whole) - known
        if own < 1 or own > self.context:
            raise InputError(
                f"continuation {index} ({continuation[:40]!r}) adds {own} tokens to its context; between 1 and the "
                f"model's {self.context} are needed"
            )
        self.truncated += len(whole) > self.context + 1
        return index, whole[-self.context - 1 :], own

    def _answer(self, batch: list[tuple[int, list[int], int]]) -> Iterator[Answer]:
        width = _width(max(len(ids) for _, ids, _ in batch) - 1, self.context)
        rows = max(1, self._batch_tokens // width)
        tokens, labels, positions, segments = (np.zeros((rows, width), np.int32) for _ in range(4))
        for row, (_, ids, _) in enumerate(batch):
            length = len(ids) - 1
            tokens[row, :length], labels[row, :length] = ids[:-1], ids[1:]
            positions[row, :length], segments[row, :length] = np.arange(length), 1
        logprobs, likeliest = self._score(tokens, labels, positions, segments)
        logprobs, likeliest = np.asarray(logprobs, np.float64), np.asarray(likeliest.ids)[..., 0]
        for row, (_, ids, own) in enumerate(batch):
            place = (row, slice(len(ids) - 1 - own, len(ids) - 1))
            greedy = bool(np.array_equal(likeliest[place], labels[place]))
            yield Answer(float(logprobs[place].sum()), greedy, own)


class _Encoded(NamedTuple):
    """Stands in for a tokenizer where the texts are encoded already."""

    texts: dict[str, Any]

    def encode(self, text: str) -> Any:
        return self.texts[text]


def _width(length: int, limit: int) -> int:
    width = _SHORTEST
    while width < length:
        width *= 2
    return min(width, max(limit, length))


def _batches(
    questions: list[tuple[int, list[int], int]], tokens: int, context: int
) -> Iterator[list[tuple[int, list[int], int]]]:
    """Cuts questions, the longest first, into batches of one width, that of the array they are laid into."""
    batch: list[tuple[int, list[int], int]] = []
    width = 0
    for question in sorted(questions, key=lambda question: -len(question[1])):
        own = _width(len(question[1]) - 1, context)
        if batch and (own != width or len(batch) == max(1, tokens // width)):
            yield batch
            batch = []
        batch, width = [*batch, question], own
    if batch:
        yield batch


def _cut(text: str, until: Sequence[str]) -> str:
    ends = [text.find(stop) for stop in until if stop in text]
    return text[: min(ends)] if ends else text
