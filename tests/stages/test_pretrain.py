"""Models that a run makes first: from configuration to result, again, changed, refused, interrupted, and masked."""

import json
import shutil

import jax
import numpy as np
import pytest

from fusejax.config import RunConfig
from fusejax.errors import InputError
from fusejax.io.hf import load_hf_model, save_hf_model
from fusejax.io.manifest import read_manifest
from fusejax.io.models import open_model
from fusejax.io.tokenizers import load_tokenizer
from fusejax.models import ModelConfig, init_params
from fusejax.stages.context import Run
from fusejax.stages.pretrain import Encoded
from fusejax.stages.pretrain_models import pretrain_models
from fusejax.stages.run import command, run_stages
from tests.stages import tiny

SHAPE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
PACE = {"batch_size": 4, "seq_len": 32, "learning_rate": 1e-2, "checkpoint_every": 2, "max_steps": 5}
NAMES = ("pivot", "more", "qwen")


def _talks(path, count: int, *, seed: int) -> str:
    said = iter(tiny.texts(2 * count, seed=seed))
    rows = [{"id": f"{seed}-{n}", "from": "ab"[n % 2], "ask": next(said), "say": next(said)} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def make_config(root, **changes) -> RunConfig:
    """A Llama with a tokenizer of its own, a Qwen2 on conversations, and a Llama that goes on from the first."""
    text = str(tiny.write_jsonl(root / "text.jsonl", tiny.texts(80, seed=1)))
    talks = {"path": _talks(root / "talks.jsonl", 60, seed=2), "prompt_fields": ["ask"], "response_field": "say"}
    if not (root / "tokenizer").exists():
        tiny.make_qwen_tokenizer(root / "tokenizer")
    own = {"kind": "spm_bpe", "vocab_size": 330}
    target = {"shape": SHAPE, "tokenizer": own, "text": [{"path": text, "limit": 40}], **PACE}
    qwen = {"shape": SHAPE | {"architecture": "qwen2"}, "tokenizer": str(root / "tokenizer"), **PACE, "epochs": 2}
    qwen["text"] = [talks | {"limit": 30, "where": {"from": "a"}}, {"path": text, "limit": 5, "domain": "plain"}]
    more = {"start": str(root / "models" / "pivot"), "text": [talks | {"skip": 30}], **PACE}
    made = tiny.make_config(root).model_dump(mode="json")
    made["target"] = {"model": str(root / "models" / "pivot"), "pretrain": target}
    made["sources"] = [
        {"model": str(root / "models" / "more"), "pretrain": more},
        {"model": str(root / "models" / "qwen"), "pretrain": qwen},
    ]
    made["corpus"]["train"] = [{"path": text, "skip": 40, "domain": "words"}]
    made["corpus"]["chat_template"] = "openchat_3.5"
    made["fusions"] = [{"name": "fused"}]
    return RunConfig.model_validate(made | {"merge": None, "evaluate": {"context": 32, "batch_tokens": 128}} | changes)


def _copied(root, place) -> RunConfig:
    """The same configuration elsewhere, its models made already."""
    for name in ("models", "tokenizer"):
        if (root / name).exists():
            shutil.copytree(root / name, place / name)
    return make_config(place)


def _with(config: RunConfig, name: str, **changes) -> RunConfig:
    """The configuration with other options of one model's pretraining."""
    made = config.model_dump(mode="json")
    for ref in (made["target"], *made["sources"]):
        if ref["name"] == name:
            ref["pretrain"] |= changes
    return RunConfig.model_validate(made)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("pretrain")
    config = make_config(root)
    run_stages(config, ("pretrain",))
    return root, config


def test_models_are_made_in_order(made):
    root, _ = made
    pivot, more, qwen = (open_model(root / "models" / name) for name in NAMES)
    assert (pivot.config.architecture, qwen.config.architecture) == ("llama", "qwen2")
    assert qwen.config.attention_bias
    assert (pivot.config.intermediate_size, pivot.config.max_positions) == (48, 32)
    assert read_manifest(more.directory).parents == {"start": pivot.fingerprint}
    assert load_tokenizer(more.directory).fingerprint == load_tokenizer(pivot.directory).fingerprint
    assert all(read_manifest(root / "models" / name).facts["steps"] == 5 for name in NAMES)
    assert not list((root / "models").glob(".*.pretraining"))
    learned = np.abs(more.params["embed"]["embedding"] - pivot.params["embed"]["embedding"])
    assert 0 < learned.max() < 0.1, "it goes on from the pivot, not from random weights"


def test_what_stands_is_left_alone(made):
    root, config = made
    before = {path: path.stat().st_mtime_ns for path in (root / "models").rglob("*") if path.suffix != ".lock"}
    run_stages(config, ("pretrain", "prepare"))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_another_setting_makes_a_model_again_and_what_goes_on_from_it(made, tmp_path, capsys):
    root, _ = made
    config = _copied(root, tmp_path)
    before = {name: read_manifest(tmp_path / "models" / name).fingerprint for name in NAMES}
    found = pretrain_models(Run(config)).values()
    assert {manifest.fingerprint for manifest in found} == set(before.values()), "the place has no influence"
    pretrain_models(Run(_with(config, "pivot", seed=3)))
    after = {name: read_manifest(tmp_path / "models" / name).fingerprint for name in NAMES}
    assert {name for name in NAMES if before[name] != after[name]} == {"pivot", "more"}
    assert "settings or inputs have changed, making it again" in capsys.readouterr().err


@pytest.mark.slow
def test_fusechat_from_random_weights_to_merged_targets(made, tmp_path):
    config = _copied(made[0], tmp_path).model_dump(mode="json")
    talks = {"path": str(tmp_path / "talks.jsonl"), "prompt_fields": ["ask"], "response_field": "say"}
    asked = talks | {"path": _talks(tmp_path / "test.jsonl", 16, seed=5), "limit": 8}
    config["corpus"] |= {"train": [talks | {"domain": "chat", "skip": 30}], "valid_fraction": 0.0}
    config["corpus"]["test"] = [asked | {"domain": name, "where": {"from": name}} for name in "ab"]
    config["fusions"] = {"pairwise": {"window_bytes": 32}}
    few = {"density": 0.5}
    config["merge"] = [{"method": "sce"}, {"method": "dare_linear", "parameters": few}, {"method": "slerp"}]
    run_stages(RunConfig.model_validate(config))
    table = json.loads((tmp_path / "run" / "result.json").read_text())["bits_per_byte"]
    merged = ["merged-sce", "merged-dare_linear", "merged-slerp"]
    assert list(table) == ["source:more", "source:qwen", "target", "clm", "more", "qwen", *merged, "ensemble"]
    assert all(set(row) == {"a", "b", "mean"} for row in table.values())
    assert all(table[name]["mean"] < table["target"]["mean"] for name in ("clm", "more", "qwen", *merged))
    heads = [open_model(tmp_path / "run" / "models" / name).params["embed"]["embedding"] for name in merged]
    assert not any(np.array_equal(a, b) for i, a in enumerate(heads) for b in heads[:i])
    assert (tmp_path / "run" / "export" / "config.json").is_file()


def test_a_directory_of_somebody_else_is_refused_before_anything_is_done(tmp_path):
    config = make_config(tmp_path)
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    (tmp_path / "models" / "qwen" / "weights").write_text("years of work")
    with pytest.raises(InputError, match=r"qwen is there and was not made by `fusejax pretrain`"):
        run_stages(config)
    assert (tmp_path / "models" / "qwen" / "weights").read_text() == "years of work"
    assert not (tmp_path / "models" / "pivot").exists()
    shutil.rmtree(tmp_path / "models" / "qwen")
    shutil.copytree(tmp_path / "a", tmp_path / "models" / "qwen")  # a model, of another origin
    with pytest.raises(InputError, match=r"was not made by `fusejax pretrain`"):
        run_stages(config)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("qwen", {"shape": SHAPE | {"architecture": "qwen3"}}, r"qwen: pretrain.shape: unknown architecture 'qwen3'"),
        ("qwen", {"shape": SHAPE | {"sliding_window": 8}}, None),
        ("pivot", {"shape": SHAPE | {"sliding_window": 8}}, r"llama has no sliding window"),
        ("qwen", {"tokenizer": "no/such/place"}, r"pretrain.tokenizer no/such/place: no directory of a tokenizer"),
        ("qwen", {"text": [{"path": "missing.jsonl"}]}, r"missing.jsonl does not exist"),
        ("more", {"seq_len": 64}, r"more: pretrain.seq_len is 64, the model has 32 positions"),
    ],
)
def test_mistakes_are_told_before_any_work(tmp_path, name, change, message):
    config = _with(make_config(tmp_path), name, **change)
    if message is None:
        return
    with pytest.raises(InputError, match=message):
        run_stages(config, ("pretrain",))
    assert not (tmp_path / "models").exists()


