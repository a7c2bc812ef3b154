"""Chat: conversations as a model reads them, and where in that text the trained contents stand.

A template is jinja, run in the sandbox and with the names that `transformers` gives it. Which characters of the
rendering are contents is found out by rendering twice: once as it is, once with every content replaced by a marker that
no template knows; the marked rendering, with the contents put back, must be the rendering. That holds for every
template that prints contents as they are (or trims them: contents are trimmed when they are read), however much it
repeats or leaves out around them, and whatever stands inside them; any other template is refused, for a guess would
train wrong bytes. Where a template says `{% generation %}`, only assistant turns inside it are trained.

A template comes with somebody's tokenizer, so it is not trusted: the sandbox reaches no Python internals, loops run
over the messages or over a bounded `range`, products and powers are bounded, and so is the text that comes out.

`strftime_now` gives a fixed day: a rendering is part of an artefact's identity and may not change over night.

A turn with tool calls is trained as the template writes it: what it adds to the text before, without what opens and
closes an assistant's plain answer there. A template that leaves the calls out, or renders the turns before otherwise
when more follow, is refused.

Deliberately not done: definitions of tools, images.
"""

__all__ = ["ChatTemplate", "Rendering", "template_of"]

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.nodes
import xxhash
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fusejax.data.chat_templates import NAMED_TEMPLATES, turn_end
from fusejax.data.messages import Message, calls_of
from fusejax.errors import InputError, nearest
from fusejax.io.tokenizers import Tokenizer

MAX_TEMPLATE = 1 << 18  # characters
_MAX_STEPS = 100_000  # of all ranges of one rendering together
_ROOM = 1 << 16  # characters that a template may add to the contents, and as many again per content
_DAY = "26 Jul 2024"
_OPEN, _CLOSE = "\ue0d0", "\ue0d1"  # private use: no template and no tokenizer has them
_MARKER = re.compile(f"{_OPEN}(\\d+){_CLOSE}")
_BEGIN, _END = "\ue0d2", "\ue0d3"  # what `{% generation %}` puts around its body


