"""Quality of alignment on real tokenizers and text: the tables of positions, symbols and group sizes.

    python benchmarks/alignment_quality.py [--json FILE] [--markdown FILE] [--bytes N] [--pairs llama2:mpt,...]

Tokenizers and text are those of `FUSEJAX_DATA` (default `../shared/data`); no model is run. Symbols are calibrated
on the training part of the corpora and everything is measured on their test part. A column is the share of aligned
positions at which the true next tokens of both sides get the same name, under

* `exact`: identical bytes; `min_ed`: the papers' map of least edit distance;
* `one_step`: first_T(first_S(b)) once; `fixed_point`: until nothing changes; `+ spaces`: runs of blanks are one;
* `+ opening`: dummy spaces at the start of a document; `+ calibrated`: symbols that disagree are joined.

`oracle_survives`: of all target positions, those at which a source that is certain of its true next token yields
the true target token: alone (full resolution), or by the chain of realised tokens; beside it the papers' dynamic
program on strings, both on every n-th document. `folded_at_256`: of agreeing positions, those whose true symbol
stands for more target tokens than the loss has slots for by default, so that it joins the rest.
"""

import argparse
import gzip
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fusejax.alignment import (
    Opening,
    align_positions,
    coarse_map,
    count_symbols,
    exact_map,
    join_symbols,
)
from fusejax.alignment.document import chain_logprobs
from fusejax.alignment.parity import StringAligner, choose_fusellm, literal_ids, min_ed_map, vocabulary_of_bytes
from fusejax.alignment.report import true_symbols
from fusejax.alignment.vocabulary import first_tokens
from fusejax.io.tokenizers import EncodedDocument, Tokenizer, load_tokenizer
from fusejax.types import VocabMap

