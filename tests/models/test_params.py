"""The parameter table and what is derived from it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fusejax.errors import InputError
from fusejax.models import (
    ModelConfig,
    abstract_params,
    check_params,
    count_params,
    decay_mask,
    head_kernel,
    init_params,
    param_table,
)
from fusejax.parallel import flatten_paths, unflatten_paths

CFG = ModelConfig(64, 32, 48, 3, 4, 2, head_dim=16, attention_bias=True, mlp_bias=True)


def test_paths_and_shapes_are_the_documented_ones() -> None:
    shapes = {path: spec.shape for path, spec in param_table(CFG).items()}
    assert shapes == {
        "embed.embedding": (64, 32),
        "layers.attention_norm.scale": (3, 32),
        "layers.attention.q.kernel": (3, 32, 4, 16),
        "layers.attention.q.bias": (3, 4, 16),
        "layers.attention.k.kernel": (3, 32, 2, 16),
        "layers.attention.k.bias": (3, 2, 16),
        "layers.attention.v.kernel": (3, 32, 2, 16),
        "layers.attention.v.bias": (3, 2, 16),
        "layers.attention.o.kernel": (3, 4, 16, 32),
        "layers.attention.o.bias": (3, 32),
        "layers.mlp_norm.scale": (3, 32),
        "layers.mlp.gate.kernel": (3, 32, 48),
        "layers.mlp.gate.bias": (3, 48),
        "layers.mlp.up.kernel": (3, 32, 48),
        "layers.mlp.up.bias": (3, 48),
        "layers.mlp.down.kernel": (3, 48, 32),
        "layers.mlp.down.bias": (3, 32),
        "final_norm.scale": (32,),
        "head.kernel": (32, 64),
    }
    assert all(len(spec.axes) == len(spec.shape) for spec in param_table(CFG).values())


def test_only_matrices_decay_even_when_stacked() -> None:
    decaying = {path for path, decays in flatten_paths(decay_mask(CFG)).items() if decays}
    assert decaying == {path for path in param_table(CFG) if path.endswith(("kernel", "embedding"))}


def test_a_tied_head_is_the_embedding() -> None:
    tied = ModelConfig(64, 32, 48, 3, 4, 2, tie_embeddings=True)
    params = init_params(tied, jax.random.key(0))
    assert "head" not in params
    kernel, layout = head_kernel(params, tied)
    assert kernel is params["embed"]["embedding"] and layout == "vd"
    assert head_kernel(abstract_params(CFG), CFG)[1] == "dv"
    assert count_params(tied) == sum(x.size for x in jax.tree.leaves(params))


def test_initialisation_follows_the_table_and_the_key() -> None:
    params = init_params(CFG, jax.random.key(0), dtype=jnp.bfloat16)
    abstract = abstract_params(CFG, dtype=jnp.bfloat16)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    kernel = np.asarray(params["layers"]["mlp"]["up"]["kernel"], np.float32)
    assert abs(kernel.std() - 0.02) < 0.001
    assert not np.array_equal(kernel, np.asarray(params["layers"]["mlp"]["gate"]["kernel"], np.float32))
    assert (params["final_norm"]["scale"] == 1).all() and (params["layers"]["mlp"]["up"]["bias"] == 0).all()
    deeper = ModelConfig(64, 32, 48, 5, 4, 2, head_dim=16)
    same = init_params(deeper, jax.random.key(0), dtype=jnp.bfloat16)["embed"]["embedding"]
    assert (same == params["embed"]["embedding"]).all()  # a leaf depends on its own path only


def test_the_hugging_face_layout_is_undone_by_the_way_back() -> None:
    rng = np.random.default_rng(0)
    for spec in param_table(CFG).values():
        tensor = rng.normal(size=spec.hf_shape)
        assert spec.from_hf(tensor).shape == spec.layer_shape
        np.testing.assert_array_equal(spec.to_hf(spec.from_hf(tensor)), tensor)
    o = param_table(CFG)["layers.attention.o.kernel"]
    assert o.hf_shape == (32, 64) and o.hf_names()[2] == "model.layers.2.self_attn.o_proj.weight"


def test_every_problem_is_reported_at_once() -> None:
    flat = flatten_paths(abstract_params(CFG))
    flat["head.kernel"] = jax.ShapeDtypeStruct((64, 32), jnp.float32)
    del flat["final_norm.scale"]
    flat["final_norm.bias"] = jax.ShapeDtypeStruct((32,), jnp.float32)
    with pytest.raises(InputError) as error:
        check_params(unflatten_paths(flat), CFG)
    text = str(error.value)
    assert "missing: final_norm.scale (32,)" in text and "unexpected: final_norm.bias (32,)" in text
    assert "head.kernel is (64, 32), expected (32, 64)" in text
    check_params(abstract_params(CFG), CFG)
