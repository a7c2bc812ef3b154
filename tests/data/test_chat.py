"""Chat templates: what they say, where contents stand, what is trained, and what is refused."""

import functools
import json

import numpy as np
import pytest
import tokenizers

from fusejax.data.chat import ChatTemplate, template_of
from fusejax.data.chat_templates import NAMED_TEMPLATES
from fusejax.data.corpus import Document
from fusejax.data.encoding import DocumentEncoder
from fusejax.data.spans import character_spans, conversation
from fusejax.errors import InputError
from fusejax.io.tokenizers import load_tokenizer
from tests.paths import DATA, needs_data

TALK = [
    ("user", "What's 2+2?  日本語 é"),
    ("assistant", "It's 4. 日本語 😀 ok"),
    ("user", "and then?"),
    ("assistant", "Seven!\n\n  def f():\n    return 1"),
]
NAMES = {"bos_token": "<s>", "eos_token": "</s>", "turn_end": "</s>"}
# Written by hand from the published format of each family.
SAID = {
    "openchat_3.5": "GPT4 Correct User: Q</s>GPT4 Correct Assistant: A</s>",
    "vicuna": "<s>USER: Q ASSISTANT: A</s>",
    "llama-2": "<s>[INST] Q [/INST] A </s>",
    "llama-3": "<s><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>",
    "mistral": "<s>[INST] Q [/INST] A</s>",
    "gemma": "<s><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n",
    "chatml": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "internlm2": "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n",
    "phi-3": "<s><|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n",
    "zephyr": "<|user|>\nQ</s>\n<|assistant|>\nA</s>\n",
}


@functools.cache
def _tokenizer(name: str):
    return load_tokenizer(DATA / "tokenizers" / name)


@functools.cache
def _raw(name: str):
    return tokenizers.Tokenizer.from_file(str(DATA / "tokenizers" / name / "tokenizer.json"))


def _encode(tokenizer, messages, template: str):
    text, turns, spans = conversation(messages)
    document = Document("d", text, spans=spans, turns=turns)
    return DocumentEncoder(tokenizer, template_of(tokenizer, template)).encode(document)


@pytest.mark.parametrize("name", sorted(NAMED_TEMPLATES))
def test_named_templates_say_what_their_families_publish(name):
    template = ChatTemplate(NAMED_TEMPLATES[name], NAMES, origin=name)
    found = template.render([("user", "Q"), ("assistant", "A")])
    expected = SAID.get(name, SAID["chatml"])
    assert found.text == ("<s>" + expected if name == "openchat_3.5" else expected)
    assert [found.text[a:b] for a, b in found.contents] == ["Q", "A"]
    assert [found.text[a:b] for a, b in found.spans] == ["A"]


def test_a_system_message_of_llama_2_goes_into_the_first_turn():
    found = ChatTemplate(NAMED_TEMPLATES["llama-2"], NAMES, origin="x").render([("system", "S"), *TALK])
    assert found.text.startswith("<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nWhat's 2+2?")
    assert found.text.count("<<SYS>>") == 1 and found.text.count("<s>") == 2


def test_generation_marks_choose_the_turns_that_are_trained():
    source = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}{% generation %}{{ m['content'] }}"
        "{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}|{% endif %}{% endfor %}"
    )
    found = ChatTemplate(source, NAMES, origin="x").render(TALK)
    assert [found.text[a:b] for a, b in found.spans] == [TALK[3][1]]
    assert found.text.endswith("return 1</s>") and "\ue0d2" not in found.text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{% for m in messages %}{{ m['content'] | upper }}{% endfor %}", "changes what the messages say"),
        ("{% for m in messages %}{{ m['content'].split('4')[0] }}{% endfor %}", "changes what the messages say"),
        ("{% for m in messages %}{{ m['content'] * 2 }}{% endfor %}", "of texts is not allowed"),
        ("{% for m in messages %}{{ m['content'] }}{{ m['content'] }}{% endfor %}", "2\\] times"),
        ("{{ messages[0]['content'] }}", r"\[0\] times"),
        ("{{ raise_exception('no such role') }}", "cannot render the roles .*no such role"),
        ("{{ messages.__class__.__mro__ }}", "unsafe|access"),
        ("{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}", "steps"),
        ("{% for i in range(9000) %}{{ 'x' ~ messages[0]['content'] }}{% endfor %}", "says more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render"),
        ("{{ 9 ** 9 ** 9 }}", "not allowed"),
        ("{{ '%0999999999d' % 1 }}", "not allowed"),
    ],
)
def test_a_template_that_cannot_be_followed_is_refused(source, said):
    with pytest.raises(InputError, match=said):
        ChatTemplate(source, NAMES, origin="x").render(TALK, where="document 'd'")


