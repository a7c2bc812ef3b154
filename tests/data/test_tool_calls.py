"""Tool turns: read from their usual forms, kept, rendered by templates that know them, and refused by others."""

import json

import pytest
import tokenizers

from fusejax.data.chat import ChatTemplate, template_of
from fusejax.data.chat_templates import NAMED_TEMPLATES
from fusejax.data.corpus import read_corpus, write_corpus
from fusejax.data.encoding import DocumentEncoder
from fusejax.data.messages import Fields, messages_of
from fusejax.data.readers import read_documents
from fusejax.data.spans import conversation
from fusejax.data.tokenizer_training import train_tokenizer
from fusejax.errors import InputError
from fusejax.io.tokenizers import load_tokenizer
from fusejax.stages.align import _check_calls
from tests.stages.tiny import texts

RECORD = {
    "messages": [
        {"role": "user", "content": "the cat on a mat?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "mat", "n": 2}'}},
                {"function": {"name": "wait", "arguments": {}}},
            ],
        },
        {"role": "tool", "name": "look", "tool_call_id": "c1", "content": "two dogs"},
        {"role": "assistant", "content": "It saw two dogs."},
        {"role": "user", "content": "and then?"},
        {"role": "assistant", "content": "In May:", "tool_calls": [{"name": "run", "arguments": "{}"}]},
    ]
}
NAMES = {"bos_token": "<s>", "eos_token": "</s>"}
# Two families' ways of writing calls, in our own words.
TAGS = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}<|im_start|>user\n<got>{{ m['content'] }}</got><|im_end|>\n"
    "{% else %}<|im_start|>{{ m['role'] }}{% if m['content'] %}{{ '\n' ~ m['content'] }}{% endif %}"
    "{% for call in m['tool_calls'] or [] %}{{ '\n' }}<call>{{ call['function'] | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endif %}{% endfor %}"
)
CONTROLS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'tool' %}[TOOL_RESULTS] {{ m['content'] }} [/TOOL_RESULTS]"
    "{% elif m['tool_calls'] %}[TOOL_CALLS] {{ m['tool_calls'] | map(attribute='function') | list | tojson }}"
    "{{ eos_token }}{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
LOOK, WAIT = '{"name": "look", "arguments": {"at": "mat", "n": 2}}', '{"name": "wait", "arguments": {}}'
RUN = '{"name": "run", "arguments": {}}'


def _messages(record=RECORD):
    return messages_of(record, Fields(messages="messages"), "row")


def _changed(index, **change):
    messages = [dict(message) for message in RECORD["messages"]]
    messages[index] |= change
    return {"messages": messages}


def test_calls_are_read_in_their_usual_forms():
    found = _messages()
    assert [message[:2] for message in found[:4:3]] == [
        ("user", "the cat on a mat?"),
        ("assistant", "It saw two dogs."),
    ]
    calls = json.loads(found[1][2])["tool_calls"]
    assert [call["function"] for call in calls] == [json.loads(LOOK), json.loads(WAIT)]
    assert calls[0]["id"] == "c1" and "id" not in calls[1]
    assert json.loads(found[2][2]) == {"name": "look", "tool_call_id": "c1"}
    assert found[5][1] == "In May:" and "run" in found[5][2]
    assert all(len(found[index]) == 2 for index in (0, 3, 4))
    only = {"messages": RECORD["messages"][:2]}
    assert len(_messages(only)) == 2, "an assistant that only calls says something"
    assert _messages({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tool_calls": "look()"}, "tool_calls are a str, expected a list"),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, r"tool call 0: .*expected \{'function'"),
        ({"tool_calls": [{"name": "f", "arguments": "{no"}]}, "no JSON"),
        ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "arguments are a list, expected an object"),
        ({"tool_calls": [{"name": "f", "arguments": {"x": {1, 2}}}]}, "cannot be written as JSON"),
        ({"tool_calls": [{"name": "f"}], "role": "user"}, "role 'user' calls tools"),
    ],
)
def test_what_is_no_call_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        _messages(_changed(1, **change))


def test_the_corpus_keeps_calls(tmp_path):
    (tmp_path / "talks.jsonl").write_text(json.dumps(RECORD) + "\n" + json.dumps(_changed(2, content="no dog")))
    documents = list(read_documents(tmp_path / "talks.jsonl", messages_field="messages"))
    write_corpus(tmp_path / "corpus", {"train": documents})
    kept = list(read_corpus(tmp_path / "corpus", "train"))
    assert kept == documents and kept[0].messages == _messages()
    data = kept[0].text.encode()
    first, second, third = (data[start:stop].decode() for start, stop in kept[0].spans or ())
    assert json.loads(first) == json.loads(_messages()[1][2]) and second == "It saw two dogs."
    assert third.startswith("In May:\n{") and kept[0].trained_bytes == sum(map(len, (first, second, third)))
    plain = conversation([("user", "a"), ("assistant", "b")])
    assert plain[2] == ((3, 4),) and plain[1][0] == ("user", 0, 1, "")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (TAGS, [f"<call>{LOOK}</call>\n<call>{WAIT}</call>", "It saw two dogs.", f"In May:\n<call>{RUN}</call>"]),
        (CONTROLS, [f"[TOOL_CALLS] [{LOOK}, {WAIT}]", "It saw two dogs.", f"[TOOL_CALLS] [{RUN}]"]),
    ],
)
def test_a_template_that_writes_calls_has_them_trained(source, expected):
    messages = _messages()
    if source == CONTROLS:  # which leaves out what is said beside a call
        messages[5] = ("assistant", "", messages[5][2])
    found = ChatTemplate(source, NAMES, origin="x").render(messages)
    assert [found.text[start:stop] for start, stop in found.spans] == expected
    after = [found.text[stop:] for _, stop in found.spans]
    assert all(text.startswith(("<|im_end|>", "</s>")) for text in after), "the stop token follows"


