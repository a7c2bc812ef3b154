"""Tokenizers: ids together with the byte of the text at which every position ends.

One small class over the `tokenizers` library, read directly from `tokenizer.json`. It follows the convention of
the whole package: a document is `x = [bos?] + ids + [eos?]`, `tokens = x[:-1]`, `labels = x[1:]`, and
`byte_ends[t]` counts the UTF-8 bytes of the original text covered after reading `tokens[t]`. The start token is
the tokenizer's bos, else its eos (GPT style), else there is none and the first token is not predicted.

* Special tokens in a text are plain text: a user who types `</s>` does not end a document.
* A document whose token bytes, joined, are its text is `exact`; otherwise (a normaliser changed it, an unknown
  token) its ends come from the library's offsets and `exact` is False.
* Continuations (`encode_continuation`) are encoded without dummy space and without normalisers. Bytes that are
  not UTF-8: byte-level BPE runs on the letters of the bytes as one word; a byte-fallback tokenizer encodes the
  valid stretches and gives one `<0xNN>` per other byte; any other tokenizer gives its unknown token there.
  WordPiece is the greedy longest match on the pieces' bytes.

Not done here: chat templates (`fusejax.io.tokenizer_rendered` encodes what they give), slow tokenizers (a
`tokenizer.model` alone is converted by `transformers`, which is imported only then), downloads.
"""

import functools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers

from fusejax.alignment.surface import byte_level_letters, joined_ends, offset_ends, token_lengths
from fusejax.errors import InputError
from fusejax.io import tokenizer_json
from fusejax.types import Array

__all__ = ["EncodedDocument", "Tokenizer", "check_vocabulary", "load_tokenizer"]

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "chat_template.jinja",
)
BATCH = 8192


class EncodedDocument(NamedTuple):
    """One document as positions that read a token and predict the next."""

    tokens: Array  # [N] int32, what is read
    labels: Array  # [N] int32, what follows
    byte_ends: Array  # [N] int32, bytes of the text covered after reading tokens[t]
    n_bytes: int  # UTF-8 bytes of the text
    exact: bool  # whether the token bytes are the text (else byte_ends come from offsets)
    spans: Array | None = None  # [N] int32, the trained span that the label belongs to, -1: none; None: all are trained


