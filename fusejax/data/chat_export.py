"""A chat template as other programs read it, `transformers` first: the text of `chat_template.jinja`.

Ours may use names that only fusejax knows (`turn_end`) and say nothing of `add_generation_prompt`. So the values that
a tokenizer gives to such names are written at the top, and what opens an answer at the end, blanks aside: a model reads
` Yes` as one token, which a blank of the prompt would split.

One thing differs by choice: contents are trimmed when fusejax reads a conversation, `transformers` takes them as they
are.
"""

__all__ = ["portable_template"]

import json

import jinja2.meta

from fusejax.data.chat import ChatTemplate
from fusejax.errors import InputError

_TALK = [("user", "a?"), ("assistant", "b!"), ("user", "c?"), ("assistant", "d!")]
_PROMPT = "add_generation_prompt"


def portable_template(template: ChatTemplate) -> str:
    """Returns a jinja template that needs no names but those of `transformers`, and renders the same text.

    Raises:
      InputError: the template cannot be written so; no known one.
    """
    used = jinja2.meta.find_undeclared_variables(template.environment.parse(template.source))
    names = {name: value for name, value in sorted(template.names.items()) if name in used}
    source = "".join(f"{{% set {name} = {_literal(value)} %}}\n" for name, value in names.items())
    source += template.source.removesuffix("\n")
    if _PROMPT not in used and (opening := _opening(template)):
        source += f"{{% if {_PROMPT} %}}{{{{ {_literal(opening)} }}}}{{% endif %}}"
    written = ChatTemplate(source, {}, origin=template.origin)
    if written.text(_TALK) != template.text(_TALK):
        raise InputError(
            f"{template.origin} cannot be exported: with its special tokens written out it renders something else. "
            "Give one that uses bos_token, eos_token and messages alone"
        )
    return source


def _literal(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _opening(template: ChatTemplate) -> str:
    """What stands between a user's turn and the answer; empty where that cannot be told."""
    answer = "\ue0d5"  # private use: no template says it
    asked, answered = template.text([("user", "a?")]), template.text([("user", "a?"), ("assistant", answer)])
    opening, found, _ = answered.removeprefix(asked).partition(answer)
    return opening.rstrip(" ") if found and answered.startswith(asked) else ""
