"""Mistakes in late stages are told before the first one."""

import json
import os
import time
from types import SimpleNamespace

import pytest

from fusejax.cli import main
from fusejax.config import load_config, save_config
from fusejax.errors import InputError
from fusejax.stages import disk_check, preflight
from fusejax.stages.context import Run
from fusejax.stages.disk_check import disk_need
from fusejax.stages.run import run_stages
from tests.stages.tiny import make_config


def free_bytes(monkeypatch, free: int) -> None:
    usage = SimpleNamespace(total=0, used=0, free=free)
    monkeypatch.setattr(disk_check.shutil, "disk_usage", lambda path: usage)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("train", {"seq_len": 128}, r"seq_len is 128, but .*target has 64 positions"),
        ("mesh", {"data": 64}, r"`mesh`: .*needs 64 devices"),
        ("mesh", {"tensor": 8}, r"(?s)`mesh`: .*kv_heads = 1 over tensor = 8"),
        ("memory", {"attention": "cudnn"}, r"cudnn computes in bfloat16 or float16, got float32"),
    ],
)
def test_a_mistake_of_a_late_stage_is_told_first(tmp_path, section, change, message):
    config = make_config(tmp_path)
    part = getattr(config, section).model_copy(update=change)
    for weights in list(tmp_path.rglob("*.safetensors")):
        weights.write_bytes(b"")  # whoever read them would say so
    began = time.process_time()
    with pytest.raises(InputError, match=message):
        run_stages(config.model_copy(update={section: part}))
    assert time.process_time() - began < 10
    assert not (tmp_path / "run" / "corpus").exists()


def test_a_directory_that_cannot_be_written_is_told_first(tmp_path):
    config = make_config(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write to .*file/run: .*set `output` elsewhere"):
        run_stages(config.model_copy(update={"output": str(tmp_path / "file" / "run")}))


def test_mistakes_of_all_merges_are_told_first(tmp_path):
    merges = [
        {"method": "scee"},
        {"parameters": {"select_topp": 1}},
        {"method": "slerp", "targets": ["fused", "mixed", "clm"]},
        {"name": "two", "method": "slerp", "targets": ["fused", "mixed"]},
    ]
    config = make_config(tmp_path, merge=merges)
    with pytest.raises(InputError) as raised:
        run_stages(config)
    lines = str(raised.value).splitlines()
    assert len(lines) == 3
    assert "merge 'merged-scee': unknown merge method 'scee'" in lines[0]
    assert "merge 'merged-sce': " in lines[1] and "Did you mean 'select_topk'" in lines[1]
    assert "takes 1 to 2 targets, got 3. It was given fused, mixed, clm; choose with `targets`" in lines[2]
    assert not (tmp_path / "run" / "corpus").exists()


def test_a_target_that_is_not_trained_is_told_before_merging(tmp_path):
    config = make_config(tmp_path, merge=[{"targets": ["fused"]}, {"name": "x", "targets": ["fused", "clm"]}])
    with pytest.raises(InputError, match=r"'merged-sce' takes fused: train first.*\n.*'x' takes fused, clm: train"):
        run_stages(config, ("merge",))


def test_a_target_without_tokenizer_is_told_before_capture(tmp_path):
    config = make_config(tmp_path)
    for path in (tmp_path / "target").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match=r"target has no tokenizer.json"):
        run_stages(config)
    assert not (tmp_path / "run" / "corpus").exists()


def test_a_large_model_is_judged_by_its_configuration_alone(tmp_path, monkeypatch):
    """7e9 parameters, of which there is no byte: what they need of the disk and of the mesh is told within seconds."""
    config = make_config(tmp_path)
    large = json.loads((tmp_path / "target" / "config.json").read_text())
    large |= {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    large |= {"num_key_value_heads": 32, "head_dim": 128}
    (tmp_path / "target" / "config.json").write_text(json.dumps(large))
    for path in (tmp_path / "target").glob("*.safetensors"):
        path.unlink()
    free_bytes(monkeypatch, 100 * 10**9)
    began = time.monotonic()
    with pytest.raises(InputError, match=r"\(train states 23\d\.\d, models \d+\.\d\); .* has 100\.0 GB free"):
        run_stages(config, ("train",))
    free_bytes(monkeypatch, 10**12)
    with pytest.raises(InputError, match=r"(?s)`mesh`: .*heads = 32 over tensor = 5"):
        run_stages(config.model_copy(update={"mesh": config.mesh.model_copy(update={"tensor": 5})}), ("train",))
    assert time.monotonic() - began < 10


def test_a_disk_that_is_too_small_is_told_by_the_command_line_before_prepare(tmp_path, monkeypatch, capsys):
    """Counted is what is still to be made, of the stages that are to run."""
    save_config(make_config(tmp_path), tmp_path / "run.yaml")
    words = ["run", str(tmp_path / "run.yaml")]
    free_bytes(monkeypatch, 1_500_000)
    for more in ([], ["--dry-run"]):
        assert main(words + more) == 2
        told = "".join(capsys.readouterr())
        assert all(
            part in told
            for part in (
                "captured 0.",
                "aligned 0.",
                "fused 0.",
                "has 0.0 GB free",
                "make room" if more else "Make room",
            )
        )
        assert not (tmp_path / "run" / "corpus").exists()
    assert main([*words, "--stages", "prepare", "--json"]) == 0
    (tmp_path / "run" / "captured").mkdir()
    (tmp_path / "run" / "captured" / "shard").write_bytes(bytes(100_000))  # done
    free_bytes(monkeypatch, 1000)
    need = disk_need(Run(load_config(tmp_path / "run.yaml")), ("capture", "align"))
    assert need.parts["A1 captured"] < need.parts["A3 aligned"] and not need.fits


def test_a_flag_that_ends_the_process_is_told_before_prepare(tmp_path, monkeypatch, capsys):
    save_config(make_config(tmp_path), tmp_path / "run.yaml")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2 --xla_gpu_no_such_flag=1")
    for words in (["run", str(tmp_path / "run.yaml")], ["env", "--flags", "cpu"]):
        began = sum(os.times()[:4])  # of the processes that try flags, too
        assert main(words) == 2
        assert sum(os.times()[:4]) - began < 10
        out, err = capsys.readouterr()
        assert "--xla_gpu_no_such_flag=1 in XLA_FLAGS: unknown to this jaxlib" in err
        assert "device_count" not in err and "export" not in out
    assert not (tmp_path / "run" / "corpus").exists()


def test_wandb_that_is_not_installed_is_told_first(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None)
    config = make_config(tmp_path)
    log = config.log.model_copy(update={"wandb_project": "fusion"})
    with pytest.raises(InputError, match="pip install wandb"):
        run_stages(config.model_copy(update={"log": log}), ("train",))


@pytest.mark.parametrize("url", ["http://me:canary@host/v1", "http://host/v1?key=canary"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(tmp_path, url):
    (tmp_path / "c.yaml").write_text(
        f"output: x\ntarget: t\nsources: [{{model: m, url: '{url}'}}]\ncorpus: {{train: [{{path: a}}]}}\n"
    )
    with pytest.raises(InputError, match="url") as caught:
        load_config(tmp_path / "c.yaml")
    assert "canary" not in str(caught.value)
