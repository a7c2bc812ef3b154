"""Speed of alignment: the papers' string alignment, vocabulary maps, and the byte-exact alignment.

    python benchmarks/alignment_speed.py [--data DIR] [--json FILE] [--markdown FILE]

Seconds are processor time of one core (of all cores for `workers`), the least of a few repeats: other load on the
machine hardly disturbs it. The baseline of the dynamic program is the papers' algorithm in plain Python with an
edit-distance library, written here from its description; ratio = baseline / ours. Without `--data` (real tokenizers
and a corpus; default: the test material beside the checkout) the rows that need it are left out, and said to be.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rapidfuzz
from rapidfuzz.distance import Levenshtein

from fusejax.alignment import Opening, align_document, align_positions, coarse_map
from fusejax.alignment.parity import StringAligner, Vocabulary, min_ed_map
from fusejax.config import FusionConfig
from fusejax.data.embedded import embedded_corpus
from fusejax.io.store import Record
from fusejax.io.tokenizers import Tokenizer, load_tokenizer
from fusejax.stages.compare import vocabulary_map
from fusejax.stages.fuse import fuse_document
from fusejax.types import TopK

ROOT = Path(__file__).resolve().parent.parent
TOKENS, ENTRIES = 2048, 10


class Row(NamedTuple):
    """One line of the table."""

    name: str
    shape: str
    implementation: str
    baseline: str
    seconds: float
    ratio: float | None
    bound: str  # what was asked for
    peak_bytes: int
    device: str = "CPU, 1 core"
    roofline: float | None = None


def least(function: Callable[[], Any], repeats: int = 3) -> tuple[float, Any]:
    """(least processor seconds, last result)."""
    times, result = [], None
    for _ in range(repeats):
        start = time.process_time()
        result = function()
        times.append(time.process_time() - start)
    return min(times), result


def plain_alignment(source: list[str], target: list[str], source_marker: str, target_marker: str) -> list[list[int]]:
    """The papers' dynamic program, cell by cell: strip both markers, edit distance, three neighbours, walk back."""

    def cost(a: str, b: str) -> int:
        return Levenshtein.distance(a.replace(source_marker, ""), b.replace(target_marker, ""))

    n, m = len(source), len(target)
    table = np.full((n + 1, m + 1), np.inf)
    table[0, 0] = 0
    for i in range(n):
        for j in range(m):
            near = min(table[i, j + 1], table[i + 1, j], table[i, j])
            table[i + 1, j + 1] = cost(source[i], target[j]) + near
    i, j = n - 1, m - 1
    beside: list[list[int]] = [[] for _ in target]
    beside[j].append(i)
    while i or j:
        options = (table[i, j], (i - 1, j - 1)), (table[i, j + 1], (i - 1, j)), (table[i + 1, j], (i, j - 1))
        i, j = min(options, key=lambda option: option[0])[1]
        beside[j].insert(0, i)
    return beside


def pieces(directory: Path, marker: str) -> Vocabulary:
    """The strings of a tokenizer.json as the papers' programs read them."""
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    found: list[str | None] = [None] * (max(model.values()) + 1)
    for piece, index in model.items():
        found[index] = piece
    return Vocabulary(found, marker)


def dtw_rows(data: Path, text: str) -> tuple[list[Row], float]:
    """The string alignment at 2,048 tokens; also the baseline's seconds per target position."""
    source, target = (load_tokenizer(data / "tokenizers" / name) for name in ("gpt2", "mistral-v1"))
    ours = pieces(data / "tokenizers/gpt2", "Ġ")
    theirs = pieces(data / "tokenizers/mistral-v1", "▁")
    source_ids = source.encode(text, start=False, end=False).tokens[:TOKENS]
    target_ids = target.encode(text, start=False, end=False).tokens[:TOKENS]
    read = [ours.pieces[i] or "" for i in source_ids], [theirs.pieces[i] or "" for i in target_ids]
    plain, wanted = least(lambda: plain_alignment(read[0], read[1], "Ġ", "▁"), 1)
    cold, found = least(lambda: StringAligner(ours, theirs)(source_ids, target_ids))
    assert [list(range(a, b + 1)) for a, b in zip(found.first, found.last, strict=True)] == wanted
    aligner = StringAligner(ours, theirs)
    aligner(source_ids, target_ids)
    warm, _ = least(lambda: aligner(source_ids, target_ids))
    shape, bytes_ = f"{len(source_ids)} x {len(target_ids)} tokens", len(source_ids) * len(target_ids) // 4
    return [
        Row("string DTW, new tokens", shape, "fusejax", "plain Python", cold, plain / cold, ">= 100", bytes_),
        Row("string DTW, tokens seen before", shape, "fusejax", "plain Python", warm, plain / warm, "", bytes_),
        Row("string DTW", shape, "plain Python", "", plain, None, "", len(source_ids) * len(target_ids) * 8),
    ], plain / len(target_ids)


def byte_rows(data: Path, texts: list[str], plain_per_position: float) -> list[Row]:
    """Pairing positions by bytes, against the dynamic program and against tokenizing the same text."""
    source, target = (load_tokenizer(data / "tokenizers" / name) for name in ("gpt2", "mistral-v1"))
    raw = [tokenizer._encoder for tokenizer in (source, target)]
    tokenizing, _ = least(lambda: [x.encode_batch_fast(texts, add_special_tokens=False) for x in raw])
    both, _ = least(lambda: (source.encode_batch(texts), target.encode_batch(texts)))
    pairs = list(zip(source.encode_batch(texts), target.encode_batch(texts), strict=True))
    positions = sum(len(b.tokens) for _, b in pairs)
    seconds, _ = least(lambda: [align_positions(a.byte_ends, b.byte_ends) for a, b in pairs])
    shape = f"{positions} target positions"
    whole = (both + seconds) / tokenizing
    return [
        Row("positions by bytes", shape, "fusejax", "plain Python DTW per position", seconds,
            plain_per_position / (seconds / positions), ">= 5000", 0),
        Row("tokenizing with byte ends, and alignment", shape, "fusejax", "tokenizing alone (`tokenizers`)",
            both + seconds, 1 / whole, f"<= 1.3 of tokenizing: {whole:.2f}", 0),
    ]  # fmt: skip


