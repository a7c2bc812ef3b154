"""Tokenizers: ids with byte ends, for every family of tokenizer and every kind of text."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusejax.errors import InputError
from fusejax.io.tokenizers import check_vocabulary, load_tokenizer
from tests.alignment.tiny_tokenizers import LOSSLESS, LOSSY, TEXT, tiny_directory, tiny_tokenizer
from tests.paths import DATA, needs_data

ODD = (
    "",
    " ",
    "Hello",
    " leading",
    "  a  b\n",
    "trailing   \n ",
    "\x00a\x00",
    "👩‍👩‍👧 ok 👍🏽",
    "日本語テキスト",
    "שלום עולם",
    " " * 50 + "x" + " " * 33,
    "x" * 700,
    "A\u0301 cafe\u0301 ﬁne",
    "▁literal ▁▁",
    "</s> hi <s> <unk> <|endoftext|> [SEP] <0x0A>",
    TEXT,
)
REAL = sorted(path.name for path in (DATA / "tokenizers").glob("*")) or ["none"]
# Words, blanks, marks that NFC moves, wide characters, and anything else that is Unicode text.
texts = st.lists(
    st.one_of(
        st.sampled_from(
            ["the", " history", "  ", "\n", "▁", "\u0301", "é", "日本", "😀", "\x00", "</s>", "שלום", "<0xE2>"]
        ),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
    ),
    max_size=12,
).map("".join)


def check_document(tokenizer, text):
    """What every encoding promises; for an exact one also that the tokens between two ends are those bytes."""
    document, raw = tokenizer.encode(text), text.encode()
    ends = document.byte_ends
    assert document.n_bytes == len(raw)
    assert len(document.tokens) == len(document.labels) == len(ends)
    assert (document.tokens[1:] == document.labels[:-1]).all()
    assert (np.diff(ends) >= 0).all()
    assert not ends.size or (ends[0] >= 0 and ends[-1] == len(raw))
    if document.exact:
        skip = int(tokenizer.start_id is not None)
        start = 0
        for index, end in zip(document.tokens[skip:], ends[skip:], strict=True):
            surface = tokenizer.token_bytes[index]
            # Only the first token may begin with a dummy space, which covers no byte.
            assert raw[start:end] == surface or (start == 0 and b" " + raw[:end] == surface)
            start = int(end)
    return document


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_byte_ends_of_any_text(name, text):
    check_document(tiny_tokenizer(name), text)


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY])
@pytest.mark.parametrize("text", ODD)
def test_byte_ends_of_odd_texts(name, text):
    check_document(tiny_tokenizer(name), text)


@pytest.mark.parametrize("name", ["byte_level", "spm_bpe", "metaspace_unigram"])
@settings(max_examples=60, deadline=None)
@given(text=texts)
def test_lossless_tokenizers_are_exact(name, text):
    if "▁" not in text and "<0x" not in text:
        assert tiny_tokenizer(name).encode(text).exact


def test_byte_fallback_and_partial_utf8_advance_byte_by_byte():
    document = tiny_tokenizer("spm_bpe").encode("日x")
    assert document.byte_ends.tolist() == [0, 0, 1, 2, 3, 4]  # bos, the dummy space, three bytes, x
    byte_level = tiny_tokenizer("byte_level").encode("\u4e30")  # not in the training text
    assert byte_level.byte_ends[-1] == 3 and len(byte_level.byte_ends) > 2


def test_changed_text_is_flagged_and_uses_offsets():
    tokenizer = tiny_tokenizer("lowercase")
    assert tokenizer.encode("the castle").exact
    document = tokenizer.encode("THE Castle  ")
    assert not document.exact
    words = tokenizer.decode(document.tokens)
    assert words == "the castle"
    assert document.byte_ends[-1] == 12


def test_normalised_character_closes_with_its_last_token():
    tokenizer = tiny_tokenizer("byte_level_nfc")
    document = tokenizer.encode("a\u0301b", start=False, end=False)  # NFC: one character of two bytes, from three
    assert not document.exact
    assert document.byte_ends.tolist() == [0, 3, 3]  # the dummy space, then two halves of one character


def test_special_tokens_in_text_are_text():
    for name in ("spm_bpe", "byte_level", "metaspace_unigram", "unigram_no_bytes"):
        tokenizer = tiny_tokenizer(name)
        special = {index for index in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) if index is not None}
        document = tokenizer.encode("a </s> <s> <pad> <|endoftext|>", start=False, end=False)
        assert not special & set(document.tokens.tolist()), name


def test_document_convention():
    tokenizer = tiny_tokenizer("spm_bpe")
    document = tokenizer.encode("the")
    assert document.tokens[0] == tokenizer.bos_id == 1 and document.labels[-1] == tokenizer.eos_id == 2
    assert document.byte_ends[0] == 0
    empty = tokenizer.encode("")
    assert empty.tokens.tolist() == [1] and empty.labels.tolist() == [2] and empty.byte_ends.tolist() == [0]
    gpt = tiny_tokenizer("byte_level")
    assert gpt.bos_id is None and gpt.encode("the").tokens[0] == gpt.start_id == gpt.eos_id
    bare = gpt.encode("the", start=False, end=False)
    assert len(bare.tokens) == len(gpt.encode("the").tokens) - 2


def test_batch_equals_one_by_one():
    tokenizer = tiny_tokenizer("spm_bpe")
    for text, document in zip(ODD, tokenizer.encode_batch(ODD), strict=True):
        alone = tokenizer.encode(text)
        np.testing.assert_array_equal(document.byte_ends, alone.byte_ends)
        np.testing.assert_array_equal(document.tokens, alone.tokens)


@pytest.mark.parametrize("name", ["byte_level", "spm_bpe", "metaspace_unigram", "byte_level_nfc"])
@settings(max_examples=80, deadline=None)
@given(fragment=st.one_of(st.binary(max_size=12), texts.map(str.encode)))
def test_continuation_gives_back_the_bytes(name, fragment):
    tokenizer = tiny_tokenizer(name)
    if b"\xe2\x96\x81" in fragment or b"<0x" in fragment:
        return  # a literal ▁ is a blank to sentencepiece, by construction
    [ids] = tokenizer.encode_continuation([fragment])
    assert b"".join(tokenizer.token_bytes[index] or b"" for index in ids) == fragment


def test_continuation_has_no_dummy_space():
    for name in ("spm_bpe", "metaspace_unigram", "byte_level_nfc"):
        tokenizer = tiny_tokenizer(name)
        for ids, expected in zip(tokenizer.encode_continuation([b"the", b" the"]), (b"the", b" the"), strict=True):
            assert b"".join(tokenizer.token_bytes[i] for i in ids) == expected


def test_decode_and_save_roundtrip(tmp_path):
    tokenizer = tiny_tokenizer("spm_bpe")
    assert tokenizer.decode(tokenizer.encode(TEXT).tokens) == TEXT
    tokenizer.save(tmp_path / "copy")
    again = load_tokenizer(tmp_path / "copy")
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special_roles == tokenizer.special_roles
    assert again.encode(TEXT).tokens.tolist() == tokenizer.encode(TEXT).tokens.tolist()


def test_fingerprint_ignores_layout_and_sees_content(tmp_path):
    spec = json.loads((tiny_directory("spm_bpe") / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(reversed(spec.items())), indent=3))
    assert load_tokenizer(tmp_path).fingerprint == tiny_tokenizer("spm_bpe").fingerprint
    spec["normalizer"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(tmp_path).fingerprint != tiny_tokenizer("spm_bpe").fingerprint


def test_special_tokens_declared_only_in_the_config(tmp_path):
    shutil.copyfile(tiny_directory("spm_bpe") / "tokenizer.json", tmp_path / "tokenizer.json")
    size = tiny_tokenizer("spm_bpe").vocab_size
    config = {"eos_token": "<end>", "added_tokens_decoder": {str(size): {"content": "<end>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == size and tokenizer.vocab_size == size + 1 and tokenizer.token_bytes[size] is None
    assert tokenizer.encode("the").labels[-1] == size


def test_check_vocabulary():
    tokenizer = tiny_tokenizer("spm_bpe")
    assert check_vocabulary(tokenizer, tokenizer.vocab_size + 24, "target") == 24
    with pytest.raises(InputError, match=r"target.*rows"):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1, "target")


def test_bad_input_names_the_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(InputError, match=r"no tokenizer\.json"):
        load_tokenizer(tmp_path)
    broken = tmp_path / "tokenizer.json"
    broken.write_text((tiny_directory("spm_bpe") / "tokenizer.json").read_text()[:1000])
    with pytest.raises(InputError, match=r"tokenizer\.json.*JSON"):
        load_tokenizer(tmp_path)
    broken.write_text("[1]")
    with pytest.raises(InputError, match="expected a JSON object"):
        load_tokenizer(tmp_path)
    broken.write_text('{"version": "1.0"}')
    with pytest.raises(InputError, match="no model vocabulary"):
        load_tokenizer(tmp_path)
    broken.write_text('{"model": {"type": "Nonsense", "vocab": {"a": 0}}}')
    with pytest.raises(InputError, match="is not a tokenizer"):
        load_tokenizer(tmp_path)
    broken.write_text('{"model": {"type": "Unigram", "vocab": [1, 2]}}')
    with pytest.raises(InputError, match="layout of a fast tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match=r"text 1 .* surrogate at character 2"):
        tiny_tokenizer("spm_bpe").encode_batch(["fine", "ab\ud800"])


def test_a_slow_tokenizer_that_cannot_be_converted_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not a sentencepiece model")
    with pytest.raises(InputError, match="cannot be converted"):
        load_tokenizer(tmp_path)


@needs_data
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(name, tmp_path):
    tokenizer = load_tokenizer(DATA / "tokenizers" / name)
    for text in ODD:
        document = check_document(tokenizer, text)
        if name.startswith(("gpt2", "llama", "mistral", "tinystories", "c4")) and "▁" not in text:
            assert document.exact, text
    lossless = name not in ("bert-uncased", "unigram-cc-all-32000")
    fragments = [b"\xe2\x80", b" \xf0\x9f\x98", b"the castle", b"\x80\xbf!", b"  x", "日本語".encode()]
    for fragment, ids in zip(fragments, tokenizer.encode_continuation(fragments), strict=True):
        if lossless:
            assert b"".join(tokenizer.token_bytes[i] or b"" for i in ids) == fragment


@needs_data
def test_ids_are_the_librarys(tmp_path):
    from tokenizers import Tokenizer as Library

    for name in ("llama2", "gpt2", "gpt-neox-20b", "unigram-cc-all-32000"):
        shutil.copyfile(DATA / "tokenizers" / name / "tokenizer.json", tmp_path / "tokenizer.json")
        expected = Library.from_file(str(tmp_path / "tokenizer.json")).encode(TEXT, add_special_tokens=False).ids
        assert load_tokenizer(tmp_path).encode(TEXT, start=False, end=False).tokens.tolist() == expected[:-1]
