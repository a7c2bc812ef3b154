"""Metrics as one JSON object a line, appended; TensorBoard and Weights & Biases beside it where asked.

The file is the record of the run: a run that continues from step n first drops every line beyond n (they will be
written again) and a last line that a killed process left unfinished. Values that are not finite are written as
null, because NaN is not JSON.
"""

import importlib
import json
import math
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusejax.errors import InputError

__all__ = ["MetricsWriter", "read_metrics"]


class MetricsWriter:
    """Appends metrics of steps to `path`; a context manager.

    Args:
        path: the JSONL file; folders are made.
        resume_step: None starts the file anew; n keeps the lines of steps <= n.
        tensorboard_dir: also write scalars there; needs tensorboardX.
        wandb_project: also send scalars to this project; needs wandb, which finds its key and its mode
            (`WANDB_MODE=offline`) itself. A resumed run goes on in the same plot. No configuration is sent.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resume_step: int | None = None,
        tensorboard_dir: str | Path | None = None,
        wandb_project: str | None = None,
    ):
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [r for r in read_metrics(self._path) if r["step"] <= resume_step] if resume_step is not None else []
        self._board = None if tensorboard_dir is None else _tensorboard(tensorboard_dir, resume_step)
        self._wandb = None if wandb_project is None else _wandb(wandb_project, self._path.parent, resume_step)
        # Rewritten beside and renamed: a kill at this point loses no line.
        fresh = self._path.with_name(self._path.name + ".tmp")
        fresh.write_text("".join(_line(r) for r in kept), encoding="utf-8")
        fresh.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one line; `step` is the number of optimiser steps done."""
        self._file.write(_line({"step": step, **values}))
        self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=step)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._board is not None:
            self._board.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Returns the complete lines of a metrics file in order, [] where there is none."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines[:-1], start=1):  # text behind the last line end is an unfinished line
        try:
            record = json.loads(line)
            record["step"] = int(record["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}, line {number}: not a metrics record ({error}). Remove the line.") from error
        records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _tensorboard(directory: str | Path, resume_step: int | None) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise InputError("TensorBoard output needs tensorboardX: pip install tensorboardX.") from error
    return SummaryWriter(str(directory), purge_step=None if resume_step is None else resume_step + 1)


def _wandb(project: str, directory: Path, resume_step: int | None) -> Any:
    """A run of wandb; its id is kept beside the metrics, so that a resumed run is the same one."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise InputError("log.wandb_project needs wandb: pip install wandb.") from error
    kept = directory / "wandb-id"
    name = kept.read_text(encoding="utf-8").strip() if resume_step is not None and kept.is_file() else uuid.uuid4().hex
    kept.write_text(name + "\n", encoding="utf-8")
    return wandb.init(project=project, id=name, resume="allow", dir=str(directory), name=directory.name)
