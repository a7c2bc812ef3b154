"""What the stages of one run share: where its artefacts lie, and models and tokenizers opened once.

A stage asks `finished` whether its artefact stands with the same settings and parents; then it does nothing.
An artefact made with other settings is replaced by its stage, and by nothing else.
"""

__all__ = ["Run", "finished"]

import errno
import shutil
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from fusejax.config import FusionConfig, ModelRef, RunConfig, place_of, save_config
from fusejax.data.chat import template_of
from fusejax.data.encoding import DocumentEncoder
from fusejax.errors import InputError, nearest
from fusejax.io.manifest import MANIFEST, SCHEMA_VERSION, Manifest, fingerprint_of, read_manifest
from fusejax.io.models import LoadedModel, model_fingerprint, open_model, resolve_model
from fusejax.io.progress import say
from fusejax.io.tokenizers import Tokenizer, load_tokenizer
from fusejax.stages.outlook import Outlook, outlook


def finished(directory: Path, *, kind: str, settings: Mapping[str, Any], parents: Mapping[str, str]) -> Manifest | None:
    """Returns the manifest of a finished artefact with these settings and parents, else None."""
    if not (directory / MANIFEST).is_file():
        return None
    manifest = read_manifest(directory)
    identity = {"kind": kind, "settings": dict(settings), "parents": dict(parents), "schema": SCHEMA_VERSION}
    return manifest if manifest.fingerprint == fingerprint_of(identity) else None


class Run:
    """A configuration and the directories and models that belong to it."""

    def __init__(self, config: RunConfig, *, only: Collection[str] | None = None):
        """Opens nothing yet.

        Args:
          config: of the whole run.
          only: names of the fusions that are wanted now; empty: of none, but what they share. None: all.

        Raises:
          InputError: `only` names what is no fusion.
        """
        self.config = config
        self.only = only
        names = [fusion.name for fusion in config.fusions]
        for name in only or ():
            if name not in names:
                raise InputError(f"--only names {name!r}.{nearest(name, names)} Fusions: {', '.join(names)}")
        self.directory = Path(config.output)
        self._models = lru_cache(maxsize=1)(self._open_model)
        self._tokenizers = lru_cache(maxsize=None)(load_tokenizer)
        self._resolved: dict[str, Path] = {}
        self._fingerprints: dict[Path, str] = {}

    def start(self) -> None:
        """Makes the run's directory and writes the resolved configuration into it."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_config(self.config, self.directory / "config.yaml")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise  # no mistake of the configuration
            raise InputError(f"cannot write to {self.directory}: {error.strerror}; set `output` elsewhere") from error

    @property
    def corpus_dir(self) -> Path:
        """Artefact A0."""
        return self.directory / "corpus"

    def captured_dir(self, name: str) -> Path:
        """Artefact A1 of a source."""
        return self.directory / "captured" / name

    def aligned_dir(self, name: str) -> Path:
        """Artefact A3 of a source."""
        return self.directory / "aligned" / name

    def fused_dir(self, name: str) -> Path:
        """Artefact A4 of a fusion."""
        return self.directory / "fused" / name

    def train_dir(self, arm: str) -> Path:
        """Checkpoints and metrics of one training."""
        return self.directory / "train" / arm

    def model_dir(self, arm: str) -> Path:
        """The trained or merged model of an arm."""
        return self.directory / "models" / arm

    @property
    def participants(self) -> dict[str, ModelRef]:
        """The models to capture, by name: the sources, and `target` once where fusions include it.

        Where only some fusions are wanted, what these need; where none are, the target, which they share.
        """
        needed = {name for fusion in self.fusions for name in self.fusion_sources(fusion)}
        found = {s.name: s for s in self.config.sources if self.only is None or s.name in needed}
        if any(fusion.include_target for fusion in self.fusions or self.config.fusions):
            found["target"] = self.config.target
        return found

    @property
    def fusions(self) -> tuple[FusionConfig, ...]:
        """The fusions to make now: all, or those that were asked for."""
        return tuple(f for f in self.config.fusions if self.only is None or f.name in self.only)

    def fusion_sources(self, fusion: FusionConfig) -> list[str]:
        """Names of a fusion's sources in order; the target, where it takes part, first as in FuseLLM."""
        names = list(fusion.sources) or [source.name for source in self.config.sources]
        return (["target"] if fusion.include_target else []) + names

    def model_path(self, ref: ModelRef) -> Path:
        """The directory of a model, downloaded first where it is a hub name.

        Raises:
          InputError: there is none; or the run makes it, and has not yet.
        """
        if place_of(ref.model) in self.config.pretrained and not Path(ref.model).expanduser().is_dir():
            raise InputError(f"{ref.model} is not made yet; run `fusejax pretrain` on the configuration first")
        weights = ref.url is None and ref.distributions is None
        key = f"{ref.model}@{ref.revision}" + ("" if weights else " tokenizer")
        if key not in self._resolved:
            self._resolved[key] = resolve_model(ref.model, revision=ref.revision, weights=weights)
        return self._resolved[key]

    def fingerprint(self, ref: ModelRef) -> str:
        """The fingerprint of a model's configuration and weights."""
        path = self.model_path(ref)
        if path not in self._fingerprints:
            self._fingerprints[path] = model_fingerprint(path)
        return self._fingerprints[path]

    def model(self, ref: ModelRef, *, compute_dtype: str | None = None) -> LoadedModel:
        """Opens a model; the last one is kept in memory."""
        return self._models(self.model_path(ref), compute_dtype)

    def tokenizer(self, ref: ModelRef) -> Tokenizer:
        """Opens a model's tokenizer."""
        return self._tokenizers(self.model_path(ref))

    def tokenizer_in(self, directory: Path) -> Tokenizer:
        """Opens the tokenizer of a directory."""
        return self._tokenizers(directory)

    def outlook(self, ref: ModelRef) -> Outlook:
        """What a model will be that the run pretrains."""
        return outlook(self.config, ref, load=self.tokenizer_in)

    def encoder(self, ref: ModelRef, *, tokenizer: Tokenizer | None = None) -> DocumentEncoder:
        """What reads the corpus' documents as a model does: its tokenizer, and its chat template where it needs one."""
        corpus, tokenizer = self.config.corpus, tokenizer or self.tokenizer(ref)
        if not corpus.has_chat:
            return DocumentEncoder(tokenizer)
        return DocumentEncoder(tokenizer, template_of(tokenizer, ref.chat_template or corpus.chat_template))

    @staticmethod
    def _open_model(path: Path, compute_dtype: str | None) -> LoadedModel:
        return open_model(path, compute_dtype=compute_dtype)

    def replace_stale(self, directory: Path) -> None:
        """Removes an artefact that was made with other settings, saying so."""
        if (directory / MANIFEST).is_file():
            say(f"{directory}: settings or inputs have changed, making it again")
            shutil.rmtree(directory)
