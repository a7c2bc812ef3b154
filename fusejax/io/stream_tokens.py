"""The tokens of a tokenizer by id, as its files spell them, and a tokenizer file with more of them.

Merging models of several vocabularies needs no tokenizer that can encode, only which token has which row. Tokens
that another model brings (`tokenizer: union`) become added tokens of the base's `tokenizer.json`: text that spells one
is cut there before the base's own rules apply, which is what can be said without training merges anew.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusejax.errors import InputError
from fusejax.io.hf import _read_json

__all__ = ["extended_tokenizer", "read_tokens"]


def read_tokens(directory: Path) -> dict[str, int] | None:
    """Returns token -> id of a model's tokenizer, None where it has no file that says so.

    Raises:
        InputError: a broken file, or one of a kind that is not known.
    """
    path = directory / "tokenizer.json"
    if path.is_file():
        return _tokens_of(path, _read_json(path))
    if (directory / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        pieces = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
        return {pieces.id_to_piece(i): i for i in range(len(pieces))}
    return None


def _tokens_of(path: Path, read: Mapping[str, Any]) -> dict[str, int]:
    try:
        vocabulary = read["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: pairs of piece and score
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        return dict(vocabulary) | {entry["content"]: entry["id"] for entry in read.get("added_tokens") or ()}
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} lists no tokens ({error!r}); expected a tokenizer.json of tokenizers") from error


def extended_tokenizer(directory: Path, tokens: Sequence[str | None]) -> str:
    """Returns the text of a model's tokenizer.json with the tokens added that it lacks, each at its id.

    Args:
        directory: of the model whose tokenizer is kept.
        tokens: by id; None where a row has no token.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{directory} has no tokenizer.json, which `tokenizer: union` adds tokens to; convert it first"
        )
    read = _read_json(path)
    own = _tokens_of(path, read)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    more = [{"id": i, "content": t} | flags for i, t in enumerate(tokens) if t is not None and t not in own]
    read["added_tokens"] = [*(read.get("added_tokens") or []), *more]
    return json.dumps(read, ensure_ascii=False, indent=2) + "\n"
