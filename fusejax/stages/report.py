"""report: tables, curves and one self-contained page of a run, finished or not."""

__all__ = ["command", "report_run"]

import json
from pathlib import Path

from fusejax.config import load_config
from fusejax.report import build_report
from fusejax.stages.command import Result, parser
from fusejax.stages.context import Run
from fusejax.stages.durations import read_durations
from fusejax.stages.env import run as environment
from fusejax.stages.report_facts import alignment_facts, choices, merge_facts, missing, trained_facts, worst_spans
from fusejax.train.metrics import read_metrics


def report_run(run: Run) -> Path:
    """Writes report.html, plots/ and the joint metrics.jsonl of a run, of what is there."""
    result_file = run.directory / "result.json"
    result = json.loads(result_file.read_text()) if result_file.is_file() else {}
    arms = [fusion.name for fusion in run.config.fusions] + (["clm"] if run.config.train.baseline else [])
    metrics = {arm: run.train_dir(arm) / "metrics.jsonl" for arm in arms}
    metrics = {arm: path for arm, path in metrics.items() if path.is_file()}
    _join(metrics, run.directory / "metrics.jsonl")
    alignment = alignment_facts(run)
    seconds = read_durations(run.directory)
    return build_report(
        run.directory,
        result,
        metrics=metrics,
        alignment=alignment,
        spans=worst_spans(run, alignment),
        choices=choices(run),
        merges=merge_facts(run),
        trained=trained_facts(run, arms),
        seconds={name: took for name, took in seconds.items() if name != "report"},
        missing=missing(run, arms, evaluated=bool(result)),
        configuration=run.config.model_dump(mode="json"),
        environment=environment(),
        title=f"fusejax: {run.directory.name}",
    )


def _join(metrics: dict[str, Path], out: Path) -> None:
    """One line per logged step of every arm, with the arm's name."""
    with open(out, "w", encoding="utf-8") as file:
        for arm, path in metrics.items():
            for row in read_metrics(path):
                file.write(json.dumps({"arm": arm} | row) + "\n")


def command(name: str, words: list[str]) -> Result:
    """`fusejax report DIR`: DIR is a run's directory."""
    arguments = parser(name, "Write report.html and plots/ of a run, of what it has made so far.")
    arguments.add_argument("directory", type=Path, help="the run's directory, or its configuration file")
    given = arguments.parse_args(words)
    config = given.directory / "config.yaml" if given.directory.is_dir() else given.directory
    run = Run(load_config(config))
    page = report_run(run)
    return Result({"report": str(page)}, str(page))
