"""The parity modes give what the programs of FuseLLM and FuseChat gave, to the digit.

Every file of the golden folder is read here. Strings of tokens that are not in `vocabs/` (Llama 2's) come from the
samples themselves, so its vocabulary is the part that occurs.
"""

import functools
import gzip
import hashlib
import json

import numpy as np
import pytest

from fusejax.alignment.parity import (
    PairCounter,
    StringAligner,
    Vocabulary,
    aligned_logits,
    choose_fusechat,
    choose_fusellm,
    literal_ids,
    min_ed_map,
    statistics_map,
)
from fusejax.alignment.parity.min_ed import nearest_tokens
from fusejax.alignment.parity.split import pack_rows
from tests.paths import GOLDEN

ROOT = GOLDEN / "alignment"
pytestmark = [
    pytest.mark.skipif(not ROOT.is_dir(), reason=f"golden alignments are not at {ROOT}"),
    pytest.mark.once,
]


@functools.cache
def load(name: str):
    with gzip.open(ROOT / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def filled(size: int, strings: dict[int, str]) -> list[str | None]:
    return [strings.get(index) for index in range(size)]


@functools.cache
def pieces(name: str, size: int, golden: str) -> list[str | None]:
    """The vocabulary in id order; of one that is not shipped, the tokens that occur in the samples."""
    if (ROOT / "vocabs" / f"{name}.json.gz").exists():
        return load(f"vocabs/{name}")
    found = {}
    for sample in load(golden)["samples"]:
        found |= dict(zip(sample["base_ids"], sample["base_tokens"], strict=True))
    return filled(size, found)


def fusellm_pair(pair: str) -> tuple[dict, Vocabulary, Vocabulary, np.ndarray]:
    """(golden, source, target, vocabulary map) of a FuseLLM pair."""
    golden = load(f"fusellm_align_{pair}")
    base = list(pieces(golden["base"], 32000, f"fusellm_align_{pair}"))
    source = Vocabulary(pieces(golden["src"], 32000, ""), golden["src_marker"])
    mapping = golden["mapping_used"]
    if golden["base"] not in {path.name.split(".")[0] for path in (ROOT / "vocabs").iterdir()}:
        known = set(base)  # tokens that occur only as a result: any free id names them
        free = iter([index for index, piece in enumerate(base) if piece is None])
        for value in sorted(set(mapping.values()) - known):
            base[next(free)] = value
    target = Vocabulary(base, golden["base_marker"])
    ids = {piece: index for index, piece in enumerate(base) if piece is not None}
    keys = [(piece or "").replace(source.marker, target.marker) for piece in source.pieces]
    table = np.array([ids[mapping[key]] if key in mapping else -1 for key in keys], np.int32)
    return golden, source, target, table


@pytest.mark.parametrize("pair", "ABCD")
def test_fusellm_alignment(pair):
    golden, source, target, table = fusellm_pair(pair)
    literal = literal_ids(source, target)
    aligner = StringAligner(source, target, generation="fusellm")
    start = 0 if golden["bbpe_first_token_rule"] else None
    assert len(golden["samples"]) == 24
    for sample in golden["samples"]:
        found = aligner(np.array(sample["src_ids"]), np.array(sample["base_ids"]))
        assert [list(cell) for cell in found.path()] == sample["dtw"]["path"]
        assert found.cost == sample["dtw"]["cost"]
        ranges = zip(found.first, found.last, strict=True)
        assert [list(range(a, b + 1)) for a, b in ranges] == sample["dtw"]["base_to_src"]
        ids, logits = np.array(sample["src_topk_ids"]), np.array(sample["src_topk_logits"])
        for kind, vocab_map in (("soft", table), ("hard", literal)):
            choice = choose_fusellm(
                found, sample["src_ids"], sample["base_ids"], source, target, vocab_map,
                literal=literal, text_start=start, reference_bugs=True,
            )  # fmt: skip
            made = aligned_logits(ids, logits, choice, vocab_map, sample["base_ids"], generation="fusellm")
            wanted = sample[kind]
            assert made[1] == wanted["logits"], (sample["id"], kind)
            known = range(len(target.pieces)) if pair != "D" else set(golden_ids(golden))
            for mine, theirs in zip(made[0], wanted["ids"], strict=True):
                assert [i for i in mine if i in known] == [i for i in theirs if i in known], (sample["id"], kind)


def golden_ids(golden: dict) -> list[int]:
    """Ids whose strings the samples tell."""
    return [index for sample in golden["samples"] for index in sample["base_ids"]]


@pytest.mark.parametrize("pair", "EFGH")
def test_fusechat_alignment(pair):
    golden = load(f"fusechat_align_{pair}")
    source, target = (side(golden, which) for which in ("src", "base"))
    aligner, counter = StringAligner(source, target, generation="fusechat_v2"), PairCounter(len(source.pieces))
    warps = []
    for sample in golden["samples"]:
        found = aligner(np.array(sample["src_ids"]), np.array(sample["base_ids"]))
        ranges = zip(found.first, found.last, strict=True)
        assert [list(range(a, b + 1)) for a, b in ranges] == sample["base_to_src"], sample["id"]
        counter.add(found, sample["src_ids"], sample["base_ids"])
        warps.append(found)
    counts = counter.counts()
    wanted = golden["counts_coo"]
    assert [counts.target.tolist(), counts.source.tolist(), counts.count.tolist()] == [
        wanted["base"], wanted["src"], wanted["n"]
    ]  # fmt: skip
    table = statistics_map(counts, source, target, generation="fusechat_v2", reference_bugs=True)
    default = golden["default_base_id"]
    assert {str(u): int(v) for u, v in enumerate(table) if v != default} == {
        u: int(v) for u, v in golden["src_to_base"].items()
    }
    literal = literal_ids(source, target)
    table = np.where(literal >= 0, literal, table)
    for sample, found in zip(golden["samples"], warps, strict=True):
        choice = choose_fusechat(found, sample["src_ids"], sample["base_ids"], source, target)
        ids, logits = np.array(sample["src_topk_ids"]), np.array(sample["src_topk_logits"])
        made = aligned_logits(ids, logits, choice, table, sample["base_ids"], generation="fusechat_v2")
        assert list(made) == [sample["aligned"]["ids"], sample["aligned"]["logits"]], sample["id"]


def side(golden: dict, which: str) -> Vocabulary:
    name, size = golden[which], golden[f"{which}_vocab_size"]
    strings = pieces(name, size, "")
    decoded = dict(enumerate(strings))
    for sample in golden["samples"]:
        decoded |= dict(zip(sample[f"{which}_ids"], sample[f"{which}_decoded"], strict=True))
    roles = {role: id for role, id in zip(("bos", "eos"), golden[f"{which}_bos_eos"], strict=True) if id is not None}
    if which == "base":
        roles |= {} if golden["default_base_id"] == roles["eos"] else {"unk": golden["default_base_id"]}
    return Vocabulary(strings, golden[f"{which}_marker"], filled(size, decoded), roles)


@pytest.mark.parametrize("pair", "ABCD")
def test_min_ed_map(pair):
    golden = load(f"fusellm_vocab_{pair}")
    if pair == "D":  # the base vocabulary is not shipped
        base = sorted({(t["base_id"], t["base"]) for t in golden["tokens"]})
        target = Vocabulary(filled(golden["n_base"], dict(base)), golden["base_marker"])
    else:
        target = Vocabulary(load(f"vocabs/{golden['base']}"), golden["base_marker"])
    tokens = golden["tokens"]
    source = Vocabulary([token["src"] for token in tokens], golden["src_marker"])
    table = min_ed_map(source, target, workers=2)
    for token, found in zip(tokens, table.tolist(), strict=True):
        if pair != "D":
            assert found == token["base_id"], token
            assert target.pieces[found] == token["base"]
    for token in tokens[:40]:
        distance, tied = nearest_tokens(token["key"], target)
        assert distance <= token["distance"] if pair == "D" else distance == token["distance"]
        if pair != "D" and not token["exact"]:
            assert (len(tied), tied[:16].tolist()) == (token["n_ties"], token["first_tied_ids"])


def test_whole_min_ed_map():
    golden = load("fusellm_vocab_B")
    source = Vocabulary(load(f"vocabs/{golden['src']}"), golden["src_marker"])
    target = Vocabulary(load(f"vocabs/{golden['base']}"), golden["base_marker"])
    table = min_ed_map(source, target, workers=2)
    keys = [piece.replace(source.marker, target.marker) for piece in source.pieces]
    mapping = {key: target.pieces[index] for key, index in zip(keys, table, strict=True)}
    text = json.dumps(mapping, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == golden["full_mapping_sha256"]


def test_packing():
    golden = load("fusellm_packing")
    blocks = list(pack_rows(golden["docs"], block_size=golden["model_max_length"], batch=golden["map_batch_size"]))
    assert blocks == golden["blocks"]
