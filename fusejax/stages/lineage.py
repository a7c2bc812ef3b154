"""Whether the artefacts that a stage reads belong together and to the configuration.

A stage that runs alone reads what earlier commands left. After `prepare` on new text, or an edit of the
configuration, those may be artefacts of another run; each is whole, so only their manifests tell. Artefacts that
were removed after use are not asked for, nor are settings that a manifest does not have: distributions that were
imported say less.
"""

__all__ = ["check_aligned", "check_captured", "check_lineage"]

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusejax.config import FusionConfig
from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.stages.capture import capture_settings, describe
from fusejax.stages.context import Run

_PACE = ("batch_tokens", "shard_size")  # of a capture: they change how it is made and not what it says


def check_captured(run: Run, name: str) -> None:
    """Refuses distributions that were captured otherwise than the configuration says, or from other text or weights.

    Raises:
      InputError: names the artefact, both values, and the stages to run.
    """
    directory = run.captured_dir(name)
    if not (directory / MANIFEST).is_file():
        return
    ref = run.participants[name]
    source = describe(run, ref)
    wanted = capture_settings(run, ref, source)
    _check_settings(directory, {key: wanted[key] for key in wanted if key not in _PACE}, "capture")
    _check_link(directory, "corpus", run.corpus_dir, "capture")
    made_from = read_manifest(directory).parents.get("model")
    # A machine that only aligns may have no weights.
    if (source.url or any(source.directory.glob("*.safetensors"))) and made_from not in (None, source.fingerprint):
        raise InputError(
            f"{directory} was captured from weights {made_from}, {source.name} now holds {source.fingerprint}; run "
            "`fusejax capture` and what follows"
        )


def check_aligned(run: Run, name: str) -> None:
    """Refuses distributions that were aligned otherwise than the configuration says; see `check_captured`."""
    directory = run.aligned_dir(name)
    if (directory / MANIFEST).is_file():
        wanted = run.config.align.model_dump(mode="json") | {"codec": run.config.capture.codec}
        wanted["target_tokenizer"] = run.tokenizer(run.config.target).fingerprint
        _check_settings(directory, wanted, "align")
        _check_link(directory, "captured", run.captured_dir(name), "align")
    check_captured(run, name)


def check_lineage(run: Run, fusion: FusionConfig) -> None:
    """Refuses fused targets that do not descend from the artefacts that stand now, or were fused otherwise.

    Raises:
      InputError: names the artefact, what it disagrees with, and the stages to run.
    """
    wanted = fusion.model_dump(mode="json") | {"sources": run.fusion_sources(fusion)}
    _check_settings(run.fused_dir(fusion.name), wanted, "fuse")
    for name in run.fusion_sources(fusion):
        _check_link(run.fused_dir(fusion.name), name, run.aligned_dir(name), "fuse")
        check_aligned(run, name)


def _check_settings(directory: Path, wanted: Mapping[str, Any], stage: str) -> None:
    made = read_manifest(directory).settings
    for key, value in wanted.items():
        if made.get(key, value) != value:
            raise InputError(
                f"{directory} was made with {key} = {made[key]!r}, the configuration says {value!r}; run "
                f"`fusejax {stage}` and what follows, or set it back"
            )


def _check_link(child: Path, key: str, parent: Path, stage: str) -> None:
    if not (child / MANIFEST).is_file() or not (parent / MANIFEST).is_file():
        return
    if read_manifest(child).parents.get(key) not in (None, read_manifest(parent).fingerprint):
        raise InputError(
            f"{child} was made from another {key} than {parent} holds now; run `fusejax {stage}` and what follows"
        )