def map_rows(data: Path) -> list[Row]:
    """Vocabulary maps of large vocabularies."""
    ours, theirs = pieces(data / "tokenizers/gpt2", "Ġ"), pieces(data / "tokenizers/mistral-v1", "▁")
    start, wall = time.process_time(), time.perf_counter()
    min_ed_map(ours, theirs)
    processor, wall = time.process_time() - start, time.perf_counter() - wall
    rows = [
        Row("MinED map", f"{len(ours.pieces)} x {len(theirs.pieces)} tokens", "fusejax", "", processor, None,
            f"<= 60 s on 2 cores; wall {wall:.1f} s", 256 * len(theirs.pieces), "CPU, 2 cores"),
    ]  # fmt: skip
    llama3, qwen2 = (load_tokenizer(data / "tokenizers" / name) for name in ("llama3", "qwen2"))
    seconds, _ = least(lambda: coarse_map(qwen2, llama3), 1)
    shape = f"{qwen2.vocab_size} x {llama3.vocab_size} tokens"
    return [*rows, Row("coarse alphabet", shape, "fusejax", "", seconds, None, "<= 30 s", 0, "CPU, 2 cores")]


def captured(tokenizer: Tokenizer, texts: list[str], rng: np.random.Generator) -> list[Record]:
    """Records (A1) with random distributions that hold the true next token."""
    records = []
    for number, encoded in enumerate(tokenizer.encode_batch(texts)):
        count = len(encoded.tokens)
        ids = rng.integers(0, tokenizer.vocab_size, (count, ENTRIES)).astype(np.int32)
        ids[:, 0] = encoded.labels
        shares = np.sort(rng.dirichlet(np.ones(ENTRIES + 1), count), axis=1)[:, ::-1]
        logprobs = np.log(shares).astype(np.float32)
        top = TopK(ids, logprobs[:, :-1], logprobs[:, -1])
        arrays = {
            "tokens": encoded.tokens,
            "labels": encoded.labels,
            "byte_ends": encoded.byte_ends,
            "topk_ids": top.ids,
            "topk_logprobs": top.logprobs,
            "residual_logprob": top.residual_logprob,
            "realised_logprob": logprobs[:, 0],
        }
        records.append(Record(str(number), {"n_bytes": encoded.n_bytes}, arrays))
    return records


def stage_rows(data: Path, texts: list[str]) -> list[Row]:
    """What the stages do per document, tokenizing and files excluded."""
    source, target = (load_tokenizer(data / "tokenizers" / name) for name in ("gpt2", "mistral-v1"))
    records, encoded = captured(source, texts, np.random.default_rng(0)), target.encode_batch(texts)
    vocab_map = vocabulary_map("coarse", source, target, texts)
    opening = Opening(source, target, vocab_map)

    def align() -> list[Record]:
        pairs = zip(records, encoded, strict=True)
        made = [align_document(a.arrays, b, vocab_map, n_bytes=b.n_bytes, opening=opening) for a, b in pairs]
        return [Record(a.doc_id, x.header, x.arrays) for a, x in zip(records, made, strict=True)]

    first, aligned = least(align)
    fusion = FusionConfig()
    second, _ = least(lambda: [fuse_document([record, record], fusion) for record in aligned])
    positions = sum(len(x.tokens) for x in encoded)
    shape = f"{positions} target positions, K = {ENTRIES}"
    rows = (("align", first), ("fuse, two sources", second), ("align two sources and fuse", 2 * first + second))
    return [
        Row(name, shape, "fusejax", "", seconds, None, f">= 200k/s: {positions / seconds / 1e3:.0f}k/s", 0)
        for name, seconds in rows
    ]


def markdown(result: dict[str, Any]) -> str:
    """The rows as a table."""
    lines = ["# Speed of alignment", "", f"`{result['command']}`, {result['versions']}", ""]
    lines += ["| what | size | seconds | baseline | ratio | asked for |", "|---|---|---|---|---|---|"]
    for row in result["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
        cells = (row["name"] if row["implementation"] == "fusejax" else f"{row['name']} ({row['implementation']})",
                 row["shape"], f"{row['seconds']:.3g}", row["baseline"], ratio, row["bound"])  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *result["notes"]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = parser.parse_args()
    documents = [d.text[:8000] for part in embedded_corpus(max_bytes_per_domain=400_000).values() for d in part]
    rows, notes = [], ["Seconds are processor time. The string path equals the plain program's, cell by cell."]
    if (given.data / "tokenizers").is_dir():
        rows, per_position = dtw_rows(given.data, "\n".join(documents)[:40_000])
        rows += byte_rows(given.data, documents, per_position)
        rows += map_rows(given.data) + stage_rows(given.data, documents)
    else:
        notes.append(f"No real tokenizers at {given.data.name}: every row was left out.")
    versions = f"numpy {np.__version__}, rapidfuzz {rapidfuzz.__version__}"
    result = {
        "command": "python benchmarks/alignment_speed.py",
        "versions": versions,
        "rows": [row._asdict() for row in rows],
        "notes": notes,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    for path, text in ((given.json, json.dumps(result, indent=1) + "\n"), (given.markdown, markdown(result))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    print(markdown(result))


if __name__ == "__main__":
    main()
