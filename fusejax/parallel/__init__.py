"""Meshes, shardings and processes: where arrays lie, derived from the logical axes of the parameter table."""

from fusejax.parallel.gather import to_host
from fusejax.parallel.mesh import MESH_AXES, is_explicit, make_mesh
from fusejax.parallel.paths import flatten_paths, unflatten_paths
from fusejax.parallel.processes import barrier, collect, is_first, process_count, process_index, start_processes
from fusejax.parallel.sharding import Layout, ShardingRules, batch_sharding, own_rows, param_shardings, spec_for

__all__ = [
    "MESH_AXES",
    "Layout",
    "ShardingRules",
    "barrier",
    "batch_sharding",
    "collect",
    "flatten_paths",
    "is_explicit",
    "is_first",
    "make_mesh",
    "own_rows",
    "param_shardings",
    "process_count",
    "process_index",
    "spec_for",
    "start_processes",
    "to_host",
    "unflatten_paths",
]
