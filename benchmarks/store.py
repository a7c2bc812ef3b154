"""Size, loss, speed and damage detection of the distribution store, on real model outputs.

    python benchmarks/store.py [--json FILE] [--markdown FILE] [--documents N]

The models are the small story models of the shared data directory (`FUSEJAX_DATA`), run over the test stories;
without them, a random model over random text stands in, and the rows say so. Seconds are processor time of one
core. `kl` is the divergence from what the model said to what a reader gets, in nats per position. Two shards of the
default size are filled with the records, again and again, to measure bytes on disk and rates; bits are flipped in a
store of one shard that holds each record once.
"""

import argparse
import gzip
import json
import platform
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np

import fusejax
from fusejax.io.manifest import verify_directory
from fusejax.io.models import open_model
from fusejax.io.store import Record, RecordReader, RecordWriter, damaged_records
from fusejax.io.store_record import pack_record, unpack_record
from fusejax.io.tokenizers import load_tokenizer
from fusejax.models import ModelConfig, init_params, score_tokens
from fusejax.sources.capture import capture_shard, record_of
from fusejax.stages.capture_size import documents_per_shard
from tests.paths import DATA

MODELS, ENTRIES, CODECS = ("stories3M", "stories260K"), (10, 32), ("compact", "float16", "float32")
FLIPS, READS = 200, 500
_LIMITS = {10: 36.0, 32: 105.0}


class _Encoded:
    def __init__(self, ids):
        self.tokens, self.labels = ids[:-1], ids[1:]
        self.byte_ends, self.n_bytes, self.exact = np.arange(len(ids) - 1) * 4, 4 * len(ids), True


def material(name: str, documents: int):
    """Encoded documents, parameters and architecture of a story model, or random ones."""
    if (DATA / "models" / name).is_dir():
        with gzip.open(DATA / "corpora/tinystories/test.jsonl.gz", "rt", encoding="utf-8") as file:
            texts = [json.loads(line)["text"] for line, _ in zip(file, range(documents), strict=False)]
        model = open_model(DATA / "models" / name)
        return name, load_tokenizer(DATA / "models" / name).encode_batch(texts), model.params, model.config
    config = ModelConfig(2048, 64, 128, 2, 4, 4, tie_embeddings=True, max_positions=512, initializer_range=0.4)
    rng = np.random.default_rng(0)
    found = [_Encoded(rng.integers(0, 2048, rng.integers(50, 400)).astype(np.int32)) for _ in range(documents)]
    return f"random instead of {name}", found, init_params(config, jax.random.key(0)), config


def capture(documents, params, config, entries: int) -> list[Record]:
    """Float32 records of documents, as the capture stage makes them."""
    score = jax.jit(partial(score_tokens, cfg=config, k=entries))
    names = ("tokens", "labels", "positions", "segment_ids")
    found = capture_shard(
        lambda *arrays: score(params, **dict(zip(names, arrays, strict=True))),
        documents, top_k=entries, context=512, batch_tokens=4096,
    )  # fmt: skip
    pairs = zip(documents, found, strict=True)
    return [Record(f"tinystories/test/{i}", *record_of(d, c)) for i, (d, c) in enumerate(pairs)]


def divergence(record: Record, again: Record) -> np.ndarray:
    """[N] KL(stored || read) over the entries and the rest, nats."""
    p, q = (_joined(item.arrays) for item in (record, again))
    with np.errstate(invalid="ignore"):
        return np.where(p > -np.inf, np.exp(p) * (p - q), 0.0).sum(1)


def _joined(arrays) -> np.ndarray:
    joined = np.concatenate([arrays["topk_logprobs"], arrays["residual_logprob"][:, None]], 1).astype(np.float64)
    return joined - np.log(np.exp(joined).sum(1, keepdims=True))


