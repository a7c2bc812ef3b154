"""report: tables, curves and one self-contained page of a run that was evaluated."""

__all__ = ["command", "report_run"]

import json
from pathlib import Path
from typing import Any

from fusejax.config import load_config
from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.report import build_report
from fusejax.stages.command import Result, parser
from fusejax.stages.context import Run
from fusejax.stages.env import run as environment


def report_run(run: Run) -> Path:
    """Writes report.html, plots/ and the joint metrics.jsonl of a run."""
    result_file = run.directory / "result.json"
    if not result_file.is_file():
        raise InputError(f"{run.directory} has no result.json: run `fusejax evaluate CONFIG` first")
    result = json.loads(result_file.read_text())
    arms = [fusion.name for fusion in run.config.fusions] + (["clm"] if run.config.train.baseline else [])
    metrics = {arm: run.train_dir(arm) / "metrics.jsonl" for arm in arms}
    metrics = {arm: path for arm, path in metrics.items() if path.is_file()}
    _join(metrics, run.directory / "metrics.jsonl")
    return build_report(
        run.directory,
        result,
        metrics=metrics,
        alignment=_alignment(run),
        choices=_choices(run),
        configuration=run.config.model_dump(mode="json"),
        environment=environment(),
        title=f"fusejax: {run.directory.name}",
    )


def _facts(directory: Path) -> dict[str, Any]:
    return read_manifest(directory).facts if (directory / MANIFEST).is_file() else {}


def _alignment(run: Run) -> dict[str, dict[str, float]]:
    """Positions by what became of them, per source."""
    found = {source.name: _facts(run.aligned_dir(source.name)) for source in run.config.sources}
    kinds = ("aligned", "conditioned", "dropped")
    return {name: {kind: float(facts[kind]) for kind in kinds} for name, facts in found.items() if facts}


def _choices(run: Run) -> dict[str, dict[str, float]]:
    """Positions that each source supervises, per fusion."""
    found = {fusion.name: _facts(run.fused_dir(fusion.name)) for fusion in run.config.fusions}
    shares = {}
    for name, facts in found.items():
        if facts:
            left = facts["positions"] - facts["supervised"]
            shares[name] = {source: float(n) for source, n in facts["wins"].items()} | {"no distribution": float(left)}
    return shares


def _join(metrics: dict[str, Path], out: Path) -> None:
    """One line per logged step of every arm, with the arm's name."""
    with open(out, "w", encoding="utf-8") as file:
        for arm, path in metrics.items():
            for line in path.read_text(encoding="utf-8").splitlines():
                if line.strip():
                    file.write(json.dumps({"arm": arm} | json.loads(line)) + "\n")


def command(name: str, words: list[str]) -> Result:
    """`fusejax report DIR`: DIR is a run's directory."""
    arguments = parser(name, "Write report.html and plots/ of a run that was evaluated.")
    arguments.add_argument("directory", type=Path, help="the run's directory, or its configuration file")
    given = arguments.parse_args(words)
    config = given.directory / "config.yaml" if given.directory.is_dir() else given.directory
    run = Run(load_config(config))
    page = report_run(run)
    return Result({"report": str(page)}, str(page))