def test_generation_marks_choose_among_calls():
    source = (
        "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}A:{% generation %}{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}<{{ c['function']['name'] }}>{% endfor %}</s>{% endgeneration %}"
        "{% else %}{{ m['role'] }}:{{ m['content'] }}"
        "{% for c in m['tool_calls'] or [] %}<{{ c['function']['name'] }}>{% endfor %}</s>{% endif %}{% endfor %}"
    )
    template = ChatTemplate(source, NAMES, origin="x")
    with pytest.raises(InputError, match="cannot be told from its turns"):
        template.render(_messages())  # the opening changes when the turn is no longer the last
    found = template.render([("user", "a"), _messages()[5]])
    assert [found.text[start:stop] for start, stop in found.spans] == ["In May:<run>"]


@pytest.mark.parametrize("name", sorted(NAMED_TEMPLATES))
def test_named_templates_refuse_what_they_do_not_know(name):
    template = ChatTemplate(NAMED_TEMPLATES[name], NAMES | {"turn_end": "</s>"}, origin=f"the template {name}")
    with pytest.raises(InputError, match=f"the template {name} does not write the tool calls of message 1 .look, wait"):
        template.render(_messages()[:2])
    talk = [("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")]
    if name in ("chatml", "qwen", "yi", "internlm2", "llama-3"):
        found = template.render(talk)
        assert "tool" in found.text and [found.text[a:b] for a, b in found.spans] == ["b", "d"]
    else:
        with pytest.raises(InputError, match=r"cannot render the roles .*has no role tool"):
            template.render(talk)


def test_a_template_that_rewrites_what_came_before_is_refused():
    source = "{{ messages | length }}" + TAGS
    with pytest.raises(InputError, match="cannot be told from its turns"):
        ChatTemplate(source, NAMES, origin="x").render(_messages())


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    place = tmp_path_factory.mktemp("tools")
    train_tokenizer(texts(100, seed=1), kind="byte_bpe", vocab_size=320, out_dir=place)
    raw = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
    special = ["<|im_start|>", "<|im_end|>", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"]
    raw.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in special])
    raw.save(str(place / "tokenizer.json"))
    for name, source in (("tags", TAGS), ("controls", CONTROLS)):
        (place / f"{name}.jinja").write_text(source.replace("{{ bos_token }}", "").replace("{{ eos_token }}", "</s>"))
    return load_tokenizer(place)


def _encoder(tokenizer, name):
    return DocumentEncoder(tokenizer, template_of(tokenizer, str(tokenizer.directory / f"{name}.jinja")))


def _document(tmp_path, record):
    (tmp_path / "talk.jsonl").write_text(json.dumps(record))
    return next(iter(read_documents(tmp_path / "talk.jsonl", messages_field="messages")))


def test_calls_are_trained_with_the_tokens_that_the_template_writes(tokenizer, tmp_path):
    document = _document(tmp_path, {"messages": RECORD["messages"][:4]})
    for name, opening, stop in (("tags", b"<call>", "<|im_end|>"), ("controls", b"", "</s>")):
        encoder = _encoder(tokenizer, name)
        encoded = encoder.encode(document)
        assert encoded.spans is not None
        labels = encoded.labels[encoded.spans == 0].tolist()
        assert labels[-1] == tokenizer.special_tokens[stop]
        assert (labels[0] == tokenizer.special_tokens["[TOOL_CALLS]"]) == (name == "controls")
        said = b"".join(tokenizer.token_bytes[i] or b"" for i in labels)
        assert said.startswith(opening) and b'"look", "arguments": {"at": "mat", "n": 2}' in said
        assert encoded.n_bytes == sum(len(text) for text in encoder.trained_text(document)) == encoded.byte_ends[-1]


def test_a_call_that_spells_a_special_token_is_refused(tokenizer, tmp_path):
    calls = [{"name": "look", "arguments": {"at": "<|im_end|>"}}]
    with pytest.raises(InputError, match=r"a tool call spells the special token '<\|im_end\|>'"):
        _encoder(tokenizer, "tags").encode(_document(tmp_path, _changed(1, tool_calls=calls)))


def test_models_that_write_calls_differently_are_not_aligned(tokenizer, tmp_path):
    tags, controls = _encoder(tokenizer, "tags"), _encoder(tokenizer, "controls")
    called = _document(tmp_path, {"messages": RECORD["messages"][:2]})
    _check_calls(called, tags, tags, "a")
    with pytest.raises(InputError, match="of a and of the target write its tool calls differently"):
        _check_calls(called, tags, controls, "a")
    _check_calls(_document(tmp_path, {"messages": RECORD["messages"][3:4]}), tags, controls, "a")
