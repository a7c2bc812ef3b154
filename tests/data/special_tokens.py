"""Tokenizers with the special tokens that chat templates of several families spell."""

import tokenizers

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|end|>"]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]


def add_special_tokens(directory, texts=SPECIAL):
    """Adds special tokens to the tokenizer of a directory."""
    raw = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    raw.add_special_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in texts])
    raw.save(str(directory / "tokenizer.json"))