def test_a_stage_that_comes_too_early_says_so(tmp_path):
    with pytest.raises(InputError, match=r"models/more is not made yet; run `fusejax pretrain`"):
        run_stages(make_config(tmp_path), ("prepare", "capture"))


def test_what_is_going_to_be_done_is_told_without_models(tmp_path):
    from fusejax.config import save_config

    save_config(make_config(tmp_path), tmp_path / "c.yaml")
    told = command("run", [str(tmp_path / "c.yaml"), "--dry-run"])
    steps = [step["what"] for step in told.data["dry_run"] if step["stage"] == "pretrain"]
    assert [step.split(":")[0] for step in steps] == ["pivot", "more", "qwen"]
    assert "qwen2, 2 layers of 16, 320 tokens" in steps[2]
    assert set(told.data["predicted_capture_bytes"]) == {"qwen"}, "the others' tokenizers are not there yet"
    assert not (tmp_path / "models").exists()


def test_an_interrupted_pretraining_goes_on(made, tmp_path, monkeypatch):
    root, _ = made
    config = _copied(root, tmp_path)
    shutil.rmtree(tmp_path / "models" / "pivot")

    from fusejax.io.checkpoint import StateWriter

    saved = StateWriter.save

    def die_after_two(self, step, *rest, **options):
        saved(self, step, *rest, **options)
        self.wait()
        raise KeyboardInterrupt

    monkeypatch.setattr(StateWriter, "save", die_after_two)
    with pytest.raises(KeyboardInterrupt):
        run_stages(config, ("pretrain",))
    monkeypatch.undo()
    work = tmp_path / "models" / ".pivot.pretraining"
    assert (work / "tokenizer" / "manifest.json").is_file()
    assert not (tmp_path / "models" / "pivot").exists()
    began = []
    monkeypatch.setattr("fusejax.stages.pretrain_models.train_tokenizer", lambda *_, **__: began.append(1))
    run_stages(config, ("pretrain",))
    assert not began, "the tokenizer of before is taken"
    for a, b in zip(
        jax.tree.leaves(open_model(tmp_path / "models" / "pivot").params),
        jax.tree.leaves(open_model(root / "models" / "pivot").params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_of_conversations_the_answers_are_trained(made, monkeypatch):
    root, config = made
    seen = {}
    monkeypatch.setattr(
        "fusejax.stages.pretrain_models.pretrain",
        lambda directory, _, documents, **rest: seen.setdefault(directory.name, Encoded(documents)),
    )
    monkeypatch.setattr("fusejax.stages.pretrain_models.finished_model", lambda *_, **__: None)
    pretrain_models(Run(config))
    assert "mask" not in seen["pivot"][0].arrays
    rows = [json.loads(line) for line in (root / "talks.jsonl").read_text().splitlines()]
    tokenizer = load_tokenizer(root / "tokenizer")
    talks = [seen["qwen"][i].arrays for i in range(30)]
    assert len(seen["qwen"]) == 35
    for row, arrays in zip([row for row in rows if row["from"] == "a"], talks, strict=False):
        said = b"".join(tokenizer.token_bytes[i] or b"" for i in arrays["labels"][arrays["mask"] == 1])
        assert said.decode().strip() == row["say"].strip()
    assert all(seen["qwen"][i].arrays["mask"].all() for i in range(30, 35)), "plain text is trained whole"
    assert seen["qwen"].trained_tokens < sum(len(arrays["tokens"]) for arrays in talks)
    assert len(seen["more"]) == 30, "after the thirty that are skipped"


def test_a_qwen2_from_scratch_goes_to_hugging_face_form_and_back(made, tmp_path):
    root, _ = made
    made = open_model(root / "models" / "qwen")
    save_hf_model(tmp_path / "hf", made.config, made.params, tokenizer_dir=made.directory)
    config, params = load_hf_model(tmp_path / "hf")
    assert config == made.config
    for a, b in zip(jax.tree.leaves(made.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    fresh = init_params(ModelConfig(300, 16, 32, 1, 2, architecture="qwen2"), jax.random.key(0))
    attention = fresh["layers"]["attention"]
    assert not np.asarray(attention["q"]["bias"]).any() and "bias" not in attention["o"]
    assert any(np.asarray(bias).any() for bias in [made.params["layers"]["attention"]["q"]["bias"]]), "it is trained"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": None}, r"needs `shape` and `tokenizer`, or `start`"),
        ({"start": "x"}, r"shape and tokenizer come from the model of `start`"),
        ({"text": []}, r"at least 1"),
        ({"text": [{"path": "embedded", "skip": 3}]}, r"choose records of files and datasets"),
        ({"text": [{"path": "a", "where": {"x": None}}]}, r"where 'x' must be"),
    ],
)
def test_configurations_that_cannot_be_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        _with(make_config(tmp_path), "pivot", **change)


def test_two_ways_to_make_one_directory_and_circles_are_refused(tmp_path):
    made = make_config(tmp_path).model_dump(mode="json")
    one, other = made["sources"]
    with pytest.raises(ValueError, match=r"make .*more in different ways"):
        RunConfig.model_validate(made | {"sources": [one, other | {"model": f"{tmp_path}/x/../models/more"}]})
    back = {"start": one["model"], "text": [{"path": "a"}]}
    with pytest.raises(ValueError, match=r"in a circle: pivot -> more -> pivot"):
        RunConfig.model_validate(made | {"target": made["target"] | {"pretrain": back}})
