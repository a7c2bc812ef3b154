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

Deliberately not done: tool definitions and tool calls as objects (a tool's answer is a message like others), images.
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

    def render(self, messages: Sequence[tuple[str, str]], *, where: str = "conversation") -> Rendering:
        """Renders a conversation and finds its contents in it.

        Args:
          messages: (role, content) pairs.
          where: the document, for messages.

        Raises:
          InputError: the template refuses the conversation, fails, says too much, or changes a content.
        """
        contents = [content for _, content in messages]
        room = _room(contents)
        marked = [(role, f"{_OPEN}{i}{_CLOSE}" if c else c) for i, (role, c) in enumerate(messages)]
        if any(mark in content for content in contents for mark in (_OPEN, _CLOSE, _BEGIN, _END)):
            raise InputError(f"{where}: a content holds a private-use character U+E0D0 to U+E0D3; leave it out")
        plain = re.sub(f"[{_BEGIN}{_END}]", "", self._text(messages, room, where))
        text, begun, generated = "", False, False
        found: list[tuple[int, int, int]] = []  # message, start, stop
        trained: set[int] = set()
        for part in re.split(f"({_OPEN}\\d+{_CLOSE}|[{_BEGIN}{_END}])", self._text(marked, room, where)):
            if part in (_BEGIN, _END):
                begun, generated = part == _BEGIN, True
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
        wanted = [i for i, (role, content) in enumerate(messages) if role == "assistant" and content]
        wanted = [i for i in wanted if i in trained] if generated else wanted
        spans = self._spans(found, wanted, where)
        return Rendering(text, tuple((start, stop) for _, start, stop in found), spans)

    def text(self, messages: Sequence[tuple[str, str]]) -> str:
        """Renders messages, whoever says the last; marks of `{% generation %}` left out."""
        rendered = self._text(messages, _room([content for _, content in messages]), "conversation")
        return re.sub(f"[{_BEGIN}{_END}]", "", rendered)

    def _spans(self, found: list[tuple[int, int, int]], wanted: list[int], where: str) -> tuple[tuple[int, int], ...]:
        places = {i: [(start, stop) for message, start, stop in found if message == i] for i in wanted}
        if wrong := {i: len(place) for i, place in places.items() if len(place) != 1}:
            raise InputError(
                f"{where}: {self.origin} prints assistant messages {sorted(wrong)} {sorted(set(wrong.values()))} "
                "times, expected once. Give another `chat_template`, or leave such messages out"
            )
        spans = tuple(place[0] for place in places.values())
        if not spans or list(spans) != sorted(spans):
            raise InputError(f"{where}: {self.origin} leaves no assistant turn to train, or says them out of order")
        return spans

    def _text(self, messages: Sequence[tuple[str, str]], room: int, where: str) -> str:
        steps = 0

        def bounded_range(*bounds: int) -> range:
            nonlocal steps
            made = range(*bounds)
            steps += len(made)
            if steps > _MAX_STEPS:
                raise jinja2.TemplateRuntimeError(f"its loops take more than {_MAX_STEPS} steps")
            return made

        given = [{"role": role, "content": content} for role, content in messages]
        names = {"range": bounded_range, "add_generation_prompt": False, "tools": None, "documents": None}
        parts, size = [], 0
        try:
            for part in self._template.generate(messages=given, **self.names, **names):
                parts.append(part)
                size += len(part)
                if size > room:
                    raise jinja2.TemplateRuntimeError(f"it says more than {room} characters")
        except (jinja2.TemplateError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            roles = [role for role, _ in messages][:8]
            raise InputError(f"{where}: {self.origin} cannot render the roles {roles}: {error}") from error
        return "".join(parts)


def _room(contents: Sequence[str]) -> int:
    """Characters that a rendering may have."""
    return _ROOM + 2 * sum(map(len, contents)) + _ROOM * len(contents) // 64


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
