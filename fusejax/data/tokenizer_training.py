"""Trains small tokenizers of the three families that real LLMs use, as Hugging Face directories.

| kind | family | pieces |
|---|---|---|
| `byte_bpe` | GPT-2, MPT, Qwen | byte-level BPE of the `tokenizers` library; `<|endoftext|>` (id 0) starts and ends |
| `unigram` | T5, ALBERT | sentencepiece unigram with byte fallback; `<unk>` 0, `<s>` 1, `</s>` 2 |
| `spm_bpe` | Llama, Mistral | sentencepiece BPE with byte fallback, digits one by one; same special tokens |

All are lossless, `decode(encode(text)) == text`: nothing is normalised, runs of spaces are kept, a character without a
piece becomes bytes. One exception, which sentencepiece itself makes: its space mark U+2581 decodes to a space.

The sentencepiece kinds are trained by sentencepiece, written as `tokenizer.model`, and rebuilt with the `tokenizers`
library as `tokenizer.json`. Both give the same ids, except where a text spells a special token's name (`<s>`): that is
the special token in `tokenizer.json` and plain text for sentencepiece. For a unigram model this takes two measures:

* The search adds scores over a whole text, in float32 in sentencepiece and float64 in `tokenizers`, and runs of one
  character tie. So scores are rounded to 1/32, which makes both sums exact up to 2^19 nats and ties fall alike.
* `tokenizers` would match a byte piece's name, `<0x0A>`, in a text. So the characters of such names are always pieces,
  and byte pieces get a score with which they never win.

Lines are the training sentences, so no piece crosses a line end and a line feed is the byte piece `<0x0A>`, as in
Llama. sentencepiece puts a space before each sentence: a line's own first space is left out to make up for it.

Deliberately not done: normalisation, chat templates, user-defined symbols, parallel training (one thread is
deterministic).
"""

__all__ = ["TOKENIZER_KINDS", "train_tokenizer"]

import io
import json
import os
import struct
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from fusejax.errors import InputError, nearest

TOKENIZER_KINDS = ("byte_bpe", "unigram", "spm_bpe")
_END_OF_TEXT = "<|endoftext|>"
_SPECIAL = ("<unk>", "<s>", "</s>")
_SPACE = "▁"
_MAX_LINE_BYTES = 16_384
_BYTE_NAME_CHARS = "<>x0123456789ABCDEF"
_SCORE_STEP = 1 / 32
_NEVER = -1e6  # the score of pieces that text must not match: special tokens and bytes


def train_tokenizer(
    texts: Iterable[str],
    *,
    kind: str,
    vocab_size: int,
    out_dir: str | os.PathLike[str],
    seed: int = 0,
    max_bytes: int = 4_000_000,
) -> dict[str, Any]:
    """Trains a tokenizer and writes `tokenizer.json`, `tokenizer_config.json` and `tokenizer.model` (sentencepiece).

    Args:
      texts: training texts, read once.
      kind: one of `TOKENIZER_KINDS`.
      vocab_size: wanted number of tokens, special ones and the 256 bytes included.
      out_dir: made when absent; existing tokenizer files are replaced.
      seed: which texts are used when they exceed `max_bytes`.
      max_bytes: UTF-8 bytes of text used for training.

    Returns:
      What a manifest needs: kind, vocab_size, bytes used, checksums of the files (XXH3-64). `vocab_size` is smaller
      than wanted where the texts have fewer pieces.

    Errors: InputError for an unknown kind, a vocabulary too small for the bytes and characters, no text.
    """
    if kind not in TOKENIZER_KINDS:
        raise InputError(
            f"unknown tokenizer kind {kind!r}: use one of {TOKENIZER_KINDS}.{nearest(kind, TOKENIZER_KINDS)}"
        )
    least = 257 if kind == "byte_bpe" else 256 + len(_SPECIAL) + 1
    if vocab_size < least:
        raise InputError(f"vocab_size is {vocab_size}; {kind} needs at least {least}: 256 bytes and the special tokens")
    sample = _sample(texts, max_bytes, seed)
    if not sample:
        raise InputError(f"there is no text to train the {kind} tokenizer on: give at least one document")
    if kind == "byte_bpe":
        tokenizer, extra = _train_byte_bpe(sample, vocab_size), {}
    else:
        model = _train_sentencepiece(sample, kind, vocab_size)
        tokenizer, extra = _from_sentencepiece(model, kind), {"tokenizer.model": model}
    config = json.dumps(_config(kind), indent=2, sort_keys=True) + "\n"
    text = tokenizer.to_str(pretty=True) + "\n"
    files = {"tokenizer.json": text.encode(), "tokenizer_config.json": config.encode(), **extra}
    _write(Path(out_dir), files)
    return {
        "kind": kind,
        "vocab_size": tokenizer.get_vocab_size(),
        "training_bytes": sum(len(t.encode()) for t in sample),
        "files": {name: xxhash.xxh3_64_hexdigest(data) for name, data in files.items()},
    }


