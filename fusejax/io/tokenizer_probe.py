"""Whether the raw `tokenizer.json` gives the ids that `AutoTokenizer` gives, which a model was trained with.

The two can differ: `transformers` rebuilds the normaliser or pre-tokenizer of some classes from other files than
`tokenizer.json`. A capture with other ids than the model knows would be worthless, so it is checked at its start,
on texts that have found such differences before. Special tokens are not in them: here they are plain text.
"""

import warnings

from fusejax.errors import InputError
from fusejax.io.tokenizers import Tokenizer

__all__ = ["PROBES", "probe_tokenizer"]

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " leading and  double   spaces, a\ttab\nand\n\n two line ends \n",
    "I'm sure they'll say it isn't we've 1234567890 3.14159 0xFF 1,000,000",
    "def f(x):\n    return [i ** 2 for i in range(x) if i % 2 == 0]  # squares\n",
    "naïve café, Füße, Ærøskøbing, ﬁ ½ № Ω Å",
    "日本語のテキストと漢字。中文 한국어 العربية עברית हिन्दी",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200bzero width",
    'https://example.org/a_b?c=d&e=%20 <b>bold</b> {"k": [1, null]}',
)


def probe_tokenizer(tokenizer: Tokenizer) -> str:
    """Compares the ids of `tokenizer` with those of `AutoTokenizer` on `PROBES`.

    Returns:
      An empty string, or why they could not be compared.

    Raises:
      InputError: they differ; the text and both lists of ids are shown.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers, about itself
        from transformers import AutoTokenizer

        try:
            auto = AutoTokenizer.from_pretrained(tokenizer.directory, local_files_only=True, trust_remote_code=False)
            theirs = [auto(text, add_special_tokens=False)["input_ids"] for text in PROBES]
        except Exception as error:  # whatever transformers raises: it cannot load this tokenizer
            reason = (str(error).splitlines() or [""])[0][:200]
            return f"AutoTokenizer cannot load {tokenizer.directory} ({reason}); ids were not compared with it"
    for text, expected, encoded in zip(PROBES, theirs, tokenizer.encode_batch(PROBES, end=False), strict=True):
        first = list(encoded.tokens[:1]) if tokenizer.start_id is None else []
        found = [int(i) for i in [*first, *encoded.labels]]
        if found != list(expected):
            raise InputError(
                f"the tokenizer in {tokenizer.directory} gives other ids than AutoTokenizer for {text!r}:\n"
                f"  tokenizer.json: {found}\n  AutoTokenizer:  {list(expected)}\n"
                "Use the tokenizer.json that the model was trained with, or mend tokenizer_config.json."
            )
    return ""
