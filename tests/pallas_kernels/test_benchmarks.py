"""The benchmarks of the kernels say what failed, what was not measured and what was not compiled."""

import importlib
import importlib.util
import itertools
import json

import jax.numpy as jnp
import pytest

from tests.pallas_kernels.compiled import quick_jit
from tests.paths import ROOT

MIB = 2**20
COLUMNS = {"name", "shape", "implementation", "baseline", "seconds", "peak_bytes", "ratio", "roofline", "device"}


@pytest.fixture
def load(monkeypatch):
    """Returns a function that imports a script of benchmarks, which is no package."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def aot(load):
    return load("aot_kernels")


@pytest.fixture
def bench(load, monkeypatch):
    """The benchmark of the losses with two tiny shapes, no measured ceilings and no other library."""
    module = load("fused_softmax_kl")
    monkeypatch.setattr(module, "SHAPES", [(64, 16, 128, 4), (32, 128, 4)])
    monkeypatch.setattr(module, "ceilings", lambda: (1e9, 1e9))
    return module


def _log(temporary=MIB, kernels=2, reports=2, spills=0, whole=()):
    """What the process that compiles writes."""
    ptxas = [
        "ptxas info    : Compiling entry function 'anonymous_mosaic_gpu_kernel' for 'sm_90a'",
        f"    0 bytes stack frame, {spills} bytes spill stores, 0 bytes spill loads",
        "ptxas info    : Used 91 registers, used 2 barriers, 1 bytes smem",
    ]
    facts = {"temporary_bytes": temporary, "kernels": kernels, "whole_logits": list(whole), "seconds_to_compile": 1.0}
    return "\n".join(["JIT session", *ptxas * reports, "facts: " + json.dumps(facts)])


def test_a_compiled_kernel_needs_evidence_that_it_is_good(aot):
    small, linear = aot.Case(2048, 32000), aot.Case(8192, 32000, 4096)
    good = aot.judged("h200", small, _log())
    assert good["ok"] and good["problems"] == []
    assert (good["registers"], good["spilled_bytes"], good["kernels"], good["gathered"]) == ([91, 91], 0, 2, 33)
    for case, log, said in (
        (small, _log(spills=8), "spills 16 bytes"),
        (small, _log(reports=0), "0 kernels' registers and 0 kernels' spills"),
        (small, _log(reports=1), "1 kernels' registers and 1 kernels' spills"),
        (small, _log(kernels=1), "1 kernels, expected 2"),
        (small, _log(temporary=126 * MIB), "over the budget"),
        (linear, _log(whole=["bf16[8192,32000]"]), "holds the logits of all tokens: bf16[8192,32000]"),
        (small, "Traceback\nJaxRuntimeError: INTERNAL: no\nlater", "does not compile: JaxRuntimeError: INTERNAL: no"),
        (small, "", "does not compile: nothing was said"),
    ):
        row = aot.judged("h200", case, log)
        assert not row["ok"] and said in "; ".join(row["problems"]), row
        assert said in aot.markdown([row]) and "| NO |" in aot.markdown([row])
    assert aot.judged("h200", small, _log(whole=["bf16[2048,32000]"]))["ok"]  # given at level 1
    tpu = aot.judged("v5p", small, _log(reports=0))
    assert tpu["ok"] and tpu["registers"] is None
    wide = aot.judged("h200", aot.Case(2048, 50257), _log(reports=0, kernels=0))
    assert wide["ok"] and wide["implementation"] == "xla"


def test_budgets_leave_no_room_for_another_array_of_logits(aot):
    for chip in aot.CHIPS:
        for case in aot.cases(chip):
            logits = 2 * case.tokens * case.vocab
            needed = sum(aot.needed(chip, case).values())
            assert len({case.tokens, case.vocab, case.embed}) == 3
            assert (aot.HEADROOM - 1) * needed < (min(4 * case.chunk * case.vocab, logits) if case.embed else logits)
    assert {case.gathered for case in aot.cases("h200")} == {33, 257, 513} == {c.gathered for c in aot.cases("v5p")}


def test_logits_of_all_tokens_are_found_in_a_program(aot):
    case = aot.Case(8192, 32000, 4096)
    found = "f32[8192,32000]{1,0}", "(bf16[4,2048,32000]{2,1,0:T(8,128)}", "pred[32000,8192]"
    clean = "f32[2048,32000]", "bf16[4096,32000]{1,0}", "s32[8192,33]", "f32[]", "bf16[8192,4096]"
    assert aot.whole_logits(" ".join(clean), case) == []
    assert aot.whole_logits(" ".join((*clean, *found)), case) == [
        "bf16[4,2048,32000]",
        "f32[8192,32000]",
        "pred[32000,8192]",
    ]


def test_committed_results_keep_the_budgets(aot):
    rows = json.loads((ROOT / "docs/results/kernels_aot.json").read_text())["rows"]
    expected = [(aot.CHIPS[chip][2], case) for chip in aot.CHIPS for case in aot.cases(chip)]
    assert len(rows) == len(expected)
    for row, (device, case) in zip(rows, expected, strict=True):
        assert row["ok"] and row["device"] == device and row["gathered"] == case.gathered
        assert row["shape"] == [case.tokens, *([case.embed] if case.embed else []), case.vocab]


def test_nothing_compiled_is_no_success(aot, monkeypatch, tmp_path, capsys):
    results, compiled = tmp_path / "rows.json", []

    def compile_apart(chip, case):
        compiled.append(chip)
        return _log(temporary=0)

    monkeypatch.setattr(aot, "compile_apart", compile_apart)
    monkeypatch.setattr(aot, "missing_compiler", lambda chip: "no wheel" if chip == "h200" else None)
    results.write_text("kept")
    for words in ([], ["--chips", "h200"], ["--chips", "h200", "--allow-missing"], ["--chips", "v5e,h200"]):
        assert aot.main([*words, "--json", str(results)]) == 1
        assert results.read_text() == "kept" and not compiled
        assert "h200: cannot be compiled for, no wheel" in capsys.readouterr().err
    assert aot.main(["--chips", "v5e,h200", "--allow-missing", "--json", str(results)]) == 0
    written = json.loads(results.read_text())
    assert written["skipped"] == {"h200": "no wheel"} and len(written["rows"]) == 3 and compiled == ["v5e"] * 3
    monkeypatch.setattr(aot, "compile_apart", lambda chip, case: "Killed")
    assert aot.main(["--chips", "v5e"]) == 1
    with pytest.raises(SystemExit) as stopped:
        aot.main(["--chips", "v5x"])
    assert stopped.value.code == 2 and "unknown chips: v5x" in capsys.readouterr().err


@pytest.mark.once
def test_losses_are_measured_shape_by_shape(bench, monkeypatch, tmp_path, capsys):
    path, states, write = tmp_path / "new" / "rows.json", [], bench.write
    find = importlib.util.find_spec
    monkeypatch.setattr("jax.jit", quick_jit)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "tokamax") else find(name))

    def spy(where, report):
        write(where, report)
        states.append(json.loads(path.read_text()))

    monkeypatch.setattr(bench, "write", spy)
    assert bench.main(["--json", str(path), "--rounds", "2"]) == 0
    assert [(state["complete"], {len(row["shape"]) for row in state["rows"]}) for state in states] == [
        (False, {4}),
        (True, {3, 4}),
    ]
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]
    rows = {(len(row["shape"]), row["implementation"]): row for row in states[-1]["rows"]}
    assert all(set(row) >= COLUMNS and row["error"] is None for row in rows.values())
    for (_, name), row in rows.items():
        if "torch" in name or "tokamax" in name:
            assert row["skipped"].endswith("is not installed") and row["seconds"] is None
            continue
        assert row["seconds"] > 0 and row["rounds"] == 2 and row["temporary_bytes"] > 0 and row["skipped"] is None
        assert row["backend"] == ("xla" if name.startswith("ours") else None)
        assert (row["gradient_error"] is None) == ("CLM only" in name)
    targets = states[-1]["targets"]
    assert [(t["bound"], t["met"] is None) for t in targets] == [(1 / 14, False), (0.70, False), (0.35, True)]
    temporary = [rows[4, name]["temporary_bytes"] for name in ("ours one-pass", "naive dense")]
    assert targets[0]["value"] == temporary[0] / temporary[1]
    assert {"jax", "numpy", "python"} <= set(states[-1]["versions"])
    assert "tokamax is not installed" in capsys.readouterr().out


def _fakes(bench, monkeypatch, **builders):
    """Makes the benchmark measure these, beside a baseline whose gradient is 1."""

    def candidate(gradient=1.0, run=lambda: 3.0):
        return lambda: bench.Candidate(run, float, lambda out: (jnp.asarray([gradient]),), {"temporary_bytes": 1})

    made = {"naive dense": candidate()}
    for name, how in builders.items():
        made[name.replace("_", " ")] = candidate(**how) if isinstance(how, dict) else how
    monkeypatch.setattr(bench, "candidates", lambda shape: made)


def _failing():
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")


def test_what_fails_is_a_row_and_the_others_go_on(bench, monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.json"
    later = itertools.chain([3.0, 3.0, 3.0], iter(_failing, None))  # two runs before the rounds, and one of them
    ours = {"ours_one-pass": _failing, "ours_recompute": {"gradient": 1.1}, "ours": {}}
    _fakes(bench, monkeypatch, **ours, torch=_failing, sparse_XLA={"run": lambda: next(later)})
    assert bench.main(["--json", str(path)]) == 1
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 12
    errors = {row["implementation"]: row["error"] for row in rows[:6]}
    assert errors["naive dense"] is None and errors["ours"] is None
    for name in ("ours one-pass", "torch", "sparse XLA"):
        assert errors[name] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert "0.1 from the baseline's, more than 0.001" in errors["ours recompute"]
    assert rows[0]["seconds"] > 0 and rows[0]["rounds"] == 5
    out = capsys.readouterr().out
    assert "FAILED: [64, 16, 128, 4], ours one-pass: RuntimeError" in out and "4], torch: Runtime" not in out
    _fakes(bench, monkeypatch, torch=_failing)
    assert bench.main(["--json", str(path)]) == 0
    monkeypatch.setattr(bench, "candidates", lambda shape: _failing())
    assert bench.main(["--json", str(path)]) == 1
    assert [r["implementation"] for r in json.loads(path.read_text())["rows"]] == ["every candidate"] * 2


def test_time_that_is_short_is_said(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    _fakes(bench, monkeypatch, ours={})
    assert bench.main(["--minutes", "0"]) == 0
    report = json.loads((tmp_path / "runs" / "fused_softmax_kl_cpu.json").read_text())
    assert [row["skipped"] for row in report["rows"]] == ["no time was left"] * 4
    assert all(target["met"] is None for target in report["targets"])
    out = capsys.readouterr().out
    assert "no time was left" in out and "runs/fused_softmax_kl_cpu.json" in out and "not measured" in out
    rows, ready = bench.build((64, 16, 128, 4), 60.0)
    bench.take_turns(rows, {name: (candidate, 1.0) for name, (candidate, _) in ready.items()}, 20, 6.5)
    assert "only 3 of 20 rounds fit the time" in capsys.readouterr().out
    assert [row["rounds"] for row in rows.values()] == [3, 3]


def test_targets_on_a_gpu_are_of_the_ceilings_and_of_clm_alone(bench, monkeypatch):
    monkeypatch.setattr(bench, "ON_GPU", True)
    two, one = bench.SHAPES
    rows = []
    for shape, name, seconds, share in (
        (two, "ours one-pass", 1.04, 0.76),
        (two, "optax CLM only", 1.2, None),
        (two, "ours CLM only", 1.0, None),
        (one, "ours", 0.5, 0.79),
    ):
        rows.append(bench.blank(shape, name) | {bench.CLOCK: seconds, "roofline": share})
    assert [(t["value"], t["bound"], t["met"]) for t in bench.targets(rows)] == [
        (0.76, 0.75, True),
        (1.04, 1.05, True),
        (0.79, 0.8, False),
    ]
