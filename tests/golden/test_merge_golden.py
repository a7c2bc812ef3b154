"""Merges of the stored inputs equal the stored outputs of mergekit, FuseAI's fork and the papers' equations.

Comparison classes, as the golden files' own notes define them: `f32` to 1e-6 of the largest element; `mix` to one
bfloat16 step; ties at a selection threshold may fall differently on a bounded share of elements; `bf16` outputs were
computed in bfloat16, so ours need only be as near to the float64 result as theirs.
"""

import functools
import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from fusejax.merging import merge_leaf, merge_trees
from tests.merging import oracle
from tests.paths import GOLDEN

ROOT = GOLDEN / "merge"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"golden merges are not at {ROOT}")
METHODS = ("linear", "sce", "slerp", "task_arithmetic", "ties")
RENAMED = {"weight": "weights", "lambda": "scale"}
LATER = {"vocab_union_linear__f32", "vocab_base_ta__f32"}  # merge tokenizers: the recipe reader's work


def mergekit_cases() -> list[str]:
    """Names of the stored mergekit runs whose method is implemented here."""
    found = []
    for path in sorted(ROOT.glob("cases/mergekit/*/config.yml")):
        config = yaml.safe_load(path.read_text())
        if config["merge_method"] in METHODS and path.parent.name not in LATER:
            found.append(path.parent.name)
    return found


def fork_cases() -> list[str]:
    return sorted(path.name for path in ROOT.glob("cases/fuseai_sce_fork/*"))


@functools.cache
def load(directory: str) -> dict[str, np.ndarray]:
    return load_file(ROOT / directory / "model.safetensors")


def at_layer(value, position: float, name: str):
    """A mergekit setting for one tensor: filters first, then a gradient over the layers."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = next(entry["value"] for entry in value if entry.get("filter", "") in name)
    if not isinstance(value, list):
        return value
    return float(np.interp(position, np.linspace(0, 1, len(value)), value))


def layer_of(name: str) -> int | None:
    found = re.search(r"\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def tensor_settings(config: dict, name: str) -> tuple[list[np.ndarray], dict]:
    """The source tensors and parameters that make one output tensor."""
    layer = layer_of(name)
    if "slices" in config:
        (piece,) = config["slices"]
        sources, count = piece["sources"], int(np.diff(piece["sources"][0]["layer_range"])[0])
    else:
        sources, count = config["models"], 3
    position = 0.0 if layer is None else layer / (count - 1)
    tensors, params = (
        [],
        {RENAMED.get(k, k): at_layer(v, position, name) for k, v in config.get("parameters", {}).items()},
    )
    for source in sources:
        first = source.get("layer_range", [0])[0]
        source_name = name if layer is None else name.replace(f".{layer}.", f".{layer + first}.")
        tensors.append(load(source["model"])[source_name])
        for key, value in source.get("parameters", {}).items():
            params.setdefault(RENAMED.get(key, key), []).append(at_layer(value, position, name))
    return tensors, params


def disagreement(case: str, expected, actual, exact) -> np.ndarray:
    """Which elements of one tensor are outside the tolerance of the case's class."""
    suffix = case.rsplit("__", 1)[1]
    mine, theirs = (np.abs(x.astype(np.float64) - exact) for x in (actual, expected))
    upcast = case.startswith(("linear", "slerp"))  # these two compute in float32 whatever the dtype
    if suffix == "bf16" and not upcast:
        assert mine.max() <= theirs.max() + 1e-12 and mine.mean() <= theirs.mean() + 1e-12
        return np.zeros(exact.shape, bool)
    allowed = 1e-6 * np.abs(exact).max()
    if suffix != "f32":
        allowed = np.maximum(oracle.bf16_step(exact), allowed)
    return np.abs(actual.astype(np.float64) - expected.astype(np.float64)) > allowed


def tie_share(case: str) -> float:
    """Which share of a model's elements may differ because ties at the threshold fall differently."""
    if re.search(r"(sce_top0\.[53]|ties)__mix", case):
        return 0.01
    return 0.10 if re.search(r"edge_(sce_top0\.4|ties)", case) else 0.0


