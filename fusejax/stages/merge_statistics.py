"""Merge methods over matrices that are read in chunks: statistics in as many passes as they take, then the result.

The functions of `fusejax.merging` want a whole matrix. What in them depends on the whole matrix is a handful of
numbers (inner products, sums, thresholds, the index up to which ties count), gathered over the chunks. With these
given, every element is on its own, or every row is. `prepare` gathers them, and what it returns makes the chunks of
the result: float32 in between, one rounding at the end, by the functions of `fusejax.merging` themselves where these
take the numbers. Sums are kept in float64 over the chunks.

Not here: float64 and dtypes of 8 bits, which `fusejax.merging.merge_leaf` merges as whole matrices.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np

from fusejax.merging import MERGE_METHODS
from fusejax.merging.spherical import karcher_factors, multislerp_factors, nuslerp_factors
from fusejax.merging.stock import stock_ratio
from fusejax.merging.swap import outlying, quantile_ranks, ram_factors
from fusejax.merging.task_vectors import breadcrumb_counts
from fusejax.stages import merge_programs as programs
from fusejax.stages.merge_chunks import RAW_DTYPES, Chunks
from fusejax.stages.merge_select import NOTHING, Selection, row_ranks, select

__all__ = ["Prepared", "energies", "is_chunked", "prepare", "row_length", "statistics_passes", "wants_energy"]

_NEARLY_PARALLEL = 0.9995
# Compiled once for all matrices.
_STOCK_RATIO = jax.jit(stock_ratio)
_FACTORS = {
    "nuslerp": jax.jit(nuslerp_factors),
    "multislerp": jax.jit(multislerp_factors, static_argnames="normalize_weights"),
    "karcher": jax.jit(karcher_factors, static_argnames=("max_iter", "tol")),
}


class Prepared(NamedTuple):
    """A merge of one matrix whose statistics are known."""

    formula: Callable[..., jax.Array]  # (rows [R, C] float32, *numbers, **options) -> [C] float32
    numbers: Callable[[int, int], tuple[Any, ...]]  # of the chunk at `start` with `count` elements
    options: tuple[tuple[str, Any], ...] = ()
    coefficients: tuple[float, ...] | None = None

    def __call__(self, raw: np.ndarray, start: int, count: int, dtype: str) -> np.ndarray:
        """Returns a chunk of the result, [count] in the raw form of `dtype`."""
        made = programs.run_formula(
            raw, self.numbers(start, count), formula=self.formula, options=self.options, dtype=dtype
        )
        return np.asarray(made)[:count]


def is_chunked(dtypes: Sequence[str]) -> bool:
    """Returns whether tensors of these dtypes (of inputs and output) are merged in chunks."""
    return all(dtype in RAW_DTYPES for dtype in dtypes)


def row_length(method: str, values: Mapping[str, Any], shape: Sequence[int]) -> int:
    """Returns how many elements of a matrix a method must see together: those of a row, or 1."""
    if method == "nuslerp" and not values["flatten"] and values["row_wise"]:
        return math.prod(shape[1:])
    by_row = method in ("della", "della_linear", "arcee_fusion") or (
        values["filter_wise"] if method == "model_stock" else method == "nuslerp" and not values["flatten"]
    )
    return shape[-1] if by_row and shape else 1


def wants_energy(method: str, values: Mapping[str, Any]) -> bool:
    """Returns whether a method needs the sums of all squared changes, which any earlier pass can add up."""
    if method == "sce":
        return values["select_topk"] >= 1
    return method == "varm" and values["granularity"] != "parameter"


def statistics_passes(method: str, values: Mapping[str, Any]) -> int:
    """Returns how often `prepare` reads a matrix, at most."""
    if method in ("ties", "sce"):
        trims = min(values["density"]) < 1 if method == "ties" else values["select_topk"] < 1
        return 2 * trims + (method == "sce" or (trims and values["rescale"]))
    if method in ("dare_linear", "dare_ties", "della", "della_linear"):
        return int(values["rescale"] and values["variant"] != "paper")
    if method == "nuslerp":
        return int(values["flatten"] or values["row_wise"])
    known = {"breadcrumbs": 2, "breadcrumbs_ties": 2, "arcee_fusion": 2, "slerp": 1, "multislerp": 1, "karcher": 1}
    told = {"varm": 1, "model_stock": not values.get("filter_wise"), "ram": values.get("variant") == "ramplus_tl"}
    return int((known | told).get(method, 0))


def prepare(
    method: str, chunks: Chunks, values: Mapping[str, Any], *, has_base: bool, energy: np.ndarray | None = None
) -> Prepared:
    """Gathers what a method needs to know of a whole matrix.

    Args:
        method: a name in `MERGE_METHODS`.
        chunks: row 0 is the base if `has_base`, then the targets; by rows of `row_length`.
        values: the parameters, complete, as `fusejax.merging.registry.resolve` gives them; a `key` is the matrix's.
        has_base: whether there is a base that the method uses.
        energy: [J] sums of squared changes where `wants_energy`, of the matrix or the unit; None: to be gathered.

    Raises:
        OverflowError: sums that are not finite, of values beyond float32.
    """
    if method in _ON_THEIR_OWN:
        return _prepare_pure(method, chunks, values, has_base)
    if method == "varm":
        return _prepare_varm(chunks, values, energy)
    if method == "sce":
        return _prepare_sce(chunks, values, energy)
    return _PREPARE[method](method, chunks, values, has_base)


def energies(
    chunks: Iterable[tuple[int, int, np.ndarray]], targets: int, selected: Selection | None = None
) -> np.ndarray:
    """Returns the sum of squared changes of every target from row 0, over the selected elements, [J] float64."""
    total = np.zeros(targets)
    for start, count, raw in chunks:
        numbers = () if selected is None else selected.numbers(start, count)
        total += [np.sum(np.asarray(part)) for part in programs.energy_sums(raw, numbers)]
    return total


def _prepare_pure(
    method: str, chunks: Chunks, values: Mapping[str, Any], has_base: bool,
    coefficients: tuple[float, ...] | None = None,
) -> Prepared:  # fmt: skip
    """The function of `fusejax.merging` itself, on elements or rows."""
    spec = MERGE_METHODS[method]
    arrays = {name: _narrowed(value) for name, value in values.items() if hasattr(value, "shape")}
    drawn = "key" in arrays
    ranked = method in ("della", "della_linear")
    options: dict[str, Any] = {name: value for name, value in values.items() if name not in arrays}
    names = (*arrays, *(["start"] if drawn else []), *(["ranks"] if ranked else []))
    options |= {"method": method, "names": names, "has_base": has_base, "row": chunks.row}
    if spec.coefficients is not None and coefficients is None:
        nothing = np.zeros((len(chunks.tensors), 0), np.float32)
        coefficients = tuple(np.asarray(spec.coefficients(None, nothing, **values)).tolist())

    def numbers(start: int, count: int) -> tuple[Any, ...]:
        del count
        return (*arrays.values(), *([np.uint32(start)] if drawn else []), *([_ranks(chunks)] if ranked else []))

    return Prepared(programs.pure, numbers, tuple(options.items()), coefficients)


def _ranks(chunks: Chunks) -> np.ndarray:
    """Ranks within rows, [J, rows, row], of the changes in what the chunks' buffer holds."""
    changes = np.stack([np.asarray(change) for change in programs.changes(chunks.buffer)])
    return row_ranks(np.abs(changes).reshape(len(changes), -1, chunks.row))


