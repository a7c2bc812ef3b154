"""cuDNN's attention: what it is told, with plain operations in its place, and where it is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.config import RunConfig
from fusejax.errors import InputError
from fusejax.models import ModelConfig, abstract_params, hidden_states
from fusejax.models.cudnn import check_cudnn
from fusejax.models.layers import attention, attention_mask
from fusejax.parallel import make_mesh
from fusejax.parallel.sharding import Layout

PLAIN = jax.nn.dot_product_attention


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
    with pytest.raises(ValueError, match="cudnn computes in 16 bits"):
        RunConfig.model_validate(values | {"train": {}})
    assert dataclasses.replace(ModelConfig(64, 32, 64, 2, 4), attention="cudnn_rows").attention == "cudnn_rows"