def assert_only_ties(off, base, tensors, expected, actual, params: dict) -> None:
    """Differences lie within the tie at the threshold, and as many elements are kept."""
    tied = oracle.at_threshold(base, tensors, **params)
    assert not (off & ~tied).any()
    if expected.dtype == np.float32:
        assert ((expected != base) & tied).sum() == ((actual != base) & tied).sum()


@pytest.mark.parametrize("case", mergekit_cases())
def test_mergekit(case):
    config = yaml.safe_load((ROOT / "cases/mergekit" / case / "config.yml").read_text())
    base = load(config["base_model"]) if "base_model" in config else None
    method = config["merge_method"]
    stored = load(f"cases/mergekit/{case}")
    assert stored
    wrong = total = 0
    for name, expected in stored.items():
        tensors, params = tensor_settings(config, name)
        if method == "sce":
            params["variant"] = "mergekit"
        origin = None if base is None else base[name]
        actual = merge_leaf(name, origin, tensors, method=method, params=params)
        exact = oracle.ORACLES[method](origin, tensors, **params)
        assert actual.dtype == tensors[0].dtype == expected.dtype
        off = disagreement(case, expected, actual, exact)
        if off.any() and tie_share(case):
            assert_only_ties(off, origin, tensors, expected, actual, params)
        wrong, total = wrong + off.sum(), total + off.size
    assert wrong <= tie_share(case) * total


@pytest.mark.parametrize("case", fork_cases())
def test_fuseai_fork(case):
    config = json.loads((ROOT / "cases/fuseai_sce_fork" / case / "config.json").read_text())
    base, targets = load(config["base"]), [load(path) for path in config["models"]]
    merged = merge_trees(base, targets, method="sce", select_topk=config["select_topk"])
    stored = load(f"cases/fuseai_sce_fork/{case}")
    assert set(stored) == set(merged)
    for name, expected in stored.items():
        exact = oracle.sce(base[name], [t[name] for t in targets], select_topk=config["select_topk"], variant="fuseai")
        assert not disagreement(case, expected, merged[name], exact).any(), name


def test_exact_result_is_rounded_once():
    base, targets = load("inputs/bf16/base"), [load(f"inputs/bf16/ft{j}") for j in (1, 2, 3)]
    for params in ({"select_topk": 1.0}, {"select_topk": 0.1}, {"variant": "paper"}):
        merged = merge_trees(base, targets, method="sce", **params)
        for name, actual in merged.items():
            exact = oracle.sce(base[name], [t[name] for t in targets], **params)
            assert actual.dtype == ml_dtypes.bfloat16
            # Half a step, and what float32 adds to a value half-way between two.
            assert (np.abs(actual.astype(np.float64) - exact) <= 0.505 * oracle.bf16_step(exact)).all(), name


@pytest.mark.parametrize("case", sorted(path.name for path in ROOT.glob("cases/varm_paper/*")))
def test_varm(case):
    config = json.loads((ROOT / "cases/varm_paper" / case / "config.json").read_text())
    base, targets = load(config["base"]), [load(path) for path in config["models"]]
    options = {"method": "varm", "granularity": config["granularity"]}
    merged, factors = merge_trees(base, targets, coefficients=True, **options)
    stored = load(f"cases/varm_paper/{case}")
    assert set(stored) == set(merged)
    for name, expected in stored.items():
        (weights,) = [w for unit, w in config["weights"].items() if f"{name}.".startswith(f"{unit}.") or unit == "*"]
        np.testing.assert_allclose(factors[name], weights, rtol=1e-5, atol=1e-7, err_msg=name)
        exact = oracle.varm(base[name], [t[name] for t in targets], weights=weights)
        allowed = 1e-6 * np.abs(exact).max()
        if expected.dtype == ml_dtypes.bfloat16:
            allowed = np.maximum(oracle.bf16_step(exact), allowed)
        assert (np.abs(merged[name].astype(np.float64) - expected.astype(np.float64)) <= allowed).all(), name


def test_every_stored_case_is_known():
    """A new golden folder must be read by a test or named here."""
    folders = {path.name for path in Path(ROOT / "cases").iterdir()}
    assert folders <= {"mergekit", "fuseai_sce_fork", "varm_paper", "varm_release_arith"}
