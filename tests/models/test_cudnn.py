"""cuDNN's attention: lowered for CUDA by JAX's own path, computed by plain operations in its place, and refused."""

import contextlib
import dataclasses
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.config import RunConfig
from fusejax.errors import InputError
from fusejax.models import ModelConfig, abstract_params, cudnn, hidden_states, param_table
from fusejax.models.cudnn import check_cudnn, suits_cudnn
from fusejax.models.layers import attention, attention_mask
from fusejax.parallel import batch_sharding, make_mesh, param_shardings
from fusejax.parallel.sharding import Layout

PLAIN = jax.nn.dot_product_attention
MODEL = ModelConfig(64, 256, 64, 2, 4, 2, head_dim=64, architecture="mistral", dtype="bfloat16")
A100 = SimpleNamespace(platform="gpu", device_kind="NVIDIA A100", compute_capability="8.0")


@pytest.fixture
def gpus(monkeypatch):
    """What the program is for, as far as our choice and JAX's look: A100s and a cuDNN. It can be lowered, not run."""
    inner = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo", reason="JAX has moved its path to cuDNN")
    monkeypatch.setattr(inner, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(inner, "check_compute_capability", lambda least: float(least) <= 8.0)
    monkeypatch.setattr(inner, "is_cuda_compute_capability_equal", lambda which: float(which) == 8.0)
    monkeypatch.setattr(cudnn, "_device", lambda mesh: A100)
    cudnn._agrees.cache_clear()
    yield
    cudnn._agrees.cache_clear()


def lowered(config, sizes, length=128):
    """The text of the gradient of a model for CUDA."""
    mesh = make_mesh(**sizes) if sizes else None
    batch = jax.ShapeDtypeStruct((4, length), jnp.int32, sharding=mesh and batch_sharding(mesh))
    params = abstract_params(config)
    if mesh is not None:
        where = param_shardings(param_table(config), mesh)
        params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, where)

    def loss(params, *given):
        return jnp.sum(hidden_states(params, config, *given, mesh=mesh).astype(jnp.float32))

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss)).trace(params, batch, batch, batch).lower(lowering_platforms=("cuda",)).as_text()


def calls_of(text):
    """(name, settings, types of the arguments) of every call of cuDNN."""
    pattern = r'custom_call @__cudnn\$(\w+)\(.*?backend_config = "(.*?)", operand.*? : \((.*?)\) ->'
    found = [
        (name, config.replace("\\22", '"'), re.findall(r"tensor<(.*?)>", types))
        for name, config, types in re.findall(pattern, text)
    ]
    assert len(found) == text.count("__cudnn$"), "the pattern fits all of them"
    return found


@pytest.mark.parametrize("sizes", [None, {"fsdp": 2, "tensor": 2}])
@pytest.mark.parametrize("attention", ["cudnn", "cudnn_rows"])
def test_a_model_lowers_for_gpus_to_one_call_each_way(gpus, attention, sizes):
    text = lowered(dataclasses.replace(MODEL, attention=attention, sliding_window=50), sizes)
    sizes = sizes or {}
    rows, shards = 4 // sizes.get("fsdp", 1), sizes.get("tensor", 1)
    q, k = (f"{rows}x128x{heads // shards}x64xbf16" for heads in (4, 2))
    given = [f"{rows}x1x128x128xbf16"] if attention == "cudnn" else [f"{rows}xi32"] * 2
    middle = "ScaleBias" if attention == "cudnn" else ""
    (forward, settings, arguments), (backward, same, residuals) = calls_of(
        text
    )  # one layer's, in two loops over layers
    assert (forward, backward) == (f"fmha{middle}Softmax", f"fmha{middle}SoftmaxBackward")
    assert arguments == [q, k, k, *given]
    kept = [q, k, k, f"{rows}x{4 // shards}x128xf32", q]
    assert residuals == [*kept, *given, q] if attention == "cudnn" else [*kept, q, *given]
    for config in (settings, same):
        assert f'"mask_type": "{"CAUSAL" if attention == "cudnn" else "PADDING_CAUSAL"}"' in config
        assert f'"sliding_window_length": {0 if attention == "cudnn" else 50}' in config, "a mask says it itself"
        assert '"fmha_scale": 0.125' in config
    scores = re.findall(r"tensor<(\S*128x128x\w+)>", text)
    assert not [shape for shape in scores if "f32" in shape], "no scores"
    assert attention == "cudnn" or not [shape for shape in scores if "i1" not in shape and "i32" not in shape]


