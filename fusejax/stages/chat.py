"""chat: talking to a model in the terminal, or one answer to one message.

The prompt is the conversation as the model's own template renders it, up to where the next answer would begin; the
token that the template puts after an answer ends it. An answer is shown as it is generated.

Not here: a server.
"""

__all__ = ["command", "prompt_of"]

import sys
from collections.abc import Sequence

import numpy as np

from fusejax.data.chat import ChatTemplate, template_of
from fusejax.data.messages import Message
from fusejax.errors import InputError
from fusejax.io.models import open_model, resolve_model
from fusejax.io.tokenizer_rendered import encode_rendered
from fusejax.io.tokenizers import Tokenizer, check_vocabulary, load_tokenizer
from fusejax.models.generation import Sampling
from fusejax.stages.command import Result, parser, positive_int
from fusejax.stages.tasks import answer_pieces, on_device

_ANSWER = "answer"  # stands where the model's answer will be
Messages = list[Message]


def prompt_of(template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], int]:
    """Returns the ids of a conversation up to the assistant's next answer, and the id that ends the answer.

    Args:
      template: of the model.
      tokenizer: its own.
      messages: (role, content) pairs, or with more (`fusejax.data.messages`), the last one not the assistant's.

    Raises:
      InputError: the template cannot say the conversation.
    """
    text, contents, spans = template.render([*messages, ("assistant", _ANSWER)])
    encoded = encode_rendered(tokenizer, text, contents=contents, spans=spans[-1:])
    trained = np.flatnonzero(np.asarray(encoded.spans) >= 0)
    ids = [int(encoded.tokens[0]), *encoded.labels.tolist()]
    return ids[: int(trained[0]) + 1], int(encoded.labels[trained[-1]])


def command(name: str, words: list[str]) -> Result:
    """`fusejax chat DIR [--message TEXT]`."""
    arguments = parser(name, "Talk to a model; an empty line or Ctrl-D ends. With --message: one answer.")
    arguments.add_argument("model", help="Hugging Face directory, fusejax checkpoint, or hub name")
    arguments.add_argument("--message", help="what the user says; the answer is printed")
    arguments.add_argument("--system", help="a system message")
    arguments.add_argument("--template", help="a named template or a jinja file; default: the tokenizer's own")
    arguments.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token")
    arguments.add_argument("--top-p", type=float, default=1.0, help="share of the mass that is sampled from")
    arguments.add_argument("--top-k", type=int, default=0, help="tokens that are sampled from; 0: all")
    arguments.add_argument("--max-new-tokens", type=positive_int, default=512, help="of one answer")
    arguments.add_argument("--seed", type=int, default=0, help="of the sampling")
    given = arguments.parse_args(words)
    sampling = Sampling(given.temperature, given.top_k, given.top_p)
    path = resolve_model(given.model)
    tokenizer = load_tokenizer(path)
    template = template_of(tokenizer, given.template)
    model = open_model(path)
    check_vocabulary(tokenizer, model.config.vocab_size, str(path))
    model = on_device(model)
    messages: Messages = [("system", given.system)] if given.system else []

    def answer(*, shown: bool) -> str:
        ids, stop = prompt_of(template, tokenizer, messages)
        room = model.config.max_positions - len(ids)
        if room < 1:
            raise InputError(f"the conversation has {len(ids)} tokens, the model reads {model.config.max_positions}")
        text = ""
        longest = min(given.max_new_tokens, room)
        for piece in answer_pieces(model, tokenizer, ids, longest, stops=[stop], sampling=sampling, seed=given.seed):
            if shown:
                print(piece[len(text) :], end="", flush=True)
            text = piece
        return text.strip()

    if given.message is not None:
        messages.append(("user", given.message))
        text = answer(shown=False)
        return Result({"message": given.message, "answer": text}, text)
    for line in sys.stdin if not sys.stdin.isatty() else iter(_ask, ""):
        if not line.strip():
            break
        messages.append(("user", line.strip()))
        messages.append(("assistant", answer(shown=True)))
        print()
    return Result({"messages": [{"role": m[0], "content": m[1]} for m in messages]})


def _ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""