def test_a_template_that_is_no_jinja_or_too_long_is_refused():
    with pytest.raises(InputError, match="not a jinja template"):
        ChatTemplate("{% for %}", NAMES, origin="x")
    with pytest.raises(InputError, match="characters"):
        ChatTemplate("x" * (1 << 19), NAMES, origin="x")


def test_contents_that_repeat_each_other_are_told_apart():
    talk = [("user", "yes"), ("assistant", "yes"), ("user", "yes yes"), ("assistant", "yes")]
    found = ChatTemplate(NAMED_TEMPLATES["vicuna"], NAMES, origin="x").render(talk)
    assert [start for start, _ in found.spans] == [found.text.index("T: yes") + 3, found.text.rindex("yes")]


PAIRS = [
    (name, template)
    for name, templates in {
        "llama2": ("openchat_3.5", "vicuna", "llama-2", "mistral", "zephyr"),
        "llama3": ("llama-3",),
        "mistral-v3": ("mistral", "openchat_3.5"),
        "qwen2": ("chatml", "openchat_3.5"),
        "gpt2": ("openchat_3.5", "vicuna"),
        "unigram-cc-all-32000": ("openchat_3.5", "zephyr", "llama-2"),
        "c4-spm-bpe-32k": ("vicuna",),
    }.items()
    for template in templates
]


@needs_data
@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_ids_are_those_of_the_whole_text_and_labels_are_the_contents(name, template):
    tokenizer = _tokenizer(name)
    encoded = _encode(tokenizer, TALK, template)
    rendered = template_of(tokenizer, template).render(TALK)
    expected = _raw(name).encode(rendered.text, add_special_tokens=False).ids
    assert [*encoded.tokens, encoded.labels[-1]] == expected
    assert encoded.n_bytes == sum(len(c.encode()) for r, c in TALK if r == "assistant") == encoded.byte_ends[-1]
    assert encoded.spans is not None
    assert (np.diff(encoded.byte_ends) >= 0).all()
    for number, content in enumerate((TALK[1][1], TALK[3][1])):
        labels = encoded.labels[encoded.spans == number]
        assert tokenizer.token_bytes[labels[-1]] is None, "the stop token is trained"
        said = b"".join(tokenizer.token_bytes[i] or b"" for i in labels[:-1])
        if encoded.exact:
            assert said.strip(b" ") == content.encode()


@needs_data
@pytest.mark.parametrize(("name", "template"), PAIRS)
def test_the_prompt_of_a_conversation_is_what_stands_before_the_first_answer(name, template):
    tokenizer = _tokenizer(name)
    text, turns, spans = conversation(TALK)
    (encoded,) = DocumentEncoder(tokenizer, template_of(tokenizer, template)).encode_prompts(
        [Document("d", text, spans=spans, turns=turns)]
    )
    assert encoded is not None and encoded.spans is not None
    assert encoded.n_bytes == len(TALK[0][1].encode())
    said = b"".join(tokenizer.token_bytes[i] or b"" for i in encoded.labels[encoded.spans >= 0])
    assert all(
        tokenizer.token_bytes[i] is not None or i == tokenizer.unk_id for i in encoded.labels[encoded.spans >= 0]
    )
    if encoded.exact:
        assert said.strip() == TALK[0][1].encode()


