"""Merges of the stored inputs equal the stored outputs of mergekit, FuseAI's fork and the papers' equations.

mergekit's cases are run as its users run them: the stored recipe is parsed, planned and carried out.

Comparison classes, as the golden files' own notes define them: `f32` to 1e-6 of the largest element; `mix` to one
bfloat16 step; ties at a selection threshold may fall differently on a bounded share of elements; `bf16` outputs were
computed in bfloat16, so ours need only be as near to the float64 result as theirs; arcee_fusion's threshold is noisy.
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

from fusejax.merging import merge_trees
from fusejax.merging.plan import ModelFacts, TensorSpec
from fusejax.merging.planner import plan_merge
from fusejax.merging.recipe import parse_recipe
from tests.merging import oracle
from tests.merging.carry_out import carry_out
from tests.merging.oracle_methods import ORACLES
from tests.paths import GOLDEN

ROOT = GOLDEN / "merge"
pytestmark = pytest.mark.skipif(not ROOT.is_dir(), reason=f"golden merges are not at {ROOT}")


def cases(group: str) -> list[str]:
    return sorted(path.name for path in ROOT.glob(f"cases/{group}/*"))


@functools.cache
def load(directory: str) -> dict[str, np.ndarray]:
    return load_file(ROOT / directory / "model.safetensors")


def tokens_of(directory: str) -> dict[str, int] | None:
    path = ROOT / directory / "tokenizer.json"
    if not path.is_file():
        return None
    read = json.loads(path.read_text())
    return read["model"]["vocab"] | {token["content"]: token["id"] for token in read["added_tokens"]}


def facts(directory: str) -> ModelFacts:
    specs = {name: TensorSpec(x.shape, x.dtype.name) for name, x in load(directory).items()}
    return ModelFacts(specs, tokens_of(directory))


def planned(case: str):
    """The plan of a stored recipe, and the tensors of its models."""
    recipe = parse_recipe(yaml.safe_load((ROOT / "cases/mergekit" / case / "config.yml").read_text()))
    names = {source.model for piece in recipe.slices for source in piece.sources} | ({recipe.base} - {None})
    plan = plan_merge(recipe, {name: facts(name) for name in names})
    return plan, {name: load(name) for name in names}


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


def tolerated_share(case: str) -> float:
    """Which share of a model's elements may differ, as a threshold falls among equal or noisy values."""
    if re.search(r"(sce_top0\.[53]|ties)__mix|arcee_fusion", case):
        return 0.01
    return 0.10 if re.search(r"edge_(sce_top0\.4|ties)", case) else 0.0


def assert_only_ties(off, base, tensors, expected, actual, params: dict) -> None:
    """Differences lie within the tie at the threshold, and as many elements are kept."""
    tied = oracle.at_threshold(base, tensors, **params)
    assert not (off & ~tied).any()
    if expected.dtype == np.float32:
        assert ((expected != base) & tied).sum() == ((actual != base) & tied).sum()


def _marked(case: str):
    at_threshold = re.search(r"sce_top.*__f32", case)  # variances that differ in their last digits
    return pytest.param(case, marks=[pytest.mark.optimized] if at_threshold else [])


@pytest.mark.parametrize("case", [_marked(case) for case in cases("mergekit")])
def test_mergekit(case):
    plan, models = planned(case)
    stored = load(f"cases/mergekit/{case}")
    if plan.rows:  # mergekit gives new tokens ids in the order of a set
        ids = tokens_of(f"cases/mergekit/{case}")
        assert set(ids) == set(plan.tokens)
    wrong = total = 0
    names = set()
    for step, (base, tensors), actual in carry_out(plan, models):
        expected = stored[step.output]
        if step.vocabulary and plan.rows:
            expected = expected[[ids[token] for token in plan.tokens]]
        exact = ORACLES[step.method](base, tensors, **step.parameters)
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        off = disagreement(case, expected, actual, exact)
        if off.any() and tolerated_share(case) and step.method != "arcee_fusion":
            assert_only_ties(off, base, tensors, expected, actual, step.parameters)
        wrong, total = wrong + off.sum(), total + off.size
        names.add(step.output)
    assert names == set(stored)
    assert wrong <= tolerated_share(case) * total


@pytest.mark.parametrize("case", cases("fuseai_sce_fork"))
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


@pytest.mark.parametrize("case", cases("varm_paper"))
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


@pytest.mark.parametrize("case", cases("varm_release_arith"))
def test_varm_is_nearer_to_equation_7_than_the_released_arithmetic(case):
    config = json.loads((ROOT / "cases/varm_release_arith" / case / "config.json").read_text())
    base, targets = load(config["base"]), [load(path) for path in config["models"]]
    merged = merge_trees(base, targets, method="varm")
    stored = load(f"cases/varm_release_arith/{case}")
    assert set(stored) == set(merged)
    for name, expected in stored.items():
        squares = [((t[name].astype(np.float64) - base[name].astype(np.float64)) ** 2).mean() for t in targets]
        exact = oracle.varm(base[name], [t[name] for t in targets], weights=np.array(squares) / sum(squares))
        assert not disagreement(case, expected, merged[name], exact).any()
        error = np.abs(merged[name].astype(np.float64) - exact)
        assert (error <= 0.505 * oracle.bf16_step(exact) + 1e-7 * np.abs(exact).max()).all(), name


def test_every_stored_case_is_known():
    """A new golden folder must be read by a test or named here."""
    folders = {path.name for path in Path(ROOT / "cases").iterdir()}
    assert folders <= {"mergekit", "fuseai_sce_fork", "varm_paper", "varm_release_arith"}
