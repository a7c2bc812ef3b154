"""experiments: the arms of a question, trained with several seeds and set side by side.

`fusejax experiments run NAME` makes all rows of `configs/experiments/NAME.yaml` and writes table, plot and JSON. Rows
that are made are kept: a run that was stopped goes on, and the same command started twice shares the work.
"""

__all__ = ["command", "run_experiment"]

import importlib.metadata
import os
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fusejax.config.experiment import ExperimentConfig, load_experiment
from fusejax.errors import InputError, nearest
from fusejax.io.progress import say
from fusejax.stages.command import Result, parser
from fusejax.stages.experiments.arms import Lab, Row
from fusejax.stages.experiments.results import write_results

_CONFIGS = Path("configs/experiments")


def run_experiment(
    experiment: ExperimentConfig,
    directory: Path,
    *,
    data: Path,
    arms: Collection[str] | None = None,
    seeds: Collection[int] | None = None,
) -> list[Row]:
    """Makes the rows of an experiment, seed by seed so that the first gives a whole table early.

    Args:
      experiment: what is asked.
      directory: of its artefacts.
      data: what `{data}` stands for.
      arms, seeds: only these; None: all.
    """
    lab = Lab(experiment, directory, data=data)
    lab.check()
    directory.mkdir(parents=True, exist_ok=True)
    wanted = [
        (arm, seed)
        for seed in dict.fromkeys(seed for arm in experiment.arms for seed in experiment.seeds_of(arm))
        for arm in experiment.arms
        if seed in experiment.seeds_of(arm)
        if (arms is None or arm.name in arms) and (seeds is None or seed in seeds)
    ]
    rows = []
    for number, (arm, seed) in enumerate(wanted, start=1):
        row = lab.row(arm, seed)
        mean = row.bits_per_byte["test"]["mean"]
        say(f"{number}/{len(wanted)} {arm.name}, seed {seed}: {mean:.4f} bits per byte, {row.seconds:.0f} s")
        rows.append(row)
    order = [arm.name for arm in experiment.arms]
    return sorted(rows, key=lambda row: (order.index(row.arm), row.seed))


def command(name: str, words: list[str]) -> Result:
    """`fusejax experiments run NAME`, or `fusejax experiments list`."""
    arguments = parser(name, "Run the arms of an experiment, or list the experiments there are.")
    arguments.add_argument("action", choices=("run", "list"), help="what to do")
    arguments.add_argument("experiment", nargs="?", help=f"name in {_CONFIGS}, or a YAML file")
    arguments.add_argument(
        "--out", type=Path, default=Path("runs/experiments"), help="directory of artefacts, which experiments share"
    )
    arguments.add_argument(
        "--results", type=Path, help="directory of table, plot and JSON (default: `results` in --out)"
    )
    arguments.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get("FUSEJAX_DATA", "../shared/data")),
        help="directory that {data} stands for; the variable FUSEJAX_DATA is its default",
    )
    arguments.add_argument("--arms", help="only these arms, separated by commas")
    arguments.add_argument("--seeds", help="only these seeds, separated by commas")
    arguments.add_argument("--scale", help="another size that the experiment has, such as gpu")
    arguments.add_argument(
        "--minutes", type=float, help="stop after this time with exit code 85; the same command goes on"
    )
    given = arguments.parse_args(words)
    if given.action == "list":
        return _list()
    if given.experiment is None:
        raise InputError("experiments run needs the name of an experiment; `fusejax experiments list` lists them")
    experiment = load_experiment(_find(given.experiment), scale=given.scale)
    if given.minutes is not None:
        _stop_after(given.minutes)
    start = time.monotonic()
    rows = run_experiment(
        experiment,
        given.out,
        data=given.data,
        arms=_chosen(given.arms, [arm.name for arm in experiment.arms], "arm"),
        seeds=_seeds(given.seeds),
    )
    facts = _facts() | {"seconds": round(time.monotonic() - start, 1)}
    facts["seconds_of_rows"] = round(sum(row.seconds for row in rows), 1)
    words = ["fusejax", "experiments", "run", given.experiment]
    for option in ("scale", "arms", "seeds"):
        if value := getattr(given, option):
            words += [f"--{option}", shlex.quote(value)]
    place = given.results or given.out / "results"
    table = write_results(experiment, rows, place, command=" ".join(words), facts=facts)
    data = {"experiment": experiment.name, "rows": [row._asdict() for row in rows], "results": str(place), **facts}
    return Result(data, f"{table}\n{place / experiment.name}.md, .json, .png")


def _list() -> Result:
    found = {path.stem: load_experiment(path).title for path in sorted(_CONFIGS.glob("*.yaml"))}
    if not found:
        raise InputError(f"no experiments in {_CONFIGS}; run this in the project's root")
    return Result({"experiments": found}, "\n".join(f"{name:<16} {title}" for name, title in found.items()))


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return path
    known = sorted(found.stem for found in _CONFIGS.glob("*.yaml"))
    if name not in known:
        where = f"Experiments in {_CONFIGS}: {', '.join(known)}" if known else f"{_CONFIGS} is not here"
        raise InputError(f"no experiment {name!r}.{nearest(name, known)} {where}")
    return _CONFIGS / f"{name}.yaml"


def _chosen(text: str | None, known: Sequence[str], what: str) -> list[str] | None:
    """The names in a list that commas divide; a name may have commas of its own."""
    if text is None:
        return None
    parts, names = [part.strip() for part in text.split(",") if part.strip()], []
    while parts:
        length = next((n for n in range(len(parts), 0, -1) if ", ".join(parts[:n]) in known), None)
        if length is None:
            raise InputError(f"no {what} {parts[0]!r}.{nearest(parts[0], known)} There are: {', '.join(known)}")
        names.append(", ".join(parts[:length]))
        parts = parts[length:]
    return names


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--seeds must be whole numbers separated by commas, got {text!r}") from error


def _stop_after(minutes: float) -> None:
    """Asks this process to stop as a scheduler would: the step is finished and saved."""
    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def _facts() -> dict[str, Any]:
    import jax

    packages = ("jax", "flax", "optax", "numpy", "transformers")
    return {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "fusejax": importlib.metadata.version("fusejax")}
        | {name: importlib.metadata.version(name) for name in packages},
        "platform": sys.platform,
    }
