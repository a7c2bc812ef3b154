"""Which tokens of a conversation are trained: every named template by hand, and FuseChat's own masks (golden files)."""

import functools
import gzip
import json
import shutil

import numpy as np
import pytest

from fusejax.data.chat import template_of
from fusejax.data.chat_templates import NAMED_TEMPLATES
from fusejax.data.corpus import Document
from fusejax.data.encoding import DocumentEncoder
from fusejax.data.spans import conversation
from fusejax.data.tokenizer_training import train_tokenizer
from fusejax.io.tokenizers import load_tokenizer
from tests.data.special_tokens import add_special_tokens
from tests.paths import DATA, GOLDEN, needs_data, needs_golden
from tests.stages.tiny import texts

# Two answers, the first of which repeats the question and spells a stop token.
TALK = [
    ("user", "Say it: é 4."),
    ("assistant", "Say it: é 4.\n</s> is text"),
    ("user", "and then?"),
    ("assistant", "Seven!"),
]
# By hand: what a model of the family must learn to write, once for each answer, from the first byte of the answer on.
STOPS = {
    "openchat_3.5": "<|eot_id|>",  # the tokenizer's own end of a turn
    "vicuna": "<eos>",
    "llama-2": " <eos>",
    "llama-3": "<|eot_id|>",
    "mistral": "<eos>",
    "gemma": "<end_of_turn>",
    "chatml": "<|im_end|>",
    "qwen": "<|im_end|>",
    "yi": "<|im_end|>",
    "internlm2": "<|im_end|>",
    "phi-3": "<|end|>",
    "zephyr": "<eos>",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("masks")


@functools.cache
def _directory(place, kind):
    directory = place / kind
    train_tokenizer(texts(100, seed=1), kind=kind, vocab_size=400, out_dir=directory)
    add_special_tokens(directory)
    return directory


def _trained(tokenizer, encoded, number):
    """The text of the tokens that are trained for one answer, special tokens by name."""
    names = {index: name.encode() for name, index in tokenizer.special_tokens.items()}
    labels = encoded.labels[encoded.spans == number].tolist()
    return b"".join(names.get(index) or tokenizer.token_bytes[index] for index in labels).decode()


def _encode(directory, name, talk):
    tokenizer = load_tokenizer(directory)
    text, turns, spans = conversation(talk)
    document = Document("d", text, spans=spans, turns=turns)
    return tokenizer, DocumentEncoder(tokenizer, template_of(tokenizer, name)).encode(document)


def test_every_named_template_has_a_row_here():
    assert STOPS.keys() == NAMED_TEMPLATES.keys()


@pytest.mark.parametrize("kind", ["byte_bpe", "spm_bpe"])
@pytest.mark.parametrize("name", sorted(STOPS))
def test_the_answers_and_what_closes_them_are_trained_and_nothing_else(place, name, kind):
    tokenizer, encoded = _encode(_directory(place, kind), name, TALK)
    answers = [_trained(tokenizer, encoded, number) for number in (0, 1)]
    stop = STOPS[name].replace("<eos>", {"byte_bpe": "<|endoftext|>", "spm_bpe": "</s>"}[kind])
    # A token that also covers the space before an answer is trained with it.
    assert [said.removeprefix(" ") for said in answers] == [TALK[1][1] + stop, TALK[3][1] + stop]
    assert set(encoded.spans.tolist()) == {-1, 0, 1}


# FuseChat's own masks of conversations, with its separator in the place of the tokenizer's eos. It takes a bos off
# every turn, which GPT-2's tokenizer does not write: there its mask of an answer stands as many tokens to the left as
# turns have ended before, so that the colon before an answer is trained and its end is not. Ours is where Mistral's is.
GOLDEN_TALKS = [("mistral-v1", "<|end_of_turn|>", "E", "base", 0), ("gpt2", "<|endoftext|>", "G", "src", 1)]


@needs_data
@needs_golden
@pytest.mark.parametrize(("name", "stop", "pair", "side", "late"), GOLDEN_TALKS, ids=["mistral", "gpt2"])
def test_fusechat_s_masks(tmp_path, name, stop, pair, side, late):
    directory = tmp_path / name
    shutil.copytree(DATA / "tokenizers" / name, directory)
    add_special_tokens(directory, [stop])
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": stop}))
    with gzip.open(GOLDEN / "alignment" / f"fusechat_align_{pair}.json.gz", "rt") as file:
        samples = [sample for sample in json.load(file)["samples"] if "messages" in sample]
    assert len(samples) >= 2
    for sample in samples:
        talk = [({"human": "user", "gpt": "assistant"}[role], said) for role, said in sample["messages"]]
        _, encoded = _encode(directory, "openchat_3.5", talk)
        n, first = len(encoded.labels), 1 - late  # ours begin with bos in both cases
        assert encoded.labels.tolist() == sample[f"{side}_ids"][first : first + n]
        theirs = [at - first for at, label in enumerate(sample[f"{side}_labels"]) if label != -100]
        turns = 2 * np.cumsum(np.diff(theirs, prepend=theirs[0]) > 1) + 1
        assert np.flatnonzero(encoded.spans >= 0).tolist() == (np.array(theirs) + late * turns).tolist()
