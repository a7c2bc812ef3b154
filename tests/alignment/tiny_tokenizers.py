"""Small real tokenizers of every family, trained here in a moment, so that tests need no files."""

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path

from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from fusejax.io.tokenizers import Tokenizer, load_tokenizer

TEXT = (
    "The history of the castle is long: it was built in 1284, burnt in 1403, and rebuilt by 1510. "
    "She said, “we don't know why – it’s been closed since 9/11.” \n\n    def add(x, y):\n        return x + y\n"
    "Où est la bibliothèque? Füße, naïve café, 日本語のテキスト, שלום, привет мир, 😀👍🏽.\n\tTabs\tand   spaces.  \n"
)
CORPUS = [TEXT, *(TEXT[i : i + 97] for i in range(0, len(TEXT), 61))] * 2
LOSSLESS = ("byte_level", "spm_bpe", "metaspace_unigram", "byte_level_nfc")
LOSSY = ("lowercase", "wordpiece", "unigram_no_bytes")
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level(*, nfc: bool) -> Library:
    library = Library(models.BPE())
    library.normalizer = normalizers.NFC() if nfc else None
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=nfc)
    library.decoder = decoders.ByteLevel()
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300 if nfc else 420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(CORPUS, trainer)
    return library


def _spm_bpe() -> Library:
    library = Library(models.BPE(unk_token="<unk>", fuse_unk=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, max_token_length=8, show_progress=False)
    library.train_from_iterator([line[:120] for line in CORPUS], trainer)
    spec = json.loads(library.to_str())
    dropped = {"日", "本", "語", "😀", "👍"}  # so that byte fallback has something to do
    spec["model"]["byte_fallback"] = True
    spec["model"]["merges"] = [
        merge for merge in spec["model"]["merges"] if not dropped & set("".join(merge).replace(" ", ""))
    ]
    kept = [piece for piece in spec["model"]["vocab"] if not dropped & set(piece) and piece not in special]
    spec["model"]["vocab"] = {piece: i for i, piece in enumerate([*special, *BYTES, *kept])}
    return Library.from_str(json.dumps(spec))


def _unigram(*, fallback: bool) -> Library:
    library = Library(models.Unigram())
    library.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always" if fallback else "first")
    library.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    library.train_from_iterator(CORPUS, trainer)
    if fallback:
        spec = json.loads(library.to_str())
        spec["model"]["vocab"] += [[piece, -20.0] for piece in BYTES]
        spec["model"]["byte_fallback"] = True
        library = Library.from_str(json.dumps(spec))
    return library


def _lowercase() -> Library:
    library = _byte_level(nfc=False)
    library.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()])
    return library


def _wordpiece() -> Library:
    library = Library(models.WordPiece(unk_token="[UNK]"))
    library.normalizer = normalizers.BertNormalizer(lowercase=True)
    library.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    library.decoder = decoders.WordPiece(prefix="##")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    library.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=250, special_tokens=special, show_progress=False)
    )
    return library


BUILDERS = {
    "byte_level": (lambda: _byte_level(nfc=False), {"eos_token": "<|endoftext|>"}),
    "byte_level_nfc": (lambda: _byte_level(nfc=True), {"bos_token": {"content": "<|endoftext|>"}}),
    "spm_bpe": (_spm_bpe, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "metaspace_unigram": (lambda: _unigram(fallback=True), {"eos_token": "</s>", "pad_token": "<pad>"}),
    "unigram_no_bytes": (lambda: _unigram(fallback=False), {"eos_token": "</s>", "bos_token": "<s>"}),
    "lowercase": (_lowercase, {"eos_token": "<|endoftext|>"}),
    "wordpiece": (_wordpiece, {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}),
}


@functools.cache
def tiny_directory(name: str) -> Path:
    """A directory with the tokenizer's files."""
    make, config = BUILDERS[name]
    directory = Path(tempfile.mkdtemp(prefix=f"fusejax-{name}-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    make().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@functools.cache
def tiny_tokenizer(name: str) -> Tokenizer:
    """The tokenizer, loaded once per test process."""
    return load_tokenizer(tiny_directory(name))
