"""Run by `test_store_faults`: captures with a stub source, is killed at random points, and goes on.

`python -m tests.io.kill_writer DIR KILLS` prints one line of JSON. It forks before any thread exists, so that a
hundred killed writers cost no more than one start of Python.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fusejax.io.store import Record, RecordWriter
from fusejax.sources.capture import capture_shard, record_of
from fusejax.types import TopK

DOCUMENTS, SHARD_SIZE, ENTRIES, VOCAB = 61, 2, 6, 97


class _Document(NamedTuple):
    tokens: np.ndarray
    labels: np.ndarray
    byte_ends: np.ndarray
    n_bytes: int
    exact: bool = True


def documents() -> list[_Document]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(DOCUMENTS):
        ids = rng.integers(0, VOCAB, rng.integers(1, 40)).astype(np.int32)
        found.append(_Document(ids[:-1], ids[1:], np.arange(len(ids) - 1, dtype=np.int32), len(ids)))
    return found


def score(tokens, labels, positions, segment_ids):
    """A distribution that is a function of token and position."""
    logits = np.sin(tokens[..., None] * 1.7 + positions[..., None] * 0.3 + np.arange(VOCAB) * 2.3) * 4
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ranked = np.take_along_axis(logprobs, order, -1)
    realised = np.take_along_axis(logprobs, labels[..., None], -1)[..., 0]
    residual = np.log(np.exp(ranked[..., ENTRIES:]).sum(-1))
    return realised, TopK(order[..., :ENTRIES].astype(np.int32), ranked[..., :ENTRIES], residual)


def capture(directory: Path, *, pause: float = 0.0) -> None:
    """What the capture stage does, shard by shard, with a pause before each in seconds."""
    texts = documents()
    writer = RecordWriter(directory, kind="captured", settings={"k": ENTRIES}, shard_size=SHARD_SIZE, codec="compact")
    for shard in range(-(-DOCUMENTS // SHARD_SIZE)):
        if writer.has(shard):
            continue
        time.sleep(pause)
        part = texts[shard * SHARD_SIZE : (shard + 1) * SHARD_SIZE]
        writer.seek(shard)
        captured = capture_shard(score, part, top_k=ENTRIES, context=16, batch_tokens=64)
        for number, (document, found) in enumerate(zip(part, captured, strict=True)):
            writer.write(Record(f"{shard}/{number}", *record_of(document, found)))
        writer.flush()
    writer.finish(facts={"documents": DOCUMENTS})


def contents(directory: Path) -> dict[str, str]:
    return {path.name: path.read_bytes().hex() for path in sorted(directory.iterdir())}


def main(root: Path, kills: int) -> None:
    capture(root / "whole")
    whole, chance = contents(root / "whole"), random.Random(5)
    left, same, finished = [], 0, 0
    for number in range(kills):
        directory = root / f"cut{number}"
        child = os.fork()
        if not child:
            try:
                capture(directory, pause=0.003)
            finally:
                os._exit(0)
        # Wait for progress and not for a time, so that a busy machine is hit at the same points.
        shards = chance.randrange(DOCUMENTS // SHARD_SIZE)
        while len(list(directory.glob("*.array_record"))) < shards:
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.006))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        finished += (directory / "manifest.json").is_file()
        left.append(len(list(directory.glob("*.array_record"))) if directory.exists() else 0)
        capture(directory)
        same += contents(directory) == whole
        shutil.rmtree(directory)
    print(json.dumps({"same": same, "finished": finished, "shards_left": left}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
