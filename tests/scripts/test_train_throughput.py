"""benchmarks/train_throughput.py: which device and model it takes, and what it counts, without PyTorch and a GPU."""

import dataclasses
import importlib.util
import math
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from fusejax.models import ModelConfig, abstract_params, count_params
from fusejax.models.flops import flops_per_token
from fusejax.train.optimizer import make_optimizer
from fusejax.train.step import init_train_state
from tests.paths import ROOT

A100 = "NVIDIA A100-SXM4-40GB"


@pytest.fixture
def script(monkeypatch):
    """The script, with stand-ins for PyTorch without a GPU and for transformers."""
    cuda = SimpleNamespace(is_available=lambda: False, get_device_name=lambda index: A100)
    stand_in = SimpleNamespace(cuda=cuda, get_num_threads=lambda: 2, nn=SimpleNamespace(Module=object))
    monkeypatch.setitem(sys.modules, "torch", stand_in)
    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace())
    spec = importlib.util.spec_from_file_location("train_throughput", ROOT / "benchmarks" / "train_throughput.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "train_throughput", module)
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # so that what the script sets by default is put back
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    spec.loader.exec_module(module)
    return module


def _devices(script, monkeypatch, ours, theirs):
    platform = "gpu" if ours.startswith("NVIDIA") else ours.lower()
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(platform=platform, device_kind=ours)])
    monkeypatch.setattr(script.torch.cuda, "is_available", lambda: theirs is not None)
    monkeypatch.setattr(script.torch.cuda, "get_device_name", lambda index: theirs)


def test_both_libraries_use_one_device(script, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    _devices(script, monkeypatch, A100, A100)
    assert script.choose_case() is script.GPU
    _devices(script, monkeypatch, "cpu", None)
    assert script.choose_case() is script.PROCESSOR
    for ours, theirs, said in (
        (A100, None, f"JAX computes on {A100}, PyTorch on a processor"),
        (A100, "NVIDIA L4", "PyTorch on NVIDIA L4"),
        ("TPU v4", None, "JAX computes on TPU v4"),
        ("cpu", A100, "PyTorch has a GPU and JAX has none"),
    ):
        _devices(script, monkeypatch, ours, theirs)
        with pytest.raises(SystemExit, match=said):
            script.choose_case()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert script.choose_case() is script.PROCESSOR


def test_the_model_for_gpus_is_of_the_size_that_is_said(script):
    model = script.GPU.model
    assert 1.0e9 < count_params(model) < 1.2e9 and model.dtype == "bfloat16" and script.GPU.shape == (2, 2048)
    optimizer = make_optimizer(1e-3, decay_mask=script.decay_mask(model))
    state = jax.eval_shape(lambda params: init_train_state(params, optimizer), abstract_params(model))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert held < 14e9, "weights and moments in float32"


def test_the_share_of_the_peak_is_of_products_in_bfloat16(script, monkeypatch):
    _devices(script, monkeypatch, A100, A100)
    expected = 1000.0 * flops_per_token(script.GPU.model, 2048) / 312e12
    assert script.peak_share(script.GPU, 1000.0) == pytest.approx(expected)
    assert script.peak_share(script.PROCESSOR, 1000.0) is None, "float32 against that peak would flatter nobody"
    _devices(script, monkeypatch, "cpu", None)
    assert script.peak_share(script.GPU, 1000.0) is None


def test_rows_are_there_after_every_round(script, monkeypatch):
    times, seen = {}, []
    calls = {script.TORCH: lambda: 0.0, script.CLM: lambda: 0.0}
    script.measure(calls, 2, times, lambda: seen.append(script.rows_of(script.PROCESSOR, times, {script.CLM: 5})))
    assert [[row["rounds"] for row in rows] for rows in seen] == [[1, 1], [2, 2]]
    last = {row["implementation"]: row for row in seen[-1]}
    assert last[script.CLM]["peak_bytes"] == 5 and last[script.TORCH]["peak_bytes"] is None
    times = {script.TORCH: ([2.0, 2.0], [9.0, 9.0]), script.CLM: ([1.0], [1.0])}  # on a GPU one after the other
    assert script.rows_of(script.GPU, times, {})[1]["ratio"] == 2.0
    times[script.CLM] = ([1.0, 1.0], [1.0, 3.0])
    assert script.rows_of(script.PROCESSOR, times, {})[1]["ratio"] == 6.0


def test_the_weights_and_the_batch_are_those_of_the_model(script):
    model = ModelConfig(64, 16, 24, 2, 4, 2, max_positions=8)
    case = dataclasses.replace(script.PROCESSOR, model=model, rows=2)
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), abstract_params(model))
    weights = script.torch_weights(model, params)
    assert weights["model.layers.1.self_attn.k_proj.weight"].shape == (8, 16)
    assert weights["model.layers.0.mlp.down_proj.weight"].shape == (16, 24)
    assert sum(math.prod(x.shape) for x in weights.values()) == count_params(model)
    batch, groups = script.make_batch(case, np.random.default_rng(0))
    assert batch.tokens.shape == (2, 8) and groups.offsets.shape[0] == 1
    ids = np.asarray(batch.targets.ids).reshape(-1, script.K)
    assert all(len(set(row)) == script.K for row in ids.tolist())