def test_auto_takes_it_where_a_try_agrees(gpus, monkeypatch, caplog):
    packed, rows = (dataclasses.replace(MODEL, attention=name) for name in ("auto", "auto_rows"))
    assert "__cudnn" not in lowered(packed, None), "tried: it cannot run here"
    assert len(caplog.records) == 1 and "plain operations in place of cuDNN's, which failed" in caplog.text
    monkeypatch.setattr(cudnn, "_difference", lambda *shape: 0.01)
    cudnn._agrees.cache_clear()
    assert [name for name, *_ in calls_of(lowered(packed, None))] == [
        "fmhaScaleBiasSoftmax",
        "fmhaScaleBiasSoftmaxBackward",
    ]
    full = dataclasses.replace(rows, remat="full")  # the backward pass computes a layer's forward once more
    assert [name for name, *_ in calls_of(lowered(full, None))] == ["fmhaSoftmax"] * 2 + ["fmhaSoftmaxBackward"]
    for other in ({"dtype": "float32"}, {"architecture": "mpt", "num_kv_heads": 4}, {"attention": "xla"}):
        assert "__cudnn" not in lowered(dataclasses.replace(packed, **other), None), other


def test_auto_is_for_nvidia_s_devices_from_ampere_on(monkeypatch):
    monkeypatch.setattr(cudnn, "_agrees", lambda *shape: True)
    q = jnp.zeros((1, 16, 4, 8), jnp.bfloat16)

    def suits(q=q, **device):
        monkeypatch.setattr(cudnn, "_device", lambda mesh: SimpleNamespace(**vars(A100) | device))
        return suits_cudnn(q, jnp.zeros((1, 16, 2, 8), q.dtype), None, window=None, rows=False)

    assert suits() and suits(compute_capability="12.0")
    assert not suits(compute_capability="7.5") and not suits(compute_capability="gfx942") and not suits(platform="cpu")
    assert not suits(q.astype(jnp.float32)) and not suits(q[:, :1])


def test_processes_take_it_together_or_not_at_all(monkeypatch, caplog):
    monkeypatch.setattr(cudnn, "_agrees", lambda *shape: True)
    monkeypatch.setattr(cudnn, "_device", lambda mesh: A100)
    q = jnp.zeros((1, 16, 4, 8), jnp.bfloat16)
    mesh = SimpleNamespace(devices=np.array([SimpleNamespace(process_index=n) for n in (0, 0, 1, 1)]))
    for others, suits in ((True, True), (False, False)):
        cudnn._agree_everywhere.cache_clear()
        asked = []
        monkeypatch.setattr(
            cudnn, "collect", lambda name, own, asked=asked, others=others, **_: asked.append(name) or [own, others]
        )
        for _ in range(2):
            assert suits_cudnn(q, q, mesh, window=None, rows=False) is suits
        assert len(asked) == 1, "once for each shape"
    assert "all processes but [1]" in caplog.text
    cudnn._agree_everywhere.cache_clear()


@pytest.fixture
def told(monkeypatch):
    """What cuDNN is told, call by call; plain operations compute it."""
    calls = []

    def record(*arrays, implementation=None, **options):
        if implementation == "cudnn":
            calls.append(options)
        return PLAIN(*arrays, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    monkeypatch.setattr("fusejax.models.layers.check_cudnn", lambda dtype, mesh: None)
    return calls


def heads(packed):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 16, n, 8)), jnp.float32) for n in (4, 2, 2))
    segments = np.ones((2, 16), np.int32)
    segments[0, 11:] = 0
    if packed:
        segments[0, 5:11] = 2
    return q, k, v, jnp.asarray(segments)


