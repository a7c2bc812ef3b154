"""The scripts of benchmarks: help, what is missing said first, and what they ask of fusejax and of the judges."""

import json
import os
import shutil
import subprocess

import pytest

from tests.paths import ROOT

pytestmark = pytest.mark.once

PLACE = ROOT / "scripts" / "benchmarks"
SCRIPTS = sorted(path.name for path in PLACE.glob("*.sh") if path.name != "common.sh")
KEYED = ("alpaca_eval.sh", "mt_bench.sh")


def _run(script, *words, cwd, **environment):
    values = {"PATH": f"{cwd / 'bin'}:{os.environ['PATH']}", "HOME": str(cwd)} | environment
    command = ["bash", str(PLACE / script), *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=values, check=False)


@pytest.fixture
def place(tmp_path):
    """A directory with a model and stand-ins that write down how they were called."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "model").mkdir()
    for name in ("fusejax", "git", "docker", "curl", "python3"):
        stand_in = tmp_path / "bin" / name
        lines = [
            "#!/bin/sh",
            f'echo "{name} $*" >> {tmp_path}/calls',
            f"[ ! -f {tmp_path}/does-{name} ] || . {tmp_path}/does-{name}",
        ]
        stand_in.write_text("\n".join(lines) + "\n")
        stand_in.chmod(0o755)
    return tmp_path


def _calls(place):
    return (place / "calls").read_text().splitlines() if (place / "calls").exists() else []


def test_there_is_one_for_every_benchmark():
    assert SCRIPTS == ["alpaca_eval.sh", "bbh_cot.sh", "commonsense.sh", "mt_bench.sh", "multipl_e.sh"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_what_is_needed_and_a_wrong_call_does_nothing(script, place):
    helped = _run(script, "--help", cwd=place)
    assert helped.returncode == 0 and f"scripts/benchmarks/{script} MODEL_DIR" in helped.stdout
    assert "Needs:" in helped.stdout
    assert len((PLACE / script).read_text().splitlines()) <= 80
    for words, said in ((), "MODEL_DIR"), (("nowhere",), "nowhere is no directory"):
        found = _run(script, *words, cwd=place)
        assert found.returncode == 2 and said in found.stderr
    if script in KEYED:
        found = _run(script, "model", cwd=place)
        assert found.returncode == 2 and "OPENAI_API_KEY is not set" in found.stderr
    assert _calls(place) == []


@pytest.mark.parametrize(
    ("script", "tasks"),
    [("bbh_cot.sh", "bbh_cot_fewshot"), ("commonsense.sh", "arc_easy arc_challenge boolq hellaswag openbookqa")],
)
def test_tasks_of_the_harness_go_to_fusejax(script, tasks, place):
    assert _run(script, "model", "--limit", "3", cwd=place).returncode == 0
    (call,) = _calls(place)
    assert call.startswith(f"fusejax evaluate --model model --tasks {tasks} --") and call.endswith("--limit 3")


def test_mt_bench_answers_where_the_judge_looks(place):
    bench = place / "runs/mt_bench/FastChat/fastchat/llm_judge/data/mt_bench"
    (bench / "reference_answer").mkdir(parents=True)
    (bench / "reference_answer" / "gpt-4.jsonl").write_text("{}")
    python = place / "runs/mt_bench/venv/bin/python"
    python.parent.mkdir(parents=True)
    shutil.copy(place / "bin" / "python3", python)
    found = _run("mt_bench.sh", "model", cwd=place, OPENAI_API_KEY="secret", NAME="mine", JUDGE="other")
    assert found.returncode == 0, found.stderr
    answer, install, judge, shown = _calls(place)
    assert "answer --model model --format mt_bench" in answer and "question.jsonl --name mine" in answer
    assert answer.endswith("model_answer/mine.jsonl")
    assert "[model_worker,llm_judge]" in install
    assert "gen_judgment.py --model-list mine --judge-model other" in judge and "show_result.py" in shown
    assert (bench / "reference_answer" / "other.jsonl").is_file()
    assert "secret" not in found.stdout + found.stderr


def test_alpaca_eval_judges_what_was_answered(place):
    work = place / "runs/alpaca_eval"
    work.mkdir(parents=True)
    (work / "alpaca_eval.json").write_text("[]")
    (work / "venv/bin").mkdir(parents=True)
    for name in ("python", "alpaca_eval"):
        shutil.copy(place / "bin" / "python3", work / "venv/bin" / name)
    found = _run("alpaca_eval.sh", "model", cwd=place, OPENAI_API_KEY="secret", ANSWER="--temperature 0.7 --seed 3")
    assert found.returncode == 0, found.stderr
    answer, install, judge = _calls(place)
    assert "--format alpaca_eval" in answer and answer.endswith("model.json --temperature 0.7 --seed 3")
    assert install.endswith("alpaca-eval")
    assert "--model_outputs runs/alpaca_eval/model.json" in judge and "weighted_alpaca_eval_gpt4_turbo" in judge


def test_multipl_e_counts_the_programs_that_pass(place):
    import gzip

    (place / "bin" / "python3").unlink()
    (place / "runs/multipl_e/questions").mkdir(parents=True)
    (place / "runs/multipl_e/questions/rs.jsonl").write_text("{}\n")
    results = place / "results"
    results.mkdir()
    statuses = {"a": [("OK", 0), ("OK", 0)], "b": [("OK", 0), ("Exception", 1)], "c": [("Timeout", -1)] * 2}
    for name, ended in statuses.items():
        rows = [{"status": status, "exit_code": code} for status, code in ended]
        (results / f"{name}.results.json.gz").write_bytes(gzip.compress(json.dumps({"results": rows}).encode()))
    (place / "does-docker").write_text(f"cp {results}/* runs/multipl_e/model/rs/\n")
    (place / "does-fusejax").write_text("mkdir -p runs/multipl_e/model/rs\n")
    found = _run("multipl_e.sh", "model", cwd=place, LANGUAGES="rs")
    assert found.returncode == 0, found.stderr
    answer, run = _calls(place)
    assert "--format multipl_e" in answer and "--samples 20 --temperature 0.2 --top-p 0.95" in answer
    assert run.startswith("docker run --rm --network none --volume ") and run.endswith("--dir /work --output-dir /work")
    assert "rs: pass@1 0.500 over 3 problems" in found.stdout
