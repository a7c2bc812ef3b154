"""Pairwise fusion of conversations: one target per source, each made alone; one more source touches only its own."""

import json

import pytest

from fusejax.config import RunConfig, load_config, save_config
from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.io.store import RecordReader
from fusejax.stages.lock import exclusive
from fusejax.stages.run import PER_FUSION, STAGES, command, run_stages
from tests.paths import ROOT
from tests.stages import tiny

_BRIEF = {
    "output": "runs/x",
    "target": "models/pivot",
    "sources": ["models/a", "models/b"],
    "corpus": {"train": [{"path": "a.jsonl"}]},
}


def _fusions(value):
    return RunConfig.model_validate(_BRIEF | {"fusions": value}).fusions


def test_pairwise_in_short_is_a_list_of_pairs():
    found = _fusions("pairwise")
    assert [(f.name, f.sources, f.include_target) for f in found] == [("a", ("a",), True), ("b", ("b",), True)]
    written = [{"name": n, "sources": [n], "include_target": True, "score": "token_ce"} for n in "ab"]
    assert _fusions({"pairwise": {"score": "token_ce"}}) == _fusions(written)
    multi = _fusions({"pairwise": None, "multi": True})[-1]
    assert (multi.name, multi.sources, multi.include_target) == ("multi", (), True)


def test_a_stored_configuration_holds_the_list(tmp_path):
    config = RunConfig.model_validate(_BRIEF | {"fusions": "pairwise"})
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("fusions", "message"),
    [
        ("pairwize", "must be a list of fusions, `pairwise`"),
        ({"multi": True}, "must be a list of fusions, `pairwise`"),
        ({"pairwise": {}, "multi": 1}, "must be a list of fusions, `pairwise`"),
        ({"pairwise": {}, "mutli": True}, "unknown key 'mutli'. Did you mean 'multi'"),
        ({"pairwise": {"sources": ["a"]}}, "pairwise fusion sets sources itself"),
        ({"pairwise": {"methd": "min_ce"}}, r"fusions.0.methd: unknown key. Did you mean 'method'"),
    ],
)
def test_mistakes_in_the_short_form_are_named(tmp_path, fusions, message):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(_BRIEF | {"fusions": fusions}))
    with pytest.raises(InputError, match=message):
        load_config(path)


def test_with_wrong_sources_only_these_are_told(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(_BRIEF | {"fusions": "pairwise", "sources": [{"nam": "a"}]}))
    with pytest.raises(InputError, match=r"sources\.0") as raised:
        load_config(path)
    assert "fusions" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "sources", "method"),
    [("fusechat_openchat_7b", 2, "varm"), ("fusechat_v2_openchat_7b", 5, "sce")],
)
def test_the_recipes_of_fusechat_are_the_published_ones(name, sources, method):
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    train, loss = config.train, config.loss
    assert len(config.sources) == len(config.fusions) == sources  # and the pivot
    assert all(f.include_target and f.method == "min_ce" and f.window_bytes is None for f in config.fusions)
    assert (loss.clm_weight, loss.fusion_weight, loss.temperature, loss.divergence) == (0.9, 0.1, 1.0, "ce")
    assert (train.epochs, train.batch_size, train.seq_len, config.capture.top_k) == (3, 128, 2048, 10)
    assert (train.learning_rate, train.schedule, train.warmup_ratio, train.clip_norm) == (5e-6, "cosine", 0.03, 1.0)
    assert (train.adam_b1, train.adam_b2, train.weight_decay) == (0.9, 0.999, 0.0)
    assert [merge.method for merge in config.merge] == [method]
    assert config.corpus.chat_template == "openchat_3.5"


def _talks(count: int) -> list[dict]:
    said = iter(tiny.texts(2 * count, seed=9))
    roles = ("user", "assistant")
    return [{"id": str(i), "messages": [{"role": r, "content": next(said)} for r in roles]} for i in range(count)]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("pairwise")


