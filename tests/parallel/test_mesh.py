"""Meshes and the rules that place logical axes on them."""

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from fusejax.models import ModelConfig, param_table
from fusejax.parallel import (
    ShardingRules,
    batch_sharding,
    flatten_paths,
    is_explicit,
    make_mesh,
    param_shardings,
    spec_for,
    unflatten_paths,
)


def test_a_mesh_has_three_axes_and_a_stated_type() -> None:
    mesh = make_mesh(data=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto} and not is_explicit(mesh)
    assert is_explicit(make_mesh(fsdp=8, explicit=True))
    assert make_mesh(devices=jax.devices()[3:4]).devices.item() == jax.devices()[3]


@pytest.mark.parametrize(
    ("sizes", "words"), [({"data": 16}, "needs 16 devices, but there are 8"), ({"fsdp": 0}, "at least 1")]
)
def test_an_impossible_mesh_is_refused(sizes, words) -> None:
    with pytest.raises(ValueError, match=words):
        make_mesh(**sizes)


def test_a_mesh_axis_is_used_once_per_array() -> None:
    rules = ShardingRules(mlp=("tensor", "fsdp"))
    assert spec_for(("embed", "mlp"), rules) == PartitionSpec("fsdp", "tensor")
    assert spec_for(("mlp", "embed"), rules) == PartitionSpec(("tensor", "fsdp"), None)
    assert spec_for(("batch", "seq", None), rules) == PartitionSpec(("data", "fsdp"), None, None)
    with pytest.raises(ValueError, match="no sharding rule for the logical axis 'expert'"):
        spec_for(("expert",), rules)


def test_shardings_follow_the_table() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    shardings = param_shardings(param_table(ModelConfig(64, 32, 48, 2, 4, 2)), mesh)
    assert shardings["layers"]["attention"]["q"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert shardings["embed"]["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "fsdp"), None)


def test_what_the_mesh_does_not_divide_is_listed_with_the_remedy() -> None:
    table = param_table(ModelConfig(66, 36, 48, 2, 4, 2, head_dim=8))
    with pytest.raises(ValueError) as error:
        param_shardings(table, make_mesh(tensor=4, fsdp=2))
    text = str(error.value)
    assert "embed.embedding: vocab = 66 over tensor = 4" in text
    assert "layers.attention.k.kernel: kv_heads = 2 over tensor = 4" in text and "ShardingRules(kv_heads=())" in text
    table.pop("embed.embedding"), table.pop("head.kernel")
    param_shardings(table, make_mesh(tensor=4, fsdp=2), ShardingRules(kv_heads=()))


def test_paths_and_nested_dicts_are_two_forms_of_one_tree() -> None:
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten_paths(tree) == {"a.b": 1, "a.c.d": 2, "e": 3}
    assert unflatten_paths(flatten_paths(tree)) == tree


def test_a_torus_whose_sides_do_not_multiply_to_the_sizes_is_split(monkeypatch) -> None:
    """4 x 8 x 8 chips have no sides that make 128 x 2; jax.make_mesh gives up on them."""

    def gives_up(*_, **__):
        raise NotImplementedError("Failed to find assignment")

    monkeypatch.setattr(jax, "make_mesh", gives_up)
    mesh = make_mesh(fsdp=4, tensor=2, explicit=True)
    assert dict(mesh.shape) == {"data": 1, "fsdp": 4, "tensor": 2}
    assert is_explicit(mesh)
    assert {device.id for device in mesh.devices.flat} == {device.id for device in jax.devices()}