def rate(count: int, work) -> float:
    """Positions per processor second, the best of three."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return count / min(seconds)


def _store(root: Path, records: list[Record], codec: str, *, count: int, shard_size: int) -> float:
    """Writes `count` records to `root / "a"`; processor seconds."""
    start = time.process_time()
    writer = RecordWriter(root / "a", kind="captured", settings={"codec": codec}, shard_size=shard_size, codec=codec)
    for index in range(count):
        writer.write(records[index % len(records)])
    writer.finish()
    return time.process_time() - start


def on_disk(records: list[Record], codec: str, *, top_k: int, root: Path) -> dict:
    """Bytes of default shards, written and read at random."""
    text = sum(int(record.header["n_bytes"]) for record in records)
    shard_size = documents_per_shard(len(records), text, top_k=top_k, codec=codec)
    seconds = _store(root, records, codec, count=2 * shard_size, shard_size=shard_size)
    reader, rng = RecordReader(root / "a"), np.random.default_rng(0)
    written, wanted = int(reader.lengths.sum()), rng.integers(0, len(reader), READS)
    read = int(reader.lengths[wanted].sum())
    random_reads = rate(read, lambda: [reader[int(i)] for i in wanted])
    size = sum(p.stat().st_size for p in (root / "a").iterdir())
    shutil.rmtree(root / "a")
    return {
        "documents_per_shard": shard_size,
        "shard_bytes": size // 2,
        "disk_bytes_per_position": size / written,
        "write_positions_per_s": written / seconds,
        "random_read_positions_per_s": random_reads,
        "random_read_ms_per_document": 1e3 * read / random_reads / READS,
    }


def detection(records: list[Record], codec: str, root: Path) -> dict:
    """Flipped bits that are found."""
    _store(root, records, codec, count=len(records), shard_size=len(records))
    rng, found, named = np.random.default_rng(0), 0, 0
    path = next((root / "a").glob("*.array_record"))
    data = path.read_bytes()
    for bit in rng.integers(0, len(data) * 8, FLIPS):
        bad = bytearray(data)
        bad[bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bad)
        problems = verify_directory(root / "a")
        found += len(problems) == 1 and path.name in problems[0]
        named += len(damaged_records(path) or [0]) == 1
    shutil.rmtree(root / "a")
    return {"flips": FLIPS, "flips_found": found, "flips_that_damage_one_record": named}


def measure(name: str, documents: int, root: Path) -> list[dict]:
    name, encoded, params, config = material(name, documents)
    rows = []
    for entries in ENTRIES:
        records = capture(encoded, params, config, entries)
        positions = sum(len(record.arrays["tokens"]) for record in records)
        for codec in CODECS:
            packed = [pack_record(record, codec=codec) for record in records]
            lost = np.concatenate([divergence(r, unpack_record(d)) for r, d in zip(records, packed, strict=True)])
            encode = rate(
                positions, lambda codec=codec, records=records: [pack_record(r, codec=codec) for r in records]
            )
            row = {
                "name": name, "shape": [len(records), positions, entries, config.vocab_size],
                "implementation": codec, "baseline": "float16",
                "bytes_per_position": sum(map(len, packed)) / positions, "limit": _LIMITS[entries],
                "kl_mean": float(lost.mean()), "kl_p99": float(np.quantile(lost, 0.99)), "kl_max": float(lost.max()),
                "encode_positions_per_s": encode,
                "decode_positions_per_s": rate(positions, lambda packed=packed: [unpack_record(d) for d in packed]),
            }  # fmt: skip
            if codec == "compact":
                row |= on_disk(records, codec, top_k=entries, root=root) | detection(records, codec, root)
            row |= {"seconds": positions / encode, "device": "cpu"}
            rows.append(row)
            print(f"{name} K={entries} {codec}: {row['bytes_per_position']:.2f} B, KL {row['kl_mean']:.1e}", flush=True)
    for row in rows:
        same = [r for r in rows if r["shape"] == row["shape"] and r["implementation"] == row["baseline"]]
        row["ratio"] = same[0]["bytes_per_position"] / row["bytes_per_position"]
    return rows


def markdown(rows: list[dict]) -> str:
    head = "model, K, codec, B/position, on disk, KL lost, KL p99, KL max, encode /s, decode /s, write /s, "
    head += "random read /s, flips found"
    lines = ["| " + head.replace(", ", " | ") + " |", "|" + "---|" * 13]
    for r in rows:
        extra = (
            f"{r['disk_bytes_per_position']:.1f}", f"{r['write_positions_per_s'] / 1e3:.0f}k",
            f"{r['random_read_positions_per_s'] / 1e3:.0f}k",
            f"{r['flips_found']}/{r['flips']}",
        ) if "flips" in r else ("", "", "", "")  # fmt: skip
        lines.append(
            f"| {r['name']} | {r['shape'][2]} | {r['implementation']} | {r['bytes_per_position']:.1f} | {extra[0]} | "
            f"{r['kl_mean']:.1e} | {r['kl_p99']:.1e} | {r['kl_max']:.1e} | {r['encode_positions_per_s'] / 1e3:.0f}k | "
            f"{r['decode_positions_per_s'] / 1e3:.0f}k | {extra[1]} | {extra[2]} | {extra[3]} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write rows and versions here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--documents", type=int, default=256)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        rows = [row for name in MODELS for row in measure(name, given.documents, Path(root))]
    versions = {"fusejax": fusejax.__version__, "jax": jax.__version__, "numpy": np.__version__}
    result = {"rows": rows, "versions": versions | {"python": platform.python_version()}}
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    table = markdown(rows)
    if given.markdown:
        title = "# The distribution store\n\n`python benchmarks/store.py --json docs/results/store.json --markdown "
        note = "docs/results/store.md`\n\nSpeeds are positions per second of one core; all bytes of a record count: "
        note += "tokens, labels, byte ends, header and checksum. `on disk` adds container and index, in shards of the "
        note += "default size. `KL` is in nats per position, of the distribution over the entries and the rest.\n\n"
        given.markdown.write_text(title + note + table)
    print(table)


if __name__ == "__main__":
    main()
