"""What makes a text fit for the embedded corpus: readable, not a table, not said before.

Deliberately not done: language identification beyond function words, perplexity filters, MinHash. Near-duplicates are
found by exact hashes of three consecutive normalised lines, in order of arrival, which is one pass and has no
parameters to tune.
"""

__all__ = ["NearDuplicates", "is_readable", "unseen_paragraphs"]

import re

import xxhash

_DIGIT = re.compile(r"\d")
_LETTER = re.compile(r"[A-Za-z]")
_SHINGLE = 3
_SHARE = 0.4


def is_readable(text: str, *, min_bytes: int = 300, max_line: int = 300) -> bool:
    """Whether a text has lines of bearable length, letters, few digits and not one line again and again."""
    if len(text) < min_bytes:
        return False
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if max(map(len, lines)) > max_line or len(set(lines)) < 0.5 * len(lines):
        return False
    size = sum(map(len, lines))
    return len(_DIGIT.findall(text)) <= 0.1 * size and len(_LETTER.findall(text)) >= 0.45 * size


class NearDuplicates:
    """Remembers what was kept and tells whether a new text mostly repeats it."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def admit(self, text: str) -> bool:
        """True, and the text is remembered, unless 40% of its three-line shingles were seen before."""
        lines = ["".join(line.split()).lower() for line in text.split("\n")]
        lines = [line for line in lines if len(line) > 3]
        count = max(1, len(lines) - _SHINGLE + 1)
        shingles = [xxhash.xxh3_64_intdigest("\n".join(lines[i : i + _SHINGLE]).encode()) for i in range(count)]
        if sum(s in self._seen for s in shingles) > _SHARE * len(shingles):
            return False
        self._seen.update(shingles)
        return True


def unseen_paragraphs(text: str, seen: set[int]) -> str:
    """Drops the paragraphs whose words are in `seen`, and adds the others' hashes to it."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = xxhash.xxh3_64_intdigest(" ".join(paragraph.lower().split()).encode())
        if key not in seen:
            seen.add(key)
            kept.append(paragraph.rstrip("\n"))
    return "\n\n".join(kept) + "\n" if kept else ""