class Rendering(NamedTuple):
    """A conversation as one model reads it."""

    text: str
    contents: tuple[tuple[int, int], ...]  # characters of every content that is printed
    spans: tuple[tuple[int, int], ...]  # characters of the contents that are trained, in order


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}`: the body between two marks."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own interface)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (_BEGIN, _END)]
        return [marks[0], *body, marks[1]]


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["*", "**", "%"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        small = all(isinstance(x, int | float) and abs(x) <= _ROOM for x in (left, right))
        if operator == "%" and isinstance(left, str | bytes):
            raise jinja2.TemplateRuntimeError("formatting by % is not allowed in a chat template")
        if not small:
            raise jinja2.TemplateRuntimeError(f"{operator} of large numbers or of texts is not allowed")
        if operator == "**" and (abs(left) > 1024 or not 0 <= right <= 8):
            raise jinja2.TemplateRuntimeError("a power this large is not allowed")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled template with the special tokens of one tokenizer.

    Args:
      source: the jinja text.
      names: what the template may use beside the messages: `bos_token`, `eos_token`, ...
      origin: where it comes from, for messages.

    Raises:
      InputError: the text is too long or is not jinja.
    """

    def __init__(self, source: str, names: Mapping[str, Any], *, origin: str) -> None:
        if len(source) > MAX_TEMPLATE:
            raise InputError(f"{origin}: a template of {len(source)} characters; at most {MAX_TEMPLATE} are read")
        self.source, self.origin, self.names = source, origin, dict(names)
        self.environment = _environment()
        self.fingerprint = xxhash.xxh3_128_hexdigest(json.dumps([source, self.names], sort_keys=True).encode())
        try:
            self._template = self.environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"{origin} is not a jinja template: {error}") from error

    def render(self, messages: Sequence[Message], *, where: str = "conversation") -> Rendering:
        """Renders a conversation and finds its contents in it.

        Args:
          messages: (role, content) pairs, or with more (`fusejax.data.messages`).
          where: the document, for messages.

        Raises:
          InputError: the template refuses the conversation, fails, says too much, or changes a content.
        """
        contents = [message[1] for message in messages]
        room = _room(messages)
        marked: list[Message] = [(m[0], f"{_OPEN}{i}{_CLOSE}" if m[1] else "", *m[2:]) for i, m in enumerate(messages)]
        if any(mark in part for message in messages for part in message[1:] for mark in (_OPEN, _CLOSE, _BEGIN, _END)):
            raise InputError(f"{where}: a content holds a private-use character U+E0D0 to U+E0D3; leave it out")
        plain = re.sub(f"[{_BEGIN}{_END}]", "", self._text(messages, room, where))
        text, begun, generated = "", False, False
        found: list[tuple[int, int, int]] = []  # message, start, stop
        trained: set[int] = set()
        blocks: list[tuple[int, int]] = []  # characters that `{% generation %}` holds
        opened = 0
        for part in re.split(f"({_OPEN}\\d+{_CLOSE}|[{_BEGIN}{_END}])", self._text(marked, room, where)):
            if part in (_BEGIN, _END):
                begun, generated = part == _BEGIN, True
                blocks += [] if begun else [(opened, len(text))]
                opened = len(text)
            elif marker := _MARKER.fullmatch(part):
                index = int(marker[1])
                found.append((index, len(text), len(text) + len(contents[index])))
                text += contents[index]
                if begun:
                    trained.add(index)
            else:
                text += part
        if text != plain:
            at = next(
                (i for i, (a, b) in enumerate(zip(text, plain, strict=False)) if a != b), min(len(text), len(plain))
            )
            raise InputError(
                f"{where}: {self.origin} changes what the messages say (near {plain[max(at - 20, 0) : at + 20]!r}), so "
                "the trained bytes cannot be found. Give another `chat_template`, or leave such messages out"
            )
        calling = [i for i, message in enumerate(messages) if calls_of(message)]
        called = {i: self._called(messages, i, text, where) for i in calling}
        if generated:
            called = {i: s for i, s in called.items() if any(a <= s[0] and s[1] <= b for a, b in blocks)}
        wanted = [i for i, m in enumerate(messages) if m[0] == "assistant" and m[1] and i not in calling]
        wanted = [i for i in wanted if i in trained] if generated else wanted
        spans = self._spans(found, wanted, called, where)
        return Rendering(text, tuple((start, stop) for _, start, stop in found), spans)

    def text(self, messages: Sequence[Message], *, where: str = "conversation") -> str:
        """Renders messages, whoever says the last; marks of `{% generation %}` left out."""
        return re.sub(f"[{_BEGIN}{_END}]", "", self._text(messages, _room(messages), where))

    def _called(self, messages: Sequence[Message], index: int, text: str, where: str) -> tuple[int, int]:
        """Where the template writes message `index`, which calls tools, in the text of all messages."""
        before, upto = (self.text(messages[:stop], where=where) for stop in (index, index + 1))
        answer = self.text([*messages[:index], ("assistant", _OPEN)], where=where)
        opening, found, closing = answer.removeprefix(before).partition(_OPEN)
        said = upto.removeprefix(before)
        opening = opening if said.startswith(opening) else opening.rstrip(" ")
        prefixes = text.startswith(upto) and upto.startswith(before) and answer.startswith(before)
        if not (prefixes and found and said.startswith(opening) and said.endswith(closing)):
            raise InputError(
                f"{where}: where {self.origin} writes the tool calls of message {index} cannot be told from its turns "
                "before and after. Write calls as text, or leave the conversation out"
            )
        start, stop = len(before) + len(opening), len(upto) - len(closing)
        names = [call["function"]["name"] for call in calls_of(messages[index])]
        if missing := [name for name in names if name not in text[start:stop]]:
            raise InputError(
                f"{where}: {self.origin} does not write the tool calls of message {index} ({', '.join(missing)}). Give "
                "a `chat_template` that does, or write calls as text"
            )
        return start, stop

    def _spans(
        self, found: list[tuple[int, int, int]], wanted: list[int], called: Mapping[int, tuple[int, int]], where: str
    ) -> tuple[tuple[int, int], ...]:
        places = {i: [(start, stop) for message, start, stop in found if message == i] for i in wanted}
        if wrong := {i: len(place) for i, place in places.items() if len(place) != 1}:
            raise InputError(
                f"{where}: {self.origin} prints assistant messages {sorted(wrong)} {sorted(set(wrong.values()))} "
                "times, expected once. Give another `chat_template`, or leave such messages out"
            )
        located = {i: place[0] for i, place in places.items()} | dict(called)
        spans = tuple(located[i] for i in sorted(located))
        if not spans or list(spans) != sorted(spans):
            raise InputError(f"{where}: {self.origin} leaves no assistant turn to train, or says them out of order")
        return spans

    def _text(self, messages: Sequence[Message], room: int, where: str) -> str:
        steps = 0

        def bounded_range(*bounds: int) -> range:
            nonlocal steps
            made = range(*bounds)
            steps += len(made)
            if steps > _MAX_STEPS:
                raise jinja2.TemplateRuntimeError(f"its loops take more than {_MAX_STEPS} steps")
            return made

        given = [{"role": m[0], "content": m[1]} | (json.loads(m[2]) if len(m) > 2 else {}) for m in messages]
        names = {"range": bounded_range, "add_generation_prompt": False, "tools": None, "documents": None}
        parts, size = [], 0
        try:
            for part in self._template.generate(messages=given, **self.names, **names):
                parts.append(part)
                size += len(part)
                if size > room:
                    raise jinja2.TemplateRuntimeError(f"it says more than {room} characters")
        except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            roles = [message[0] for message in messages][:8]
            raise InputError(f"{where}: {self.origin} cannot render the roles {roles}: {error}") from error
        return "".join(parts)


def _room(messages: Sequence[Message]) -> int:
    """Characters that a rendering may have."""
    return _ROOM + 2 * sum(len(part) for message in messages for part in message[1:]) + _ROOM * len(messages) // 64


@cache
def _environment() -> _Sandbox:
    made = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    made.globals["raise_exception"] = _refuse
    made.globals["strftime_now"] = lambda _: _DAY
    return made


def _refuse(message: str) -> None:
    raise jinja2.TemplateRuntimeError(str(message))


def template_of(tokenizer: Tokenizer, choice: str | None = None) -> ChatTemplate:
    """Returns the chat template of a tokenizer.

    Args:
      tokenizer: of the model.
      choice: a name of `NAMED_TEMPLATES`, the path of a jinja file, or None: the tokenizer's own.

    Raises:
      InputError: there is no such template, or the tokenizer has none.
    """
    names = _names(tokenizer)
    if choice is None:
        return ChatTemplate(_own(tokenizer), names, origin=f"the chat template of {tokenizer.directory}")
    if choice in NAMED_TEMPLATES:
        return ChatTemplate(NAMED_TEMPLATES[choice], names, origin=f"the chat template {choice!r}")
    path = Path(choice)
    if not path.is_file():
        hint = nearest(choice, NAMED_TEMPLATES)
        raise InputError(f"chat_template {choice!r} is neither a file nor one of {', '.join(NAMED_TEMPLATES)}.{hint}")
    return ChatTemplate(_read(path), names, origin=f"the chat template {path}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a template: {error}") from error


def _names(tokenizer: Tokenizer) -> dict[str, str]:
    spelt = {index: content for content, index in tokenizer.special_tokens.items()}
    names = {f"{role}_token": spelt[index] for role, index in tokenizer.special_roles.items() if index in spelt}
    for key, value in tokenizer.config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            names[key] = content
    names["turn_end"] = turn_end(tokenizer.special_tokens, names.get("eos_token", ""))
    return names


def _own(tokenizer: Tokenizer) -> str:
    path = tokenizer.directory / "chat_template.jinja"
    if path.is_file():
        return _read(path)
    found = tokenizer.config.get("chat_template")
    if isinstance(found, list):  # several by name
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}.get("default")
    if not isinstance(found, str) or not found:
        raise InputError(
            f"the tokenizer in {tokenizer.directory} has no chat template; give `chat_template`: a jinja file or one "
            f"of {', '.join(NAMED_TEMPLATES)}"
        )
    return found
