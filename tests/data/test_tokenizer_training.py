"""Trained tokenizers are lossless, deterministic and the same in every library that reads them."""

import json
import struct
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fusejax.data.tokenizer_training import TOKENIZER_KINDS, _fields, _round_scores, train_tokenizer
from fusejax.errors import InputError

_SPM = ("unigram", "spm_bpe")
_TEXTS = [
    f"The {a} {b} is to the {c} as {n} is to {n * 7}.\n    def {a}_{b}(x):\n        return x['{c}'] ==== {n}\n" * 3
    for n, (a, b, c) in enumerate(
        (a, b, c)
        for a in ("quick", "loss", "token")
        for b in ("brown", "kernel", "batch", "naïve")
        for c in ("fox", "gradient", "matrix", "世界")
    )
]
_AWKWARD = [
    "",
    " ",
    "   leading and trailing   ",
    "a" * 500,
    " " * 301,
    "=" * 77 + "-" * 55 + "\n" * 9,
    "emoji 😀👩\u200d👩\u200d👧 and CJK 世界你好, \uff46\uff55\uff4c\uff4c",
    "tabs\t\t\r\n\x00\x7f\u00a0\u2028\ufeff",
    "<0x0A> <0xE4><0x> 0x0A <|pad|> </ s>",
    "0123456789 3.14159 1e-5",
    *_TEXTS[:3],
]
# Every character and fragment that the three kinds treat in a way of their own.
_FRAGMENTS = st.sampled_from(
    [
        "the ",
        " quick",
        "return",
        "  ",
        "    ",
        "\n",
        "\t",
        "==",
        "aaa",
        "1",
        "42",
        "é",
        "世",
        "😀",
        "<0x0A>",
        "<",
        "\x00",
    ]
)
_ANY_TEXT = st.one_of(
    st.lists(_FRAGMENTS, max_size=40).map("".join),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁"), max_size=60),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    infos = {k: train_tokenizer(_TEXTS, kind=k, vocab_size=420, out_dir=root / k) for k in TOKENIZER_KINDS}
    return root, infos, {k: Tokenizer.from_file(str(root / k / "tokenizer.json")) for k in TOKENIZER_KINDS}


@pytest.fixture(scope="module")
def processors(trained):
    root = trained[0]
    return {k: sentencepiece.SentencePieceProcessor(model_file=str(root / k / "tokenizer.model")) for k in _SPM}


def _ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@settings(max_examples=150, deadline=None)
@given(text=_ANY_TEXT)
def test_lossless(trained, kind, text):
    tokenizer = trained[2][kind]
    assert tokenizer.decode(_ids(tokenizer, text), skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", _SPM)
@settings(max_examples=150, deadline=None)
@given(text=_ANY_TEXT)
def test_same_ids_as_sentencepiece(trained, processors, kind, text):
    assert _ids(trained[2][kind], text) == processors[kind].encode(text)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_awkward_texts(trained, processors, kind):
    tokenizer = trained[2][kind]
    for text in _AWKWARD:
        ids = _ids(tokenizer, text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        if kind in _SPM:
            assert ids == processors[kind].encode(text)
            assert processors[kind].decode(ids) == text


def test_long_text_ties_fall_alike(trained, processors):
    """Float32 sums over a long text would break ties at random; rounded scores make them exact."""
    text = "".join(f"{' ' * (i % 23)}{'=' * (i % 17)} quick {'a' * (i % 13)}\n" for i in range(3000))
    for kind in _SPM:
        assert _ids(trained[2][kind], text) == processors[kind].encode(text)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_transformers_gives_the_same_ids(trained, kind):
    transformers = pytest.importorskip("transformers")
    root, _, tokenizers = trained
    auto = transformers.AutoTokenizer.from_pretrained(root / kind)
    assert len(auto) == tokenizers[kind].get_vocab_size()
    for text in _AWKWARD:
        assert auto.encode(text, add_special_tokens=False) == _ids(tokenizers[kind], text)
        assert auto.encode(text) == tokenizers[kind].encode(text).ids
        assert auto.decode(auto.encode(text, add_special_tokens=False)) == text
    special = (auto.unk_token_id, auto.bos_token_id, auto.eos_token_id)
    assert special == ((0, 0, 0) if kind == "byte_bpe" else (0, 1, 2))
    assert (auto.encode("x")[0] == 1) == (kind in _SPM)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_vocabulary_and_files(trained, kind):
    root, infos, tokenizers = trained
    assert 300 <= tokenizers[kind].get_vocab_size() <= 420
    assert infos[kind]["vocab_size"] == tokenizers[kind].get_vocab_size()
    assert infos[kind]["training_bytes"] == sum(len(t.encode()) for t in _TEXTS)
    expected = {"tokenizer.json", "tokenizer_config.json"} | ({"tokenizer.model"} if kind in _SPM else set())
    assert {p.name for p in (root / kind).iterdir()} == expected == set(infos[kind]["files"])
    assert not any(str(root).encode() in p.read_bytes() for p in (root / kind).iterdir())
    # It learned: far fewer tokens than bytes on its own text.
    assert len(_ids(tokenizers[kind], _TEXTS[0])) < 0.6 * len(_TEXTS[0].encode())


def test_digits_are_single_in_the_llama_kind(trained):
    assert [trained[2]["spm_bpe"].id_to_token(i) for i in _ids(trained[2]["spm_bpe"], "x1234")][-4:] == list("1234")


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_deterministic_across_processes(trained, kind, tmp_path):
    root, infos, _ = trained
    (tmp_path / "texts.json").write_text(json.dumps(_TEXTS))
    program = (
        "import json, pathlib, sys; from fusejax.data.tokenizer_training import train_tokenizer;"
        "texts = json.loads(pathlib.Path(sys.argv[1], 'texts.json').read_text());"
        "train_tokenizer(iter(texts), kind=sys.argv[2], vocab_size=420, out_dir=sys.argv[1] + '/out')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path), kind], check=True)
    for name in infos[kind]["files"]:
        assert (tmp_path / "out" / name).read_bytes() == (root / kind / name).read_bytes()


def test_training_is_silent(tmp_path, capfd):
    for kind in TOKENIZER_KINDS:
        train_tokenizer(_TEXTS[:20], kind=kind, vocab_size=350, out_dir=tmp_path)
    assert capfd.readouterr() == ("", "")


def test_another_kind_in_the_same_directory_leaves_no_model_behind(tmp_path):
    train_tokenizer(_TEXTS[:20], kind="spm_bpe", vocab_size=350, out_dir=tmp_path)
    train_tokenizer(_TEXTS[:20], kind="byte_bpe", vocab_size=350, out_dir=tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()


def test_sampling_by_seed(tmp_path):
    options = {"kind": "byte_bpe", "vocab_size": 350, "out_dir": tmp_path, "max_bytes": 2000}
    infos = [train_tokenizer(_TEXTS, seed=seed, **options) for seed in (0, 0, 1)]
    assert infos[0] == infos[1] != infos[2]
    assert all(1500 < info["training_bytes"] <= 2000 for info in infos)


def test_round_scores_changes_scores_only(processors):
    model = processors["unigram"].serialized_model_proto()
    assert _round_scores(model) == model
    scores = [processors["unigram"].get_score(i) for i in range(processors["unigram"].get_piece_size())]
    assert all(score * 32 == round(score * 32) for score in scores) and len(set(scores)) > 20
    start = next(s for tag, s, e in _fields(model, 0, len(model)) for t, s, _ in _fields(model, s, e) if t == 21)
    moved = model[:start] + struct.pack("<f", scores[0] + 0.01) + model[start + 4 :]
    assert moved != model and _round_scores(moved) == model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "bpe"}, r"unknown tokenizer kind 'bpe'.*Did you mean"),
        ({"kind": "byte_bpe", "vocab_size": 256}, "byte_bpe needs at least 257"),
        ({"kind": "unigram", "vocab_size": 100}, "unigram needs at least 260"),
        ({"kind": "spm_bpe", "vocab_size": 265}, "sentencepiece cannot train a spm_bpe.*vocab_size=265"),
    ],
)
def test_bad_arguments(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train_tokenizer(_TEXTS, **{"vocab_size": 400, "out_dir": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
def test_no_text(tmp_path, kind):
    for texts in ([], [""]):
        with pytest.raises(InputError, match="no text to train"):
            train_tokenizer(texts, kind=kind, vocab_size=400, out_dir=tmp_path)