@pytest.mark.parametrize(
    "mesh", [None, pytest.param({"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)], ids=["one", "mesh"]
)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_it_computes_what_plain_operations_do(told, packed, window, mesh):
    q, k, v, segments = heads(packed)
    layout = Layout() if mesh is None else Layout(make_mesh(**mesh))
    mask = attention_mask(segments, sliding_window=window)
    real = np.asarray(segments > 0)[..., None, None]

    def run(implementation):
        def total(q, k, v):
            out = attention(q, k, v, mask, layout, segments=segments, window=window, implementation=implementation)
            return jnp.sum(jnp.where(real, jnp.sin(out), 0.0)), out

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    ((_, ours), gradients) = run("cudnn" if packed else "cudnn_rows")
    ((_, theirs), expected) = run("xla")
    np.testing.assert_allclose(np.where(real, ours, 0), np.where(real, theirs, 0), atol=2e-6)
    for a, b in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    assert told and all(options["is_causal"] for options in told)
    if packed:
        assert set(told[0]) == {"is_causal", "mask"} and told[0]["mask"].dtype == bool
    else:
        assert (
            told[0]["query_seq_lengths"].shape
            == told[0]["key_value_seq_lengths"].shape
            == (2 // (mesh or {}).get("fsdp", 1),)
        )
        assert told[0]["local_window_size"] == (None if window is None else (window - 1, 0))
        assert "mask" not in told[0], "nothing of T by T"


def test_a_try_tells_right_from_wrong(told, monkeypatch, caplog):
    shape, tried = ("bfloat16", 32, 2, 16, 10), []
    cudnn._agrees.cache_clear()

    def layer(x, _):  # as in a training step: under a trace, a loop and a mesh
        tried.append(cudnn._agrees(*shape, True))
        return jnp.sin(x), None

    with jax.set_mesh(make_mesh(fsdp=2, explicit=True)):
        jax.eval_shape(jax.grad(lambda x: jax.lax.scan(layer, x, length=2)[0]), 1.0)
    assert tried[0] and cudnn._agrees(*shape, False) and not caplog.records
    assert [set(call) for call in (told[0], told[-1])] == [
        {"is_causal", "query_seq_lengths", "key_value_seq_lengths", "local_window_size"},
        {"is_causal", "mask"},
    ]
    monkeypatch.setattr(cudnn, "cudnn_attention", lambda *heads, window: PLAIN(*heads[:3], is_causal=True))
    cudnn._agrees.cache_clear()
    assert not cudnn._agrees(*shape, False) and "off by" in caplog.text, "it reads other documents' keys"
    monkeypatch.setattr(cudnn, "_difference", lambda *shape: float("nan"))
    assert not cudnn._agrees(*shape, True) and "off by nan" in caplog.text
    cudnn._agrees.cache_clear()


def test_float32_and_other_devices_are_refused():
    with pytest.raises(InputError, match=r"bfloat16 or float16, got float32; set train.compute_dtype"):
        check_cudnn("float32", None)
    with pytest.raises(InputError, match=r"needs NVIDIA GPUs, the devices are cpu"):
        check_cudnn("bfloat16", make_mesh(fsdp=2))
    model = ModelConfig(64, 32, 64, 2, 4, dtype="bfloat16", attention="cudnn")
    ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    with pytest.raises(InputError, match="needs NVIDIA GPUs"):
        jax.eval_shape(lambda p, *x: hidden_states(p, model, *x), abstract_params(model), ids, ids, ids)


def test_linear_biases_are_refused(told):
    q, k, v, segments = heads(packed=False)
    mask = attention_mask(segments)
    with pytest.raises(InputError, match="not for linear biases"):
        attention(q, k, v, mask, Layout(), bias=jnp.zeros((1, 4, 16, 16)), implementation="cudnn")


def test_a_configuration_says_which_form_it_trains_with():
    values = {"output": "x", "target": "t", "sources": ["s"], "corpus": {"train": [{"path": "x"}]}}
    values |= {"memory": {"attention": "cudnn"}, "train": {"compute_dtype": "bfloat16", "packing": False}}
    config = RunConfig.model_validate(values)
    assert (config.training_attention, config.plain_attention) == ("cudnn_rows", "xla")
    packed = config.model_copy(update={"train": config.train.model_copy(update={"packing": True})})
    assert packed.training_attention == "cudnn"
    for name, expected in (("auto", "auto_rows"), ("xla", "xla")):
        assert RunConfig.model_validate(values | {"memory": {"attention": name}}).training_attention == expected
    with pytest.raises(ValueError, match="cudnn computes in 16 bits"):
        RunConfig.model_validate(values | {"train": {}})
    assert dataclasses.replace(ModelConfig(64, 32, 64, 2, 4), attention="cudnn_rows").attention == "cudnn_rows"