def _config(root, sources: str, **changes) -> RunConfig:
    """A pivot and sources with tokenizers of their own, on conversations."""
    talks = root / "talks.jsonl"
    if not talks.is_file():
        talks.write_text("".join(json.dumps(talk) + "\n" for talk in _talks(40)), encoding="utf-8")
    made = tiny.make_config(root).model_dump(mode="json")
    made["sources"] = [str(root / name) for name in sources]
    made["corpus"]["train"] = [{"path": str(talks), "domain": "chat", "messages_field": "messages"}]
    made["corpus"]["chat_template"] = "openchat_3.5"
    made["fusions"] = {"pairwise": {"window_bytes": None}}
    made["train"] |= {"max_steps": 2, "baseline": False}
    return RunConfig.model_validate(made | changes)


def _stamps(root):
    return {str(p.parent.relative_to(root / "run")): p.stat().st_mtime_ns for p in (root / "run").rglob(MANIFEST)}


def test_sources_are_fused_one_by_one_and_another_touches_only_its_own(root):
    stages = ("prepare", "capture", "align", "fuse")
    run_stages(_config(root, "a"), stages, only=("a",))
    alone = _stamps(root)
    shared = {"corpus", "captured/target", "aligned/target"}
    assert set(alone) == shared | {"captured/a", "aligned/a", "fused/a"}
    wins = read_manifest(root / "run" / "fused" / "a").facts["wins"]
    assert list(wins) == ["target", "a"] and sum(wins.values()) > 0
    for record in RecordReader(root / "run" / "fused" / "a"):
        assert len({int(p) for p in record.arrays["partition"].ravel() if p >= 0}) <= 1  # one model per conversation

    run_stages(_config(root, "ab"), stages)
    after = _stamps(root)
    own = {"captured/b", "aligned/b", "fused/b"}
    assert {name for name in after if after[name] != alone.get(name)} == own


@pytest.mark.slow
def test_another_source_merges_and_evaluates_only_what_is_new(tmp_path):
    run_stages(_config(tmp_path, "a"), PER_FUSION, only=("a",))
    trained = _stamps(tmp_path)
    run_stages(_config(tmp_path, "a"))
    before = _stamps(tmp_path)
    assert "models/a" in trained and all(before[name] == stamp for name, stamp in trained.items())
    run_stages(_config(tmp_path, "ab"))
    after = _stamps(tmp_path)
    own = {"captured/b", "aligned/b", "fused/b", "models/b", "scores/b", "scores/source-b"}
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == own | {"models/merged", "scores/merged", "export"}
    table = json.loads((tmp_path / "run" / "result.json").read_text())["bits_per_byte"]
    assert list(table) == ["source:a", "source:b", "target", "a", "b", "merged", "ensemble"]


def test_runs_of_different_fusions_go_side_by_side(tmp_path):
    with exclusive(tmp_path, shared=True), exclusive(tmp_path, shared=True), exclusive(tmp_path, name=".fusion-a.lock"):
        with pytest.raises(InputError, match="working in"), exclusive(tmp_path):
            pass
        with pytest.raises(InputError, match="working in"), exclusive(tmp_path, name=".fusion-a.lock"):
            pass
    with exclusive(tmp_path), pytest.raises(InputError, match="working in"), exclusive(tmp_path, shared=True):
        pass


def test_only_takes_fusions_and_the_stages_that_one_needs(root):
    path = root / "config.yaml"
    save_config(_config(root, "ab"), path)
    with pytest.raises(InputError, match="--only names 'c'"):
        command("run", [str(path), "--only", "c", "--dry-run"])
    with pytest.raises(InputError, match="merge need every fusion"):
        command("run", [str(path), "--only", "a", "--stages", "train,merge"])
    with pytest.raises(InputError, match="--only names none"):
        command("run", [str(path), "--only", ","])
    plan = command("run", [str(path), "--only", "b", "--dry-run"]).data["dry_run"]
    assert {step["stage"] for step in plan} == set(PER_FUSION) - {"pretrain"} < set(STAGES)
    assert [step["what"].split(":")[0] for step in plan if step["stage"] in ("capture", "train")] == [
        "b",
        "target",
        "b",
    ]