@needs_data
def test_what_has_no_prompt():
    encoder = DocumentEncoder(_tokenizer("qwen2"), template_of(_tokenizer("qwen2"), "chatml"))
    text, turns, spans = conversation([("assistant", "Hello!"), ("user", "hi"), ("assistant", "bye")])
    documents = [
        Document("0", text, spans=spans, turns=turns),
        Document("1", "plain text"),
        Document("2", "from the start", spans=((0, 4),)),
        Document("3", "What? This.", spans=((6, 11),)),
    ]
    found = encoder.encode_prompts(documents)
    assert found[:3] == [None] * 3
    assert found[3] is not None and found[3].n_bytes == 6 and (found[3].spans >= 0).sum() >= 1


@needs_data
def test_special_tokens_inside_a_message_are_plain_text():
    tokenizer = _tokenizer("qwen2")
    talk = [("user", "say <|im_end|>"), ("assistant", "fine: <|im_end|><|im_start|>system")]
    encoded = _encode(tokenizer, talk, "chatml")
    end = tokenizer.special_tokens["<|im_end|>"]
    assert encoded.spans is not None
    assert np.count_nonzero(encoded.labels == end) == 2
    labels = encoded.labels[encoded.spans >= 0]
    assert labels[-1] == end
    assert b"".join(tokenizer.token_bytes[i] or b"?" for i in labels[:-1]).decode() == talk[1][1]


@needs_data
def test_a_turn_that_nothing_closes_is_refused_and_a_missing_template_too():
    tokenizer = _tokenizer("gpt2")
    with pytest.raises(InputError, match="no special token closes"):
        _encode(tokenizer, TALK, "chatml")
    with pytest.raises(InputError, match="has no chat template; give `chat_template`"):
        template_of(tokenizer)
    with pytest.raises(InputError, match="Did you mean 'vicuna'"):
        template_of(tokenizer, "vicunna")
    with pytest.raises(InputError, match="is a conversation"):
        DocumentEncoder(tokenizer).encode(Document("d", "x", spans=((0, 1),), turns=conversation(TALK)[1]))


@needs_data
def test_a_template_is_found_beside_the_tokenizer(tmp_path):
    tokenizer = _tokenizer("tinystories-spm-2048")
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": NAMED_TEMPLATES["zephyr"]}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named}))
    assert template_of(load_tokenizer(tmp_path)).render(TALK).text.startswith("<|user|>")
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}#{{ m.content }}{% endfor %}")
    assert template_of(load_tokenizer(tmp_path)).render(TALK).text.startswith("#What")


@needs_data
@pytest.mark.parametrize("name", ["llama2", "qwen2", "gpt2", "unigram-cc-all-32000"])
def test_spans_of_a_text_train_what_lies_in_them(name):
    tokenizer = _tokenizer(name)
    text = "Question: why 日本? Answer: because 世界 is round. End of it."
    first = (text.index("because"), text.index(" is"))
    spans = character_spans(text, [list(first), [text.index("End"), len(text)]], "d")
    assert [text.encode()[a:b].decode() for a, b in spans] == ["because 世界", "End of it."]
    encoded = DocumentEncoder(tokenizer).encode(Document("d", text, spans=spans))
    assert encoded.spans is not None and encoded.n_bytes == len("because 世界End of it.".encode())
    said = [b"".join(tokenizer.token_bytes[i] or b"" for i in encoded.labels[encoded.spans == n]) for n in (0, 1)]
    if encoded.exact:
        assert [part.decode().strip() for part in said] == ["because 世界", "End of it."]
    assert encoded.spans[-1] == 1 and encoded.labels[-1] == tokenizer.eos_id, "the end is trained with the last bytes"
    plain = tokenizer.encode(text)
    np.testing.assert_array_equal(plain.tokens, encoded.tokens)


@pytest.mark.parametrize(
    ("ranges", "said"),
    [
        ("0-3", "expected a list"),
        ([[0]], "expected \\[start, end\\]"),
        ([[0, "3"]], "expected \\[start, end\\]"),
        ([[2, 2]], "need 0 <= start < end"),
        ([[0, 9]], "text of 5 characters"),
        ([[2, 4], [1, 2]], "begins before"),
    ],
)
def test_spans_that_cannot_be_are_refused(ranges, said):
    with pytest.raises(InputError, match=said):
        character_spans("hello", ranges, "row 3")
    assert character_spans("hello", [{"start": 0, "end": 2}, [2, 4]], "row") == ((0, 4),)
