"""Whether the disk holds what a run is still to make: the estimates of `fusejax plan`, less what is there.

Text is measured where that takes seconds: a finished corpus, or the beginnings of local files. Of a hub's dataset
nothing is known before it is downloaded; then only models and train states are counted, and that is said.
"""

__all__ = ["DiskNeed", "disk_need"]

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from fusejax.config import place_of
from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.io.models import open_config
from fusejax.models import ModelConfig
from fusejax.stages.context import Run
from fusejax.stages.corpus_size import planned_text
from fusejax.stages.plan_disk import BYTES_PER_TOKEN, disk_bytes
from fusejax.stages.prepare import EMBEDDED
from fusejax.stages.resume import REPLACED

# An artefact's name in docs/artefacts.md -> the stages that make it, and where in the run's directory.
_MADE_BY = {
    "A0 corpus": ({"prepare"}, "corpus"),
    "A1 captured": ({"capture"}, "captured"),
    "A3 aligned": ({"align"}, "aligned"),
    "A4 fused": ({"fuse"}, "fused"),
    "A6 train states": ({"train"}, "train"),
    "A7 models": ({"train", "merge"}, "models"),
    "A8 export": ({"export"}, "export"),
}
_OF_TEXT = ("A0 corpus", "A1 captured", "A3 aligned", "A4 fused")


class DiskNeed(NamedTuple):
    """What is still to be written to a disk."""

    parts: dict[str, int]  # artefact -> bytes
    free: int  # bytes
    place: Path
    text_known: bool

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is room for all of it."""
        return self.total <= self.free

    @property
    def text(self) -> str:
        """What is needed and what there is, in a line."""
        parts = ", ".join(f"{name[3:]} {size / 1e9:.1f}" for name, size in self.parts.items() if size)
        left_out = "" if self.text_known else "; without corpus and distributions, as its size is not known"
        return (
            f"about {self.total / 1e9:.1f} GB are still to be written ({parts or 'nothing'}{left_out}); "
            f"{self.place} has {self.free / 1e9:.1f} GB free"
        )


def disk_need(run: Run, names: Collection[str]) -> DiskNeed:
    """Estimates what stages are going to write, without weights.

    Args:
      run: of which; its directory need not be there.
      names: the stages.
    """
    place = next(path for path in (run.directory, *run.directory.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    wanted = {name for name, (stages, _) in _MADE_BY.items() if stages & set(names)}
    text = _text_bytes(run) if wanted & set(_OF_TEXT) else None
    if text is None:
        wanted -= set(_OF_TEXT)
    if not wanted:
        return DiskNeed({}, free, place, text is not None)
    sources = tuple(source for source in run.config.sources if source.name in run.participants)
    baseline = run.config.train.model_copy(update={"baseline": run.config.train.baseline and run.only is None})
    config = run.config.model_copy(update={"fusions": run.fusions, "sources": sources, "train": baseline})
    found = disk_bytes(config, _target(run), tokens=round((text or 0) / BYTES_PER_TOKEN))
    parts = {name: size for name, size in found.items() if name in wanted}
    if sum(parts.values()) > free:  # only then it is worth looking through many files
        parts = {name: max(0, size - _size(run.directory / _MADE_BY[name][1])) for name, size in parts.items()}
    return DiskNeed(parts, free, place, text is not None or not set(names) & {"prepare", "capture", "align", "fuse"})


def _target(run: Run) -> ModelConfig:
    target = run.config.target
    if place_of(target.model) in run.config.pretrained:
        return run.outlook(target).config
    return open_config(run.model_path(target))


def _text_bytes(run: Run) -> float | None:
    """Bytes of the training text that there is, or will be; None where that cannot be told quickly."""
    if (run.corpus_dir / MANIFEST).is_file():
        return float(read_manifest(run.corpus_dir, kind="corpus").facts["splits"]["train"]["bytes"])
    sources = (*run.config.corpus.train, *run.config.corpus.valid, *run.config.corpus.test)
    if not all(source.path == EMBEDDED or Path(source.path).exists() for source in sources):
        return None
    text = planned_text(run)
    return text.scale * sum(document.n_bytes for document in text.documents) if text.bounded else None


def _size(directory: Path) -> int:
    """Bytes below a directory, without what was set aside and so stays."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files if not any(REPLACED in part for part in path.parts))
