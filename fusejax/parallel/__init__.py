"""Meshes and shardings: where arrays lie, derived from the logical axes of the parameter table."""

from fusejax.parallel.mesh import MESH_AXES, is_explicit, make_mesh
from fusejax.parallel.paths import flatten_paths, unflatten_paths
from fusejax.parallel.sharding import Layout, ShardingRules, batch_sharding, param_shardings, spec_for

__all__ = [
    "MESH_AXES",
    "Layout",
    "ShardingRules",
    "batch_sharding",
    "flatten_paths",
    "is_explicit",
    "make_mesh",
    "param_shardings",
    "spec_for",
    "unflatten_paths",
]
