"""Every kernel lowers for TPU and CUDA on this machine, for the heads of real models."""

import functools
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels import LseGather, linear_fusion_loss, lse_gather
from pallas_kernels.fused_softmax_kl import dispatch
from pallas_kernels.testing import CHIPS, aot_compile, count_kernels, lower_for, missing_compiler

VOCABULARIES = (32000, 32768, 50257, 128256, 151936, 256000)
KERNELS = {"tpu": "tpu", "cuda": "mosaic_gpu"}
CUDA = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="Mosaic GPU kernels need JAX 0.11")
PLATFORMS = ["tpu", pytest.param("cuda", marks=CUDA)]


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def level_1(logits, ids, g_lse, g_z, **options):
    out, pull = jax.vjp(lambda x: lse_gather(x, ids, **options), logits)
    return out, pull(LseGather(g_lse, g_z))


def level_1_shapes(tokens, vocab, gathered, dtype, n):
    logits, ids = shape(tokens, vocab, dtype=dtype), shape(tokens, gathered, dtype=jnp.int32)
    return logits, ids, shape(tokens, n), shape(tokens, gathered)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_level_1(platform, vocab):
    if platform == "cuda" and vocab % 8:
        pytest.skip("an odd vocabulary takes the portable path: test_an_odd_vocabulary_on_cuda")
    two, cap = {"temperatures": (1.0, 2.0)}, {"softcap": 30.0, "valid_vocab": vocab - 7}
    for dtype, gathered, options in ((jnp.bfloat16, 33, two), (jnp.float32, 257, cap)):
        call = functools.partial(level_1, implementation=KERNELS[platform], **options)
        n = len(options.get("temperatures", (1.0,)))
        lowered = lower_for(platform, call, *level_1_shapes(2048, vocab, gathered, dtype, n))
        assert count_kernels(lowered, platform) == 2


def level_2(hidden, head, labels, ids, logprobs, rest, weights, **options):
    def loss(hidden, head):
        out = linear_fusion_loss(hidden, head, labels, ids, logprobs, rest, weights, weights, **options)
        return out[0]

    return jax.value_and_grad(loss, (0, 1))(hidden, head)


def level_2_shapes(tokens, embed, vocab, k, dtype=jnp.bfloat16):
    integers = functools.partial(shape, dtype=jnp.int32)
    arrays = shape(tokens, embed, dtype=dtype), shape(embed, vocab, dtype=dtype), integers(tokens), integers(tokens, k)
    return *arrays, shape(tokens, k), shape(tokens), shape(tokens)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("embed", [2048, 4096, 8192])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_level_2_holds_the_kernels_in_its_scan(platform, embed, vocab):
    odd = platform == "cuda" and vocab % 8 != 0
    call = functools.partial(level_2, implementation=None if odd else KERNELS[platform], temperature=2.0)
    lowered = lower_for(platform, call, *level_2_shapes(16384, embed, vocab, 32))
    assert count_kernels(lowered, platform) == (0 if odd else 2)
    assert f"tensor<16384x{vocab}x" not in lowered.as_text()


@CUDA
def test_an_odd_vocabulary_on_cuda():
    shapes = level_1_shapes(256, 50257, 5, jnp.bfloat16, 1)
    assert count_kernels(lower_for("cuda", level_1, *shapes), "cuda") == 0
    with pytest.raises(ValueError, match="V = 50257 is not a multiple of 8"):
        lower_for("cuda", functools.partial(level_1, implementation="mosaic_gpu"), *shapes)


@CUDA
def test_the_default_takes_the_kernel_for_an_abstract_gpu():
    assert count_kernels(lower_for("cuda", level_1, *level_1_shapes(256, 4096, 5, jnp.bfloat16, 1)), "cuda") == 2