def _narrowed(value: Any) -> np.ndarray:
    return np.asarray(value, value.dtype if value.dtype == np.uint32 else np.float32)


def _prepare_slerp(method: str, chunks: Chunks, values: Mapping[str, Any], has_base: bool) -> Prepared:
    del method, has_base
    t = float(values["t"])
    products = _products(chunks, kind="rows")
    norms = math.sqrt(products[0, 0]) * math.sqrt(products[1, 1])
    cosine = products[0, 1] / norms if norms else 0.0
    if not abs(cosine) <= _NEARLY_PARALLEL:
        return _fixed(programs.line, np.float32(t))
    angle = math.acos(cosine)
    factors = np.float32(math.sin((1 - t) * angle) / math.sin(angle)), np.float32(math.sin(t * angle) / math.sin(angle))
    return _fixed(programs.sum_of_two, *factors)


def _prepare_spherical(method: str, chunks: Chunks, values: Mapping[str, Any], has_base: bool) -> Prepared:
    if method == "nuslerp" and not values["flatten"] and not values["row_wise"]:
        return _prepare_pure(method, chunks, values, has_base)
    if chunks.row > 1:  # nuslerp along the first axis: products of columns
        count = len(chunks.tensors) - has_base
        products = np.zeros((count, count, chunks.row))
        for _, _, raw in chunks:
            vectors = programs.spanned_rows(raw, has_base=has_base)
            found = [np.asarray(vector).reshape(-1, chunks.row) for vector in vectors]
            for i in range(count):
                for j in range(count):
                    products[i, j] += np.einsum("rc,rc->c", found[i], found[j])
    else:
        products = _products(chunks, kind="spanned", has_base=has_base)
    normalized = values.get("normalize_weights", True)
    if normalized and not np.any(np.diagonal(products)[..., 1:]):
        return _fixed(programs.first_target, options={"has_base": has_base})  # all equal: bit by bit
    arguments = [np.asarray(values["weights"], np.float64)] if "weights" in values else []
    options = {name: values[name] for name in ("normalize_weights", "max_iter", "tol") if name in values}
    with jax.enable_x64(True):
        factors = np.asarray(_FACTORS[method](products, *arguments, **options), np.float32)
    return _fixed(programs.combined, factors, options={"has_base": has_base, "row": chunks.row})