class Tokenizer:
    """A tokenizer that knows the bytes of its tokens. Made by `load_tokenizer`."""

    def __init__(self, spec: Mapping[str, Any], config: Mapping[str, Any], *, directory: Path) -> None:
        self._spec = dict(spec)
        self.directory, self.config = directory, dict(config)
        self.style = tokenizer_json.spelling(self._spec)
        self.fingerprint = tokenizer_json.fingerprint(self._spec)
        self._encoder = _build(tokenizer_json.encoder_json(self._spec), directory)
        added = {token["content"]: token for token in self._spec.get("added_tokens") or []}
        for index, token in (config.get("added_tokens_decoder") or {}).items():
            added.setdefault(token["content"], {**token, "id": int(index)})
        ids = {**tokenizer_json.pieces(self._spec), **{content: token["id"] for content, token in added.items()}}
        self.special_roles = tokenizer_json.special_roles(self._spec, config, ids)
        self.vocab_size = max(ids.values(), default=-1) + 1
        special = {token["id"] for token in added.values() if token.get("special")}
        special.update(self.special_roles.values())
        self.special_tokens = {content: index for content, index in ids.items() if index in special}
        self.token_bytes: list[bytes | None] = [None] * self.vocab_size
        for piece, index in ids.items():
            if index not in special:
                plain = piece in added
                self.token_bytes[index] = piece.encode() if plain else tokenizer_json.piece_bytes(piece, self.style)
        self._rewrites = tokenizer_json.rewrites_text(self._spec)
        self._joinable = [surface or b"" for surface in self.token_bytes]
        self._lengths = token_lengths(self.token_bytes)

    @property
    def bos_id(self) -> int | None:
        """The id of the token that begins a document, where the tokenizer has one."""
        return self.special_roles.get("bos")

    @property
    def eos_id(self) -> int | None:
        """The id of the token that ends a document, where the tokenizer has one."""
        return self.special_roles.get("eos")

    @property
    def unk_id(self) -> int | None:
        """The id of the unknown token."""
        return self.special_roles.get("unk")

    @property
    def pad_id(self) -> int | None:
        """The id of the padding token."""
        return self.special_roles.get("pad")

    @property
    def start_id(self) -> int | None:
        """The id that is read before the first token of a document: bos, else eos, else None."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def encode(self, text: str, *, start: bool = True, end: bool = True) -> EncodedDocument:
        """Encodes one document; see `encode_batch`."""
        return self.encode_batch([text], start=start, end=end)[0]

    def encode_batch(self, texts: Sequence[str], *, start: bool = True, end: bool = True) -> list[EncodedDocument]:
        """Encodes documents with the byte end of every position.

        Args:
          texts: the documents; special tokens in them are plain text.
          start: whether a document begins with `start_id`.
          end: whether it ends with `eos_id`.

        Returns:
          One `EncodedDocument` per text.

        Raises:
          InputError: a text with a lone surrogate, which has no UTF-8 form.
        """
        documents: list[EncodedDocument] = []
        for begin in range(0, len(texts), BATCH):
            batch = list(texts[begin : begin + BATCH])
            raw = [_utf8(text, index) for index, text in enumerate(batch, begin)]
            pairs = zip(*self._ids_and_ends(batch, raw, self._encoder), raw, strict=True)
            documents += [self._document(ids, *ends, len(bytes_), start, end) for ids, ends, bytes_ in pairs]
        return documents

    def encode_continuation(self, fragments: Sequence[bytes], /) -> list[list[int]]:
        """Encodes byte strings as continuations of some text: no dummy space, no normaliser, any bytes.

        Args:
          fragments: the byte strings, valid UTF-8 or not.

        Returns:
          The ids of every fragment.
        """
        if self.style.kind == "wordpiece":
            return [self._longest_match(fragment) for fragment in fragments]
        result: list[list[int]] = [[] for _ in fragments]
        valid, texts = [], []
        for index, fragment in enumerate(fragments):
            try:
                texts.append(fragment.decode())
                valid.append(index)
            except UnicodeDecodeError:
                result[index] = self._encode_broken(fragment)
        for begin in range(0, len(texts), BATCH):
            encodings = self._continuation.encode_batch_fast(texts[begin : begin + BATCH], add_special_tokens=False)
            for index, encoding in zip(valid[begin : begin + BATCH], encodings, strict=True):
                result[index] = encoding.ids
        return result

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of ids, special tokens left out."""
        return self._decoder.decode([int(index) for index in ids], skip_special_tokens=True)

    def save(self, directory: str | Path) -> None:
        """Copies the tokenizer's files into a directory, which is made where it is missing."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            origin = self.directory / name
            if origin.is_file() and origin.resolve() != (directory / name).resolve():
                shutil.copyfile(origin, directory / name)
        if not (directory / "tokenizer.json").exists():
            (directory / "tokenizer.json").write_text(json.dumps(self._spec, ensure_ascii=False), encoding="utf-8")

    def _ids_and_ends(
        self, texts: list[str], raw: list[bytes], encoder: tokenizers.Tokenizer
    ) -> tuple[list[Array], list[tuple[Array, bool]]]:
        """Ids and byte ends (with their exactness) of texts; offsets are asked for only where they are needed."""
        encode = encoder.encode_batch if self._rewrites else encoder.encode_batch_fast
        encodings = encode(texts, add_special_tokens=False)
        rows, ends = [], []
        for encoding, bytes_ in zip(encodings, raw, strict=True):
            ids = encoding.ids
            rows.append(np.asarray(ids, np.int32))
            # Most rewritten texts differ in length already, which is seen without joining their bytes.
            fits = int(self._lengths[rows[-1]].sum()) - len(bytes_) in (0, 1)
            joined = b"".join([self._joinable[i] for i in ids]) if fits else None
            ends.append(None if joined is None else joined_ends(rows[-1], self._lengths, joined, bytes_))
        inexact = [index for index, found in enumerate(ends) if found is None]
        if self._rewrites:
            reported = [encodings[index] for index in inexact]
        else:
            reported = encoder.encode_batch([texts[index] for index in inexact], add_special_tokens=False)
        for index, encoding in zip(inexact, reported, strict=True):
            text, first = texts[index], rows[index][:1]
            blank = first.size > 0 and self._joinable[first[0]] == b" " and not text[:1].isspace()
            ends[index] = offset_ends(text, encoding.offsets, dummy_first=blank)
        failed = set(inexact)
        return rows, [(found, index not in failed) for index, found in enumerate(ends)]

    def _document(self, ids: Array, ends: Array, exact: bool, n_bytes: int, start: bool, end: bool) -> EncodedDocument:
        head = [self.start_id] if start and self.start_id is not None else []
        tail = [self.eos_id] if end and self.eos_id is not None else []
        whole = np.concatenate([np.asarray(head, np.int32), ids, np.asarray(tail, np.int32)])
        unread = 0 if ids.size else n_bytes  # a text of which nothing is left is read by the start token
        ends = np.concatenate([np.full(len(head), unread, np.int32), ends])
        return EncodedDocument(whole[:-1], whole[1:], ends[: max(whole.size - 1, 0)], n_bytes, exact)

    @functools.cached_property
    def _parser(self) -> tokenizers.Tokenizer:
        """The encoder that knows special tokens by their spelling."""
        plain = {"post_processor": None, "truncation": None, "padding": None}
        return _build(self._spec | plain, self.directory, parse_special=True)

    def find_special(self, text: str) -> list[tuple[int, int, int]]:
        """Finds the special tokens spelt in a text: (id, start, end) in characters, blanks that they eat included."""
        found = self._parser.encode(text, add_special_tokens=False)
        pairs = zip(found.ids, found.offsets, strict=True)
        # An unknown character gives the unknown token too, which nobody spelt.
        return [(index, a, b) for index, (a, b) in pairs if self.special_tokens.get(text[a:b].strip()) == index]

    def encode_part(self, text: str, *, first: bool) -> tuple[Array, Array, bool]:
        """Encodes a stretch of plain text between special tokens: ids [n], byte ends [n] in it, whether exact.

        Args:
          text: the stretch, not empty.
          first: whether nothing stands before it; some tokenizers put their dummy space there only.
        """
        encoder = self._encoder if first or not self._later else self._later
        (ids,), ((ends, exact),) = self._ids_and_ends([text], [_utf8(text, 0)], encoder)
        return ids, ends, exact

    @functools.cached_property
    def _later(self) -> tokenizers.Tokenizer | None:
        """The encoder of a stretch that follows a special token, where it is another one."""
        spec = tokenizer_json.later_json(self._spec)
        return None if spec is None else _build(spec, self.directory)

    @functools.cached_property
    def _continuation(self) -> tokenizers.Tokenizer:
        return _build(tokenizer_json.continuation_json(self._spec), self.directory)

    @functools.cached_property
    def _decoder(self) -> tokenizers.Tokenizer:
        return _build(self._spec, self.directory)

    @functools.cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {surface: index for index, surface in enumerate(self.token_bytes) if surface}

    @functools.cached_property
    def _byte_ids(self) -> list[int | None]:
        names = tokenizer_json.pieces(self._spec)
        return [names.get(f"<0x{byte:02X}>") if self.style.byte_fallback else None for byte in range(256)]

    def _encode_broken(self, fragment: bytes) -> list[int]:
        """The ids of bytes that are not UTF-8."""
        if self.style.kind == "byte_level":
            letters = byte_level_letters()
            return [token.id for token in self._encoder.model.tokenize("".join([letters[b] for b in fragment]))]
        ids: list[int] = []
        for valid, rest in tokenizer_json.utf8_stretches(fragment):
            if valid:
                ids += self.encode_continuation([valid])[0]
            for byte in rest:
                found = self._byte_ids[byte]
                found = self.unk_id if found is None else found
                ids += [] if found is None else [found]
        return ids

    def _longest_match(self, fragment: bytes) -> list[int]:
        """WordPiece's greedy longest match; stops at the unknown token where no piece fits."""
        ids: list[int] = []
        while fragment:
            sizes = range(min(len(fragment), int(self._lengths.max(initial=0))), 0, -1)
            size = next((size for size in sizes if fragment[:size] in self._by_bytes), 0)
            if not size:
                return ids if self.unk_id is None else [*ids, self.unk_id]
            ids.append(self._by_bytes[fragment[:size]])
            fragment = fragment[size:]
        return ids


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """Reads the tokenizer of a Hugging Face directory.

    Args:
      directory: a local directory with `tokenizer.json` and, for the roles of special tokens,
        `tokenizer_config.json`; a directory with `tokenizer.model` alone is converted by `transformers`.

    Returns:
      The tokenizer.

    Raises:
      InputError: no such directory, no tokenizer in it, or a file that cannot be read; the file is named.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"tokenizer directory {str(directory)!r} does not exist; give a local directory.")
    path = directory / "tokenizer.json"
    spec = _read_json(path) if path.is_file() else _converted(directory)
    if not isinstance(spec.get("model"), dict) or not spec["model"].get("vocab"):
        raise InputError(f"{path} has no model vocabulary; expected the tokenizer.json of a fast tokenizer.")
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            read = _read_json(directory / name)
            config.update({key: value for key, value in read.items() if value is not None})
    try:
        return Tokenizer(spec, config, directory=directory)
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} or tokenizer_config.json beside it does not have the layout of a fast tokenizer: "
            f"{type(error).__name__} {error}. Fetch the files again."
        ) from error


def check_vocabulary(tokenizer: Tokenizer, model_vocab_size: int, name: str) -> int:
    """Checks that a model has a row for every id of its tokenizer.

    Args:
      tokenizer: the model's tokenizer.
      model_vocab_size: rows of the model's embedding.
      name: the model, for the message.

    Returns:
      The number of padded rows, ids that the tokenizer never makes; report it.

    Raises:
      InputError: the tokenizer makes ids that the model has no row for.
    """
    if tokenizer.vocab_size > model_vocab_size:
        raise InputError(
            f"{name}: the tokenizer in {tokenizer.directory} makes ids up to {tokenizer.vocab_size - 1}, but the "
            f"model's vocabulary has {model_vocab_size} rows. Use the tokenizer that the model was trained with, "
            "or resize the model's embedding."
        )
    return model_vocab_size - tokenizer.vocab_size


def _read_json(path: Path) -> dict[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}. Fetch the file again.") from error
    if not isinstance(read, dict):
        raise InputError(f"{path} holds a {type(read).__name__}, expected a JSON object. Fetch the file again.")
    return read


def _converted(directory: Path) -> dict[str, Any]:
    """The tokenizer.json that `transformers` makes of another tokenizer file."""
    if not any((directory / name).is_file() for name in ("tokenizer.model", "vocab.json", "vocab.txt")):
        raise InputError(f"{directory} has no tokenizer.json; copy the model's tokenizer files there.")
    try:
        from transformers import AutoTokenizer

        made = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        return json.loads(made.backend_tokenizer.to_str())
    except Exception as error:
        raise InputError(
            f"{directory} has no tokenizer.json and its tokenizer files cannot be converted: {error}. "
            "Save a fast tokenizer there (tokenizer.json)."
        ) from error


def _build(spec: Mapping[str, Any], directory: Path, *, parse_special: bool = False) -> tokenizers.Tokenizer:
    try:
        built = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            f"{directory / 'tokenizer.json'} is not a tokenizer that `tokenizers` {tokenizers.__version__} reads: "
            f"{error}. Fetch the file again, or upgrade `tokenizers`."
        ) from error
    built.encode_special_tokens = not parse_special
    return built


def _utf8(text: str, index: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text {index} has a lone surrogate at character {error.start}, which is not Unicode text; "
            "replace it, for example by text.encode('utf-8', 'replace').decode()."
        ) from error