DATA = Path(os.environ.get("FUSEJAX_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
ENGLISH = ("alpacaeval-multillm", "gsm8k", "techdocs", "pycode", "wikitext2", "gutenberg")
PAIRS = (
    ("llama2", "gpt-neox-20b"),
    ("mistral-v1", "llama3"),
    ("llama2", "mistral-v1"),
    ("llama3", "mistral-v1"),
    ("qwen2", "llama3"),
    ("llama2", "unigram-cc-all-32000"),
    ("llama2", "bert-uncased"),
    ("bert-uncased", "llama2"),
)
CHINESE = (("llama2", "gpt-neox-20b"), ("qwen2", "llama3"))
PARITY_BYTES = 40_000
Encoded = list[tuple[EncodedDocument, EncodedDocument]]


def read(corpora: tuple[str, ...], split: str, limit: int) -> list[str]:
    """Texts of at most 8,000 characters, about `limit` bytes of each corpus."""
    texts: list[str] = []
    for name in corpora:
        total = 0
        with gzip.open(DATA / "corpora" / name / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                texts.append(json.loads(line)["text"][:8000])
                total += len(texts[-1].encode())
                if total > limit:
                    break
    return texts


def encode(source: Tokenizer, target: Tokenizer, texts: list[str]) -> Encoded:
    return list(zip(source.encode_batch(texts), target.encode_batch(texts), strict=True))


def steps(source: Tokenizer, target: Tokenizer) -> dict[str, VocabMap]:
    """The coarse alphabet without the space rule: one step, and the fixed point."""

    def compose(outer: Any, inner: Any) -> Any:
        return np.where(inner >= 0, outer[np.maximum(inner, 0)], np.int32(-1))

    to_target = first_tokens(target, source.token_bytes)
    of_source = compose(to_target, first_tokens(source, source.token_bytes))
    of_target = compose(to_target, first_tokens(source, target.token_bytes))
    whole = of_target
    for _ in range(64):
        whole = compose(whole, whole)
    return {"one_step": VocabMap(of_source, of_target), "fixed_point": VocabMap(compose(whole, of_source), whole)}


def agreement(pairs: Encoded, indices: list[Any], vocab_map: VocabMap, opening: Opening | None = None) -> float:
    """Share of aligned positions whose true next tokens have the same name; a special pairs by role in every map."""
    aligned = same = 0
    for (theirs, ours), index in zip(pairs, indices, strict=True):
        first = opening(theirs.labels, theirs.byte_ends, ours.labels, ours.byte_ends, index) if opening else []
        own = vocab_map.symbol_of_target[ours.labels]
        agreed = (true_symbols(theirs.labels, index, vocab_map, opening=first) == own) & (own >= 0)
        aligned, same = aligned + int((index >= 0).sum()), same + int(agreed.sum())
    return same / max(aligned, 1)


def with_roles(vocab_map: VocabMap, other: VocabMap, source: Tokenizer, target: Tokenizer) -> VocabMap:
    """Names the special tokens as `other` does."""
    of_source, of_target = (np.array(ids) for ids in vocab_map)
    for ids, known, roles in (
        (of_source, other.symbol_of_source, source.special_roles),
        (of_target, other.symbol_of_target, target.special_roles),
    ):
        special = list(roles.values())
        ids[special] = known[special]
    return VocabMap(of_source, of_target)


def oracle(pairs: Encoded, indices: list[Any], vocab_map: VocabMap, opening: Opening) -> dict[str, float]:
    """What an oracle source and the groups leave: shares of all, and of agreeing positions."""
    members = np.bincount(vocab_map.symbol_of_target[vocab_map.symbol_of_target >= 0], minlength=len(vocab_map[1]))
    total = full = chained = 0
    sizes = []
    for (theirs, ours), index in zip(pairs, indices, strict=True):
        first = opening(theirs.labels, theirs.byte_ends, ours.labels, ours.byte_ends, index)
        own = vocab_map.symbol_of_target[ours.labels]
        agreed = (true_symbols(theirs.labels, index, vocab_map, opening=first) == own) & (own >= 0)
        whole = agreed & (own == ours.labels)
        chain = chain_logprobs(np.zeros(len(theirs.labels)), index, ours.byte_ends, needed=own != ours.labels)
        total, full, chained = total + len(own), full + int(whole.sum()), chained + int((whole | (chain == 0)).sum())
        sizes.append(members[own[agreed]])
    size = np.concatenate(sizes)
    return {
        "oracle_survives": full / total,
        "oracle_survives_with_chains": chained / total,
        "full_resolution": full / max(size.size, 1),
        "group_median": float(np.median(size)),
        "group_p90": float(np.quantile(size, 0.9)),
        "group_largest": int(members.max()),
        "folded_at_256": float((size > 256).mean()),
    }


def reference(pairs: Encoded, source: Tokenizer, target: Tokenizer, table: Any) -> dict[str, float]:
    """The papers' alignment by string edit distance: how often it falls back, and what survives of an oracle."""
    theirs, ours = (vocabulary_of_bytes(x.token_bytes, x.special_roles) for x in (source, target))
    literal, aligner = literal_ids(theirs, ours), StringAligner(theirs, ours)
    total = fell = comparable = survives = wrong = 0
    for a, b in pairs:
        rows, columns = np.append(a.tokens, a.labels[-1]), np.append(b.tokens, b.labels[-1])
        chosen = choose_fusellm(aligner(rows, columns), rows, columns, theirs, ours, table, literal=literal).source[:-1]
        index = align_positions(a.byte_ends, b.byte_ends)
        fallback = (chosen < 0) | (chosen >= len(a.labels))
        said = table[a.labels[np.clip(chosen, 0, len(a.labels) - 1)]]
        total, fell = total + len(chosen), fell + int(fallback.sum())
        comparable += int((fallback & (index >= 0)).sum())
        wrong += int((fallback & (b.tokens != b.labels)).sum())  # the released one-hot names the token just read
        survives += int((~fallback & (said == b.labels)).sum())
    return {
        "fusellm_falls_back": fell / total,
        "fusellm_fallback_comparable": comparable / max(fell, 1),
        "fusellm_one_hot_wrong": wrong / max(fell, 1),
        "fusellm_oracle_survives": survives / total,
    }


def timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    start = time.process_time()
    return function(*arguments), time.process_time() - start


def measure(names: tuple[str, str], corpora: tuple[str, ...], limit: int) -> dict[str, Any]:
    """One row of the table."""
    target, source = (load_tokenizer(DATA / "tokenizers" / name) for name in names)
    texts = read(corpora, "test", limit)
    pairs, calibration = encode(source, target, texts), encode(source, target, read(corpora, "train", 4 * limit))
    indices = [align_positions(a.byte_ends, b.byte_ends) for a, b in pairs]
    coarse, seconds = timed(coarse_map, source, target)
    seen = [(a.labels, b.labels, align_positions(a.byte_ends, b.byte_ends)) for a, b in calibration]
    joined = join_symbols(coarse, target.token_bytes, *count_symbols(seen, coarse))
    spelled = [vocabulary_of_bytes(x.token_bytes, x.special_roles) for x in (source, target)]
    nearest, min_ed_seconds = timed(min_ed_map, *spelled)
    min_ed = VocabMap(nearest, np.arange(target.vocab_size, dtype=np.int32))
    positions = sum(len(index) for index in indices)
    aligned = sum(int((index >= 0).sum()) for index in indices)
    row: dict[str, Any] = {
        "name": f"{names[0]} <- {names[1]}" + (" (Chinese)" if corpora == ("zhpoems",) else ""),
        "positions": positions,
        "inexact_documents": sum(not (a.exact and b.exact) for a, b in pairs) / len(pairs),
        "aligned": aligned / positions,
        "exact": agreement(pairs, indices, exact_map(source, target)),
        "min_ed": agreement(pairs, indices, with_roles(min_ed, coarse, source, target)),
    }
    for name, vocab_map in steps(source, target).items():
        row[name] = agreement(pairs, indices, with_roles(vocab_map, coarse, source, target))
    row["spaces"] = agreement(pairs, indices, coarse)
    row["opening"] = agreement(pairs, indices, coarse, Opening(source, target, coarse))
    row["calibrated"] = agreement(pairs, indices, joined, Opening(source, target, joined))
    row["uncalibrated_full_resolution"] = oracle(pairs, indices, coarse, Opening(source, target, coarse))[
        "full_resolution"
    ]
    row |= oracle(pairs, indices, joined, Opening(source, target, joined))
    every = max(1, sum(b.n_bytes for _, b in pairs) // PARITY_BYTES)
    part = pairs[::every]
    survival = oracle(part, indices[::every], joined, Opening(source, target, joined))
    row |= {key: survival[key] for key in ("oracle_survives", "oracle_survives_with_chains")}
    row |= reference(part, source, target, nearest)
    return row | {"coarse_map_cpu_seconds": seconds, "min_ed_map_cpu_seconds": min_ed_seconds}


COLUMNS = {
    "aligned": "aligned", "exact": "exact", "min_ed": "min_ed", "one_step": "one step", "fixed_point": "fixed point",
    "spaces": "+ spaces", "opening": "+ opening", "calibrated": "+ calibrated", "full_resolution": "full resolution",
}  # fmt: skip
SURVIVAL = {
    "fusellm_falls_back": "FuseLLM falls back",
    "fusellm_fallback_comparable": "of these comparable",
    "fusellm_one_hot_wrong": "one-hot wrong",
    "fusellm_oracle_survives": "FuseLLM: oracle survives",
    "oracle_survives": "ours",
    "oracle_survives_with_chains": "ours with chains",
    "folded_at_256": "group over 256",
}


def markdown(rows: list[dict[str, Any]]) -> str:
    """Both tables; per cent."""
    lines = []
    for columns in (COLUMNS, SURVIVAL):
        lines += ["| target <- source | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            lines.append(f"| {row['name']} | " + " | ".join(f"{100 * row[key]:.1f}" for key in columns) + " |")
        lines.append("")
    lines += ["| target <- source | group: median | 90 % | largest |", "|---|---|---|---|"]
    sizes = ("group_median", "group_p90", "group_largest")
    lines += [f"| {row['name']} | " + " | ".join(f"{row[key]:,.0f}" for key in sizes) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]], json_file: Path | None, markdown_file: Path | None) -> None:
    """Writes what has been measured so far."""
    for path in filter(None, (json_file, markdown_file)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if markdown_file:
        heading = "# Alignment quality\n\n`python benchmarks/alignment_quality.py`; per cent unless said otherwise.\n\n"
        markdown_file.write_text(heading + markdown(rows), encoding="utf-8")
    if json_file:
        versions = {"python": platform.python_version(), "numpy": np.__version__}
        json_file.write_text(json.dumps({"versions": versions, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--bytes", type=int, default=40_000, help="of test text per corpus")
    parser.add_argument("--pairs", help="target:source,...; default: all")
    given = parser.parse_args()
    if not DATA.is_dir():
        parser.exit(0, f"no tokenizers at {DATA}; set FUSEJAX_DATA\n")
    pairs = PAIRS if given.pairs is None else [tuple(pair.split(":")) for pair in given.pairs.split(",")]
    work = [(pair, ENGLISH) for pair in pairs]
    work += [(pair, ("zhpoems",)) for pair in (CHINESE if given.pairs is None else ())]
    rows = []
    for pair, corpora in work:
        rows.append(measure(pair, corpora, given.bytes))
        print(json.dumps(rows[-1]), flush=True)
        write(rows, given.json, given.markdown)
    print(markdown(rows))


if __name__ == "__main__":
    main()