def test_the_default_takes_no_kernel_on_cpu():
    text = lower_for("cpu", level_1, *level_1_shapes(64, 512, 5, jnp.float32, 1)).as_text()
    assert "custom_call" not in text


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.11 has Mosaic GPU kernels")
def test_an_old_jax_says_that_mosaic_gpu_is_missing():
    with pytest.raises(ValueError, match=r"JAX 0\.11"):
        jax.eval_shape(
            functools.partial(lse_gather, implementation="mosaic_gpu"), shape(64, 64), jnp.zeros((64, 1), int)
        )


@pytest.mark.parametrize(
    ("implementation", "dtype", "gathered", "message"),
    [("tpu", jnp.float16, 3, "float16"), ("tpu", jnp.float32, 5000, "scalar memory")],
)
def test_a_named_kernel_that_cannot_serve_says_why(implementation, dtype, gathered, message):
    call = functools.partial(lse_gather, implementation=implementation)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, shape(16, 256, dtype=dtype), shape(16, gathered, dtype=jnp.int32))


@pytest.mark.parametrize("k", [2047, 2048, 4095, 4096])
def test_more_ids_than_scalar_memory_holds_take_the_portable_path(k):
    """Each pass by itself: rows of 16 bits come in tiles of 16, which leave room for half as many ids each."""
    shapes = level_2_shapes(64, 128, 512, k)  # hidden states and head in bfloat16, logits in float32; k + 1 ids
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice("TPU v5", 1, "tpu"))):
        lowered = jax.jit(level_2).trace(*shapes).lower(lowering_platforms=("tpu",))
    assert count_kernels(lowered, "tpu") == (k < 4096) + (k < 2048)
    if k >= 2048:
        with pytest.raises(ValueError, match="scalar memory"):
            jax.eval_shape(functools.partial(level_2, implementation="tpu"), *shapes)


@pytest.mark.parametrize(
    ("capability", "takes"),
    [("8.0", "xla"), ("gfx942", "xla"), ("", "xla"), ("9.0", "mosaic_gpu"), ("10.3", "mosaic_gpu")],
)
@CUDA
def test_gpus_older_than_hopper_take_the_portable_path(capability, takes, monkeypatch):
    device = types.SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert dispatch.choose(None, 64, 4096, 33, jnp.bfloat16) == takes
    if takes == "xla":
        with pytest.raises(ValueError, match=r"capability 9\.0"):
            dispatch.choose("mosaic_gpu", 64, 4096, 33, jnp.bfloat16)


def test_what_is_missing_is_said():
    absent = [chip for chip in CHIPS if missing_compiler(chip)]
    for chip in absent:
        with pytest.raises(RuntimeError, match=chip):
            aot_compile(chip, jnp.sin, shape(8))


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("check_vma", [False, True])
def test_kernels_lower_inside_a_shard_map(platform, axis_type, check_vma):
    gpu = {"abstract_device": AbstractDevice("NVIDIA H200", 132, "cuda")} if platform == "cuda" else {}
    mesh = AbstractMesh((2, 4), ("data", "tensor"), axis_types=(axis_type,) * 2, **gpu)
    options = {"temperatures": (1.0, 2.0), "valid_vocab": 32000 - 3, "vocab_axis": "tensor"}

    def local(logits, ids):
        call = functools.partial(lse_gather, implementation=KERNELS[platform], **options)
        return jax.grad(lambda x: sum(y.sum() for y in call(x, ids)))(logits)

    specs = P("data", "tensor"), P("data", None)
    shapes = (256, 32000, jnp.bfloat16), (256, 5, jnp.int32)
    arguments = [
        jax.ShapeDtypeStruct((t, n), d, sharding=jax.NamedSharding(mesh, s))
        for (t, n, d), s in zip(shapes, specs, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(mesh):
        mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=check_vma)
        lowered = jax.jit(mapped).trace(*arguments).lower(lowering_platforms=(platform,))
    assert count_kernels(lowered, platform) == 2
    assert "all_gather" not in lowered.as_text()
