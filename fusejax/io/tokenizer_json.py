"""What a `tokenizer.json` says about itself: how pieces spell bytes, and how to encode a continuation.

Everything is decided from the components (normalizer, pre_tokenizer, decoder, model), so any fast tokenizer of
Hugging Face works without a table of tokenizer classes. Pure functions on the parsed JSON; no tokenizer object.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import xxhash

from fusejax.alignment.surface import byte_level_bytes, sentencepiece_bytes, wordpiece_bytes

__all__ = [
    "Spelling",
    "continuation_json",
    "encoder_json",
    "fingerprint",
    "later_json",
    "piece_bytes",
    "pieces",
    "rewrites_text",
    "special_roles",
    "spelling",
    "utf8_stretches",
]

Json = dict[str, Any]
ROLE_KEYS = {"bos": ("bos_token", "cls_token"), "eos": ("eos_token", "sep_token"), "unk": ("unk_token",)}
ROLE_KEYS["pad"] = ("pad_token",)
EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")
LISTS = ("normalizers", "pretokenizers", "decoders", "processors")


class Spelling(NamedTuple):
    """How the pieces of one vocabulary spell bytes."""

    kind: str  # "byte_level", "sentencepiece", "wordpiece" or "plain"
    space: str | None  # the character that stands for a blank
    byte_fallback: bool  # whether <0xNN> pieces are bytes
    prefix: str  # WordPiece's mark of a piece inside a word
    suffix: str  # BPE's mark of a word's last piece


def spelling(spec: Json) -> Spelling:
    """Decides from the components how pieces spell bytes."""
    stages = [part for key in ("normalizer", "pre_tokenizer", "decoder") for part in _components(spec.get(key))]
    model = spec["model"]
    types = {part["type"] for part in stages}
    space = next((found for found in map(_space, stages) if found), None)
    fallback = bool(model.get("byte_fallback")) or "ByteFallback" in types
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    kind = "sentencepiece" if space or fallback else "plain"
    if model.get("type") == "WordPiece":
        kind = "wordpiece"
    elif "ByteLevel" in types:
        kind = "byte_level"
    return Spelling(kind, space, fallback, prefix, suffix)


def pieces(spec: Json) -> dict[str, int]:
    """Returns the model's pieces and their ids, added tokens not included."""
    vocab = spec["model"]["vocab"]
    return vocab if isinstance(vocab, dict) else {entry[0]: index for index, entry in enumerate(vocab)}


def piece_bytes(piece: str, style: Spelling) -> bytes:
    """Returns the bytes that one piece of the model's vocabulary stands for."""
    if style.kind == "byte_level":
        return byte_level_bytes(piece)
    if style.kind == "wordpiece":
        return wordpiece_bytes(piece, prefix=style.prefix)
    surface = sentencepiece_bytes(piece, space=style.space, byte_fallback=style.byte_fallback)
    return surface.removesuffix(style.suffix.encode()) if style.suffix else surface


def rewrites_text(spec: Json) -> bool:
    """Returns whether the normaliser changes ordinary text, so that most documents need offsets."""
    harmless = {"Prepend", "Replace", "NFC", "ByteLevel"}
    normalisers = {part["type"] for part in _components(spec.get("normalizer"))}
    return spec["model"].get("type") == "WordPiece" or not normalisers <= harmless


def encoder_json(spec: Json) -> Json:
    """Returns the same tokenizer without what would disturb byte ends: template, truncation, padding, dropout.

    The post-processor adds special tokens and trims offsets; both are ours to do. A Unigram model finds its
    control pieces (`</s>`) in plain text, so there they lose their spelling.
    """
    spec = {**spec, "post_processor": None, "truncation": None, "padding": None, "model": dict(spec["model"])}
    if spec["model"].get("dropout"):
        spec["model"]["dropout"] = None
    if spec["model"].get("type") == "Unigram":
        specials = {token["content"] for token in spec.get("added_tokens", []) if token.get("special")}
        vocab = spec["model"]["vocab"]
        spec["model"]["vocab"] = [
            [f"\U0010fffe{index}\U0010fffe", score] if piece in specials else [piece, score]
            for index, (piece, score) in enumerate(vocab)
        ]
        spec["added_tokens"] = [token for token in spec.get("added_tokens", []) if not token.get("special")]
    return spec


def continuation_json(spec: Json) -> Json:
    """Returns the tokenizer that encodes bytes as they stand: no dummy space and no rewriting of the text."""
    spec = {**encoder_json(spec)}
    kept = [part for part in _components(spec.get("normalizer")) if _space(part) or part["type"] == "ByteLevel"]
    spec["normalizer"] = {"type": "Sequence", "normalizers": kept} if kept else None
    spec["pre_tokenizer"] = copy.deepcopy(spec.get("pre_tokenizer"))
    for part in _components(spec["pre_tokenizer"]):
        if part["type"] == "Metaspace":
            part["prepend_scheme"] = "never"
            part.pop("add_prefix_space", None)
        elif part["type"] == "ByteLevel":
            part["add_prefix_space"] = False
    return spec


def special_roles(spec: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, int]:
    """Returns the ids of bos, eos, unk and pad, as far as the tokenizer names them."""
    roles: dict[str, int] = {}
    for role, keys in ROLE_KEYS.items():
        for key in keys:
            token = config.get(key)
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str) and content in ids:
                roles.setdefault(role, ids[content])
    added = {token["content"]: token["id"] for token in spec.get("added_tokens") or [] if token.get("special")}
    ending = next((added[name] for name in EOS_NAMES if name in added), None)
    if ending is not None:
        roles.setdefault("eos", ending)
    model = spec["model"]
    if "unk" not in roles:
        unknown = model["unk_id"] if model.get("unk_id") is not None else ids.get(model.get("unk_token") or "")
        roles.update({} if unknown is None else {"unk": unknown})
    return roles


def later_json(spec: Json) -> Json | None:
    """Returns the encoder of text that follows a special token, where it gets no dummy space; None: it is the same."""
    spec = {**encoder_json(spec), "pre_tokenizer": copy.deepcopy(spec.get("pre_tokenizer"))}
    first = [part for part in _components(spec["pre_tokenizer"]) if part.get("prepend_scheme") == "first"]
    for part in first:
        part["prepend_scheme"] = "never"
    return spec if first else None


def fingerprint(spec: Json) -> str:
    """Returns a 128-bit hash of the canonical content, the same for any order of keys or white space."""
    canonical = json.dumps(spec, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return xxhash.xxh3_128_hexdigest(canonical.encode("utf-8", "surrogatepass"))


def utf8_stretches(fragment: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Cuts bytes into pairs of a valid UTF-8 stretch and the invalid bytes after it."""
    while fragment:
        try:
            fragment.decode()
            yield fragment, b""
            return
        except UnicodeDecodeError as error:
            yield fragment[: error.start], fragment[error.start : error.end]
            fragment = fragment[error.end :]


def _components(node: Mapping[str, Any] | None) -> Iterator[Any]:
    """The leaves of a component, sequences unfolded."""
    if not node:
        return
    nested = next((node[key] for key in LISTS if key in node), None)
    if nested is None:
        yield node
    else:
        for part in nested:
            yield from _components(part)


def _space(part: Json) -> str | None:
    """The character that this component writes for a blank."""
    if part["type"] == "Metaspace":
        return part.get("replacement") or "▁"
    if part["type"] == "Replace" and isinstance(part.get("pattern"), dict):
        pattern, content = part["pattern"].get("String"), part.get("content")
        if pattern == " " and content and len(content) == 1 and content != " ":
            return content
        if content == " " and pattern == "▁":
            return pattern
    return None