def _sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """The texts in order, or, where they are too many, those that come first in a hash order."""
    kept = [text for text in texts if text]
    sizes = [len(text.encode()) for text in kept]
    if sum(sizes) <= max_bytes:
        return kept
    order = sorted(range(len(kept)), key=lambda i: (xxhash.xxh3_64_intdigest(kept[i].encode(), seed=seed), i))
    chosen, total = [], 0
    for i in order:
        if total + sizes[i] <= max_bytes or not chosen:
            chosen.append(i)
            total += sizes[i]
    return [kept[i] for i in sorted(chosen)]


def _train_byte_bpe(texts: list[str], vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train_sentencepiece(texts: list[str], kind: str, vocab_size: int) -> bytes:
    sentencepiece = _sentencepiece()
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="unigram" if kind == "unigram" else "bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            character_coverage=0.9995,
            required_chars=_BYTE_NAME_CHARS,
            byte_fallback=True,
            split_digits=kind == "spm_bpe",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=True,
            allow_whitespace_only_pieces=True,
            max_sentence_length=_MAX_LINE_BYTES,
            seed_sentencepiece_size=200_000,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise InputError(
            f"sentencepiece cannot train a {kind} tokenizer with vocab_size={vocab_size} on "
            f"{sum(map(len, texts)):,} characters: {error}. Take another vocab_size or more text"
        ) from error
    return _round_scores(model.getvalue()) if kind == "unigram" else model.getvalue()


def _sentencepiece() -> Any:
    with warnings.catch_warnings():  # SWIG types without __module__, sentencepiece 0.2.x on Python 3.12
        warnings.simplefilter("ignore", DeprecationWarning)
        import sentencepiece
    return sentencepiece


def _lines(texts: list[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            line = line.removeprefix(" ")
            if line and len(line.encode()) < _MAX_LINE_BYTES:
                yield line


def _round_scores(model: bytes) -> bytes:
    """Rounds the scores in a serialised `ModelProto` to multiples of `_SCORE_STEP`; nothing else changes.

    On the wire a piece is field 1 of the model, and its score is field 2 (float) of the piece.
    """
    out = bytearray(model)
    for tag, start, end in _fields(model, 0, len(model)):
        if tag >> 3 != 1:
            continue
        for inner, at, stop in _fields(model, start, end):
            if inner == (2 << 3 | 5):
                score = struct.unpack("<f", model[at:stop])[0]
                out[at:stop] = struct.pack("<f", round(score / _SCORE_STEP) * _SCORE_STEP)
    return bytes(out)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(tag, start, end) of each field of a protocol buffer message in `data[at:end]`."""
    while at < end:
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 2:
            size, at = _varint(data, at)
        elif wire == 0:
            size = _varint(data, at)[1] - at
        else:
            size = {1: 8, 5: 4}[wire]
        yield tag, at, at + size
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        shift += 7
        at += 1
        if data[at - 1] < 128:
            return value, at


def _from_sentencepiece(model: bytes, kind: str) -> Tokenizer:
    """The same tokenizer in the `tokenizers` library."""
    processor = _sentencepiece().SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    plain = [
        not (processor.is_byte(i) or processor.is_control(i) or processor.is_unknown(i)) for i in range(len(pieces))
    ]
    scores = [processor.get_score(i) if plain[i] else _NEVER for i in range(len(pieces))]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=0, byte_fallback=True))
    else:
        ranked = sorted((i for i in range(len(pieces)) if plain[i]), key=lambda i: -scores[i])
        tokenizer = Tokenizer(
            models.BPE(
                {piece: i for i, piece in enumerate(pieces)},
                _merges(pieces, ranked),
                unk_token=_SPECIAL[0],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL])
    return tokenizer


def _merges(pieces: list[str], ranked: list[int]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, by the rank of the third, which is what sentencepiece goes by."""
    known = {pieces[i]: i for i in ranked}
    merges = []
    for i in ranked:
        piece = pieces[i]
        pairs = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        pairs = [pair for pair in pairs if pair[0] in known and pair[1] in known]
        merges += sorted(pairs, key=lambda pair: (known[pair[0]], known[pair[1]]))
    return merges


def _config(kind: str) -> dict[str, Any]:
    shared = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
    if kind == "byte_bpe":
        tokens = dict.fromkeys(("bos_token", "eos_token", "unk_token"), _END_OF_TEXT)
        return shared | tokens | {"add_bos_token": False, "add_eos_token": False}
    tokens = dict(zip(("unk_token", "bos_token", "eos_token"), _SPECIAL, strict=True))
    return shared | tokens | {"add_bos_token": True, "add_eos_token": False}


def _write(directory: Path, files: dict[str, bytes]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").unlink(missing_ok=True)  # of another kind, trained here before
    for name, data in files.items():
        temporary = directory / f".{name}.{os.getpid()}.tmp"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, directory / name)
        finally:
            temporary.unlink(missing_ok=True)