def _prepare_stock(method: str, chunks: Chunks, values: Mapping[str, Any], has_base: bool) -> Prepared:
    if values["filter_wise"]:
        return _prepare_pure(method, chunks, values, has_base)
    with jax.enable_x64(True):
        ratio = np.float32(_STOCK_RATIO(_products(chunks, kind="changes")))
    return _fixed(programs.towards_mean, ratio)


def _prepare_varm(chunks: Chunks, values: Mapping[str, Any], energy: np.ndarray | None) -> Prepared:
    if len(chunks.tensors) == 2:
        return _fixed(programs.second_row, coefficients=(1.0,))
    if values["granularity"] == "parameter":
        total = np.zeros(len(chunks.tensors) - 1)
        for _, count, raw in chunks:
            total += [np.sum(np.asarray(share)[:count]) for share in programs.element_shares(raw)]
        return _prepare_pure("varm", chunks, values, True, tuple((total / max(chunks.size, 1)).tolist()))
    shares = _shares(energies(chunks, len(chunks.tensors) - 1) if energy is None else energy, 0.0)
    return _fixed(programs.shifted, shares.astype(np.float32), coefficients=tuple(shares.tolist()))


def _prepare_sce(chunks: Chunks, values: Mapping[str, Any], energy: np.ndarray | None) -> Prepared:
    variant, topk = values["variant"], values["select_topk"]
    if len(chunks.tensors) == 2 and (variant == "fuseai" or topk >= 1):
        return _fixed(programs.second_row, coefficients=(1.0,))
    selected = None
    if topk < 1 and len(chunks.tensors) == 2:  # one target: it does not vary
        selected = NOTHING
    elif topk < 1:
        share = _share(topk)
        wanted = [(0, lambda size, nonzero: share * nonzero // 1)]
        (selected,) = select(chunks, lambda raw: (programs.spread_bits(raw),), wanted)
    energy = energies(chunks, len(chunks.tensors) - 1, selected) if energy is None else energy
    shares = _shares(energy / max(chunks.size, 1), programs.MERGEKIT_FLOOR if variant == "mergekit" else 0.0)
    weights, told = (shares.astype(np.float32),), tuple(shares.tolist())
    if selected is None or variant == "fuseai":
        return _fixed(programs.erase, *weights, options={"variant": variant, "masked": False}, coefficients=told)
    mask, options = selected, (("variant", variant), ("masked", True))
    return Prepared(programs.erase, lambda start, count: weights + mask.numbers(start, count), options, told)


def _prepare_ties(method: str, chunks: Chunks, values: Mapping[str, Any], has_base: bool) -> Prepared:
    del method, has_base
    weights, scale = np.asarray(values["weights"], np.float32), np.float32(values["scale"])
    trimmed = tuple(j for j, density in enumerate(values["density"]) if density < 1)
    wanted = [(i, functools.partial(_trim_count, _share(values["density"][j]))) for i, j in enumerate(trimmed)]
    found = select(chunks, functools.partial(programs.change_bits, which=trimmed), wanted) if trimmed else []

    def selections(start: int, count: int) -> tuple[Any, ...]:
        return tuple(selected.numbers(start, count) for selected in found)

    factors = np.ones(len(weights), np.float32)
    if values["rescale"] and trimmed:
        sizes = np.zeros((2, len(weights)))
        for start, count, raw in chunks:
            numbers = selections(start, count)
            sizes += [[np.sum(np.asarray(x)) for x in row] for row in programs.trimmed_sizes(raw, numbers, trimmed)]
        factors = _ratio(*sizes)
    options = (("normalize", values["normalize"]), ("trimmed", trimmed))
    return Prepared(programs.elect, lambda start, count: (weights, factors, scale, selections(start, count)), options)


def _prepare_breadcrumbs(method: str, chunks: Chunks, values: Mapping[str, Any], has_base: bool) -> Prepared:
    del has_base
    weights, scale = np.asarray(values["weights"], np.float32), np.float32(values["scale"])
    kept, dropped = breadcrumb_counts(chunks.size, values["density"], values["gamma"])
    every = tuple(range(len(kept)))
    wanted = [(j, lambda *_, n=n + more: n) for j, (n, more) in enumerate(zip(kept, dropped, strict=True))]
    wanted += [(j, lambda *_, n=more: n) for j, more in enumerate(dropped)]
    found = select(chunks, functools.partial(programs.change_bits, which=every), wanted)

    def numbers(start: int, count: int) -> tuple[Any, ...]:
        return weights, scale, tuple(selected.numbers(start, count) for selected in found)

    options = (("elects", method == "breadcrumbs_ties"), ("normalize", values["normalize"]))
    return Prepared(programs.crumbs, numbers, options)


def _prepare_drop(method: str, chunks: Chunks, values: Mapping[str, Any], has_base: bool) -> Prepared:
    if not values["rescale"] or values["variant"] == "paper":
        return _prepare_pure(method, chunks, values, has_base)
    shares = {name: _narrowed(values[name]) for name in ("key", "density", "epsilon") if name in values}
    sizes = np.zeros((2, len(chunks.tensors) - 1))
    for start, _, raw in chunks:
        ranks = {"ranks": _ranks(chunks)} if "epsilon" in shares else {}
        found = programs.thinned_sizes(raw, {**shares, **ranks, "start": np.uint32(start)}, row=chunks.row)
        sizes += [[np.sum(row) for row in np.asarray(rows)] for rows in found]
    return _prepare_pure(method, chunks, {**values, "factors": _ratio(*sizes)}, has_base)


def _prepare_ram(method: str, chunks: Chunks, values: Mapping[str, Any], has_base: bool) -> Prepared:
    if values["variant"] == "ram":
        return _prepare_pure(method, chunks, values, has_base)
    counts = np.zeros((2, len(chunks.tensors) - 1), np.int64)
    for _, _, raw in chunks:
        counts += np.asarray(programs.changed_counts(raw, np.float32(values["epsilon"])))
    factors = ram_factors(*counts.astype(np.float32), r=np.float32(values["r"]), alpha=np.float32(values["alpha"]))
    return _prepare_pure(method, chunks, {**values, "factors": np.asarray(factors)}, has_base)


def _prepare_fusion(method: str, chunks: Chunks, values: Mapping[str, Any], has_base: bool) -> Prepared:
    del method, values, has_base
    ranks = [rank for ranks in quantile_ranks(chunks.size) for rank in ranks[:2]]
    wanted = [(0, lambda *_, rank=rank: rank) for rank in ranks]
    found = select(chunks, lambda raw: (programs.importance_bits(raw, row=chunks.row),), wanted)
    limit = np.float32(outlying([np.float32(selected.value) for selected in found], chunks.size))
    return _fixed(programs.outliers, limit, options={"row": chunks.row})


def _products(chunks: Chunks, *, kind: str, has_base: bool = True) -> np.ndarray:
    """Inner products, [J, J] float64, of the vectors that `programs.product_sums` makes of every chunk."""
    total: Any = 0.0
    for _, _, raw in chunks:
        lower = programs.product_sums(raw, kind=kind, has_base=has_base)
        found = np.zeros((len(lower), len(lower)))
        for i, row in enumerate(lower):
            for j, part in enumerate(row):
                found[i, j] = found[j, i] = np.sum(np.asarray(part))
        total = total + found
    if not np.all(np.isfinite(total)):
        raise OverflowError
    return np.asarray(total)


def _fixed(
    formula: Callable[..., jax.Array], *numbers: Any, options: Mapping[str, Any] | None = None,
    coefficients: tuple[float, ...] | None = None,
) -> Prepared:  # fmt: skip
    """A formula whose numbers are the same for every chunk."""
    return Prepared(formula, lambda start, count: numbers, tuple((options or {}).items()), coefficients)


def _share(fraction: float) -> Fraction:
    return Fraction(fraction).limit_denominator(46340)  # as fusejax.merging.selection reads fractions


def _trim_count(share: Fraction, size: int, nonzero: int) -> int:
    del nonzero
    return max(1, int(share * size))


def _ratio(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    return np.where(after == 0, 1, before / np.where(after == 0, 1, after)).astype(np.float32)


def _shares(energy: np.ndarray, floor: float) -> np.ndarray:
    total = energy.sum()
    if not math.isfinite(total):
        raise OverflowError
    if total == 0 or total < floor:
        return np.full(len(energy), 1 / len(energy))
    return energy / total


_ON_THEIR_OWN = ("linear", "task_arithmetic", "nearswap", "passthrough")
_PREPARE: Mapping[str, Callable[[str, Chunks, Mapping[str, Any], bool], Prepared]] = {
    "ties": _prepare_ties,
    "slerp": _prepare_slerp,
    **dict.fromkeys(("nuslerp", "multislerp", "karcher"), _prepare_spherical),
    "model_stock": _prepare_stock,
    **dict.fromkeys(("dare_linear", "dare_ties", "della", "della_linear"), _prepare_drop),
    **dict.fromkeys(("breadcrumbs", "breadcrumbs_ties"), _prepare_breadcrumbs),
    "ram": _prepare_ram,
    "arcee_fusion": _prepare_fusion,
}
