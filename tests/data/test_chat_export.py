"""An exported template is read by transformers as fusejax reads its own: the same text and the same ids."""

import functools

import pytest

from fusejax.data import chat_export
from fusejax.data.chat import ChatTemplate, template_of
from fusejax.data.chat_export import portable_template
from fusejax.data.chat_templates import NAMED_TEMPLATES
from fusejax.data.tokenizer_training import train_tokenizer
from fusejax.errors import InputError
from fusejax.io.tokenizer_rendered import encode_rendered
from fusejax.io.tokenizers import load_tokenizer
from fusejax.stages.chat import prompt_of
from tests.data.special_tokens import add_special_tokens
from tests.stages.tiny import texts

TALK = [
    ("user", "What's 2+2?  é"),
    ("assistant", "It's 4. ok\n\n  def f():"),
    ("user", 'and "then"?'),
    ("assistant", "Seven!"),
]
PLAIN = ("openchat_3.5", "vicuna", "llama-2", "mistral", "zephyr")  # need no token beside bos and eos


@functools.cache
def _directory(place, kind: str, *, special: bool):
    directory = place / f"{kind}-{special}"
    train_tokenizer(texts(100, seed=1), kind=kind, vocab_size=320, out_dir=directory)
    if special:
        add_special_tokens(directory)
    return directory


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("exported")


CASES = [("byte_bpe", name, True) for name in sorted(NAMED_TEMPLATES)]
CASES += [(kind, name, False) for kind in ("byte_bpe", "spm_bpe") for name in PLAIN]


@pytest.mark.parametrize(("kind", "name", "special"), CASES)
def test_transformers_reads_every_named_template_as_we_do(place, kind, name, special):
    transformers = pytest.importorskip("transformers")
    directory = _directory(place, kind, special=special)
    ours = load_tokenizer(directory)
    template = template_of(ours, name)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    theirs.chat_template = portable_template(template)
    talk = [{"role": role, "content": content} for role, content in TALK]

    rendered = template.render(TALK)
    assert theirs.apply_chat_template(talk, tokenize=False) == rendered.text
    encoded = encode_rendered(ours, rendered.text, contents=rendered.contents, spans=rendered.spans)
    ids = [int(encoded.tokens[0]), *encoded.labels.tolist()]
    assert theirs.apply_chat_template(talk, return_dict=False) == ids

    prompt, _ = prompt_of(template, ours, TALK[:1])
    asked = theirs.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    assert asked == prompt == ids[: len(prompt)]


def test_a_template_that_knows_of_prompts_is_left_as_it_is():
    source = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}A:{% endif %}\n"
    assert portable_template(ChatTemplate(source, {"eos_token": "</s>"}, origin="x")) == source[:-1]


def test_values_are_written_out_whatever_is_in_them():
    tokens = {"bos_token": '<"b\\n">', "eos_token": "<｜end▁of｜>", "turn_end": "x"}
    source = "\n{% for m in messages %}\n{{ bos_token }}{{ m['content'] }}{{ eos_token }}{% endfor %}\n"
    template = ChatTemplate(source, tokens, origin="x")
    written = portable_template(template)
    assert ChatTemplate(written, {}, origin="y").text(TALK) == template.text(TALK)
    assert "turn_end" not in written and "add_generation_prompt" in written


def test_what_would_change_is_refused(monkeypatch):
    monkeypatch.setattr(chat_export, "_literal", lambda value: "'other'")
    source = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    with pytest.raises(InputError, match="cannot be exported"):
        portable_template(ChatTemplate(source, {"eos_token": "</s>"}, origin="x"))
