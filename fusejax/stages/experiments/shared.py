"""The runs of an experiment in one directory: what determines an artefact names its place, so arms share it."""

__all__ = ["SharedRun", "key_of", "settings_of"]

from collections.abc import Collection
from pathlib import Path
from typing import Any

from fusejax.config import ModelRef, RunConfig
from fusejax.config.base import Config
from fusejax.io.manifest import fingerprint_of
from fusejax.stages.context import Run


def key_of(*parts: Any) -> str:
    """A short name of what determines an artefact."""
    return fingerprint_of(parts)[:12]


def settings_of(config: Config, *, without: Collection[str] = ("output",)) -> dict[str, Any]:
    """What a configuration says beyond the defaults, so that options to come change no name; manifests say the rest."""
    return config.model_dump(mode="json", exclude_defaults=True, exclude=set(without))


class SharedRun(Run):
    """One arm's run; its fusion is called `fused`, its baseline `clm`.

    Several arms, and several processes, work in the same directory. Where an artefact lies follows from the settings
    that determine it; its manifest, as in any run, says whether it is the one.
    """

    def __init__(self, config: RunConfig):
        """Opens nothing yet; `config.output` is the directory of the experiment."""
        super().__init__(config, only=("fused",))

    @property
    def corpus_dir(self) -> Path:
        """Artefact A0."""
        corpus = settings_of(self.config.corpus, without=("chat_template", "seed"))
        return self.directory / "corpus" / key_of(corpus, self.config.split_seed)

    def captured_dir(self, name: str) -> Path:
        """Artefact A1 of a source."""
        return self.directory / "captured" / f"{name}-{self._captured_key(name)}"

    def aligned_dir(self, name: str) -> Path:
        """Artefact A3 of a source."""
        return self.directory / "aligned" / f"{name}-{self._aligned_key(name)}"

    def fused_dir(self, name: str) -> Path:
        """Artefact A4 of a fusion."""
        return self.directory / "fused" / f"{name}-{self._fused_key(name)}"

    def train_dir(self, arm: str) -> Path:
        """Checkpoints and metrics of one training."""
        return self.directory / "train" / f"{arm}-{self._model_key(arm)}"

    def model_dir(self, arm: str) -> Path:
        """The trained model of an arm."""
        return self.directory / "models" / f"{arm}-{self._model_key(arm)}"

    def _captured_key(self, name: str) -> str:
        config, ref = self.config, self.participants[name]
        settings = settings_of(config.capture), settings_of(config.mesh)
        return key_of(self.corpus_dir.name, _identity(ref), config.corpus.chat_template, *settings)

    def _aligned_key(self, name: str) -> str:
        config, target = self.config, self.config.target
        settings = settings_of(config.align), target.chat_template
        return key_of(self._captured_key(name), self.tokenizer(target).fingerprint, *settings)

    def _fused_key(self, name: str) -> str:
        fusion = next(fusion for fusion in self.config.fusions if fusion.name == name)
        aligned = [self._aligned_key(source) for source in self.fusion_sources(fusion)]
        return key_of(aligned, settings_of(fusion))

    def _model_key(self, arm: str) -> str:
        config = self.config
        settings = [config.train, config.memory, config.mesh, config.faults] + [config.loss] * (arm != "clm")
        found = [settings_of(part) for part in settings]
        if arm == "clm":  # the fusion only gives the order
            weight = config.loss.clm_weight + config.loss.fusion_weight
            return key_of(self.corpus_dir.name, _identity(config.target), weight, config.seed, *found)
        return key_of(self._fused_key(arm), _identity(config.target), config.seed, *found)


def _identity(ref: ModelRef) -> dict[str, Any]:
    return settings_of(ref, without=("name",))
