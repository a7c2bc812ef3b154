"""From logical axes to shardings, for parameters and activations, in Auto and Explicit mode.

Parameters name their axes (`vocab embed layers heads kv_heads head_dim mlp experts`), activations theirs (`batch
seq stream` and the former). `ShardingRules` says on which mesh axes each logical axis lies; nothing else in the
package knows. A mesh axis is used once per array: on a second use the later axis is left whole.

Parameters are stored split over `fsdp` and gathered just before use (`Layout.gathered`): the transpose of that
gather is the reduce-scatter of the gradient. Activations never lie on `fsdp` along `embed`.

`stream` is the positions of the residual stream between two projections. With `ShardingRules.sequence_parallel` it
lies on `tensor` (Korthikanti et al., arXiv:2205.05198): what a projection reads is gathered, what it adds is scattered.

`Layout` hides the one difference between the modes: Auto takes hints, Explicit takes an output sharding
wherever a contraction or a gather leaves a choice. Without a mesh its methods are the plain operations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fusejax.parallel.mesh import is_explicit
from fusejax.parallel.paths import unflatten_paths

__all__ = ["Layout", "ShardingRules", "batch_sharding", "own_rows", "param_shardings", "spec_for"]

Axes = Sequence[str | None]


@dataclass(frozen=True)
class ShardingRules:
    """For each logical axis the mesh axes it is split over; an empty tuple leaves it whole."""

    batch: tuple[str, ...] = ("data", "fsdp")
    seq: tuple[str, ...] = ()
    stream: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    vocab: tuple[str, ...] = ("tensor",)
    embed: tuple[str, ...] = ("fsdp",)
    heads: tuple[str, ...] = ("tensor",)
    kv_heads: tuple[str, ...] = ("tensor",)
    head_dim: tuple[str, ...] = ()
    mlp: tuple[str, ...] = ("tensor",)
    experts: tuple[str, ...] = ()

    @classmethod
    def sequence_parallel(cls) -> "ShardingRules":
        """The rules with the positions of the residual stream over `tensor`."""
        return cls(stream=("tensor",))


class HasAxes(Protocol):
    """What `param_shardings` needs of a row of the parameter table."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> tuple[str, ...]: ...


def spec_for(axes: Axes, rules: ShardingRules) -> PartitionSpec:
    """Returns the partition of an array with these logical axes; None leaves a dimension whole.

    Raises:
        ValueError: an axis that no rule names.
    """
    known = {field.name for field in fields(rules)}
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for axis in axes:
        if axis is not None and axis not in known:
            raise ValueError(f"no sharding rule for the logical axis {axis!r}; known axes are {sorted(known)}")
        names = () if axis is None else tuple(n for n in getattr(rules, axis) if n not in used)
        used.update(names)
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def param_shardings(table: Mapping[str, HasAxes], mesh: Mesh, rules: ShardingRules | None = None) -> dict[str, Any]:
    """Returns the nested dict of `NamedSharding` for a parameter table.

    Args:
        table: dotted path -> row with `shape` and `axes`, see `fusejax.models.params.param_table`.
        mesh: the device mesh.
        rules: where logical axes lie; the default rules if None.

    Raises:
        ValueError: dimensions that the mesh does not divide, all of them, with the remedy.
    """
    rules = rules or ShardingRules()
    problems: list[str] = []
    shardings: dict[str, NamedSharding] = {}
    for path, row in table.items():
        spec = spec_for(row.axes, rules)
        problems += _indivisible(path, row, spec, mesh)
        shardings[path] = NamedSharding(mesh, spec)
    if problems:
        raise ValueError(
            "the mesh does not divide these dimensions:\n  " + "\n  ".join(problems) + "\nuse a mesh size that "
            "divides them, pad the model, or leave the axis whole, for example ShardingRules(kv_heads=())"
        )
    return unflatten_paths(shardings)


def batch_sharding(mesh: Mesh, rules: ShardingRules | None = None) -> NamedSharding:
    """Returns the sharding of `[B, T, ...]` arrays of a batch: rows over the batch axes."""
    return NamedSharding(mesh, spec_for(("batch", "seq"), rules or ShardingRules()))


def own_rows(sharding: NamedSharding, rows: int) -> list[int]:
    """Returns which of the `rows` rows of a batch lie on this process's devices, ascending.

    Raises:
        ValueError: the devices do not divide the rows.
    """
    found: set[int] = set()
    for index in sharding.addressable_devices_indices_map((rows, 1)).values():
        found.update(range(rows)[index[0] if index else slice(None)])
    return sorted(found)


@dataclass(frozen=True)
class Layout:
    """Where the arrays of a computation lie; without a mesh every method is the plain operation."""

    mesh: Mesh | None = None
    rules: ShardingRules = ShardingRules()

    @property
    def explicit(self) -> bool:
        """Whether shardings are part of types, so that contractions and gathers must name theirs."""
        return self.mesh is not None and is_explicit(self.mesh)

    def sharding(self, axes: Axes) -> NamedSharding:
        """Returns the sharding of an array with these logical axes; needs a mesh."""
        if self.mesh is None:
            raise ValueError("a layout without a mesh has no shardings")
        return NamedSharding(self.mesh, spec_for(axes, self.rules))

    def constrain(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Returns `x` laid out by its logical axes."""
        if self.mesh is None:
            return x
        place = jax.sharding.reshard if self.explicit else jax.lax.with_sharding_constraint
        return place(x, self.sharding(axes))

    def gathered(self, param: jax.Array, axes: Axes) -> jax.Array:
        """Returns a parameter gathered along `embed` (its fsdp axis); its gradient is scattered back."""
        stored = self.constrain(param, axes)  # so that the gradient is, too
        return self.constrain(stored, [None if axis == "embed" else axis for axis in axes])

    def spread(self, x: jax.Array) -> jax.Array:
        """Returns `[B, T, ...]` split as the residual stream is; as it is where the stream is not split."""
        return self.constrain(x, ("batch", "stream", *[None] * (x.ndim - 2))) if self.rules.stream else x

    def whole(self, x: jax.Array) -> jax.Array:
        """Returns the stream `[B, T, D]` with all positions, as a projection reads it; its gradient is scattered."""
        return self.constrain(self.spread(x), ("batch", "seq", None)) if self.rules.stream else x

    def einsum(self, equation: str, x: jax.Array, w: jax.Array, axes: Axes, **options: Any) -> jax.Array:
        """Returns `jnp.einsum(equation, x, w)` with the result laid out by its logical axes."""
        if self.explicit:
            return jnp.einsum(equation, x, w, out_sharding=self.sharding(axes), **options)
        return self.constrain(jnp.einsum(equation, x, w, **options), axes)

    def take_rows(self, table: jax.Array, ids: jax.Array, *, dtype: Any) -> jax.Array:
        """Returns `table[ids]` (`[V, D]`, `[B, T]` -> `[B, T, D]`) in `dtype`; an id beyond the table reads NaN.

        The table stays where it is stored. Each device reads its columns for the tokens of all that share the table,
        and the columns are exchanged for rows: what travels, forward and back, is as large as the result in `dtype`.
        A row's gradient is summed where it is stored, in the table's dtype.
        """
        stored = self.constrain(table, ("vocab", "embed"))
        if self.mesh is None:
            return stored.at[ids].get(mode="fill").astype(dtype)
        elsewhere = set(self.rules.embed)
        rows = tuple(axis for axis in self.rules.batch if axis not in elsewhere)
        columns = replace(self, rules=replace(self.rules, batch=rows))
        ids, axes = columns.constrain(ids, ("batch", "seq")), ("batch", "seq", "embed")
        if self.explicit:
            found = stored.at[ids].get(out_sharding=columns.sharding(axes), mode="fill")
        else:
            found = stored.at[ids].get(mode="fill")
        return self.constrain(columns.constrain(found.astype(dtype), axes), ("batch", "seq", None))


def _indivisible(path: str, row: HasAxes, spec: PartitionSpec, mesh: Mesh) -> list[str]:
    problems = []
    for axis, size, entry in zip(row.axes, row.shape, spec, strict=True):
        names = (entry,) if isinstance(entry, str) else entry or ()
        ways = 1
        for name in names:
            ways *= mesh.shape[name]
        if size % ways:
            problems.append(f"{path}: {axis} = {size} over {'*'.join(names)} = {ways}")
    return problems
