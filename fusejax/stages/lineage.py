"""Whether the artefacts that a stage reads belong together and to the configuration.

A stage that runs alone reads what earlier commands left. After `prepare` on new text, or an edit of the
configuration, those may be artefacts of another run; each is whole, so only their manifests tell.
"""

__all__ = ["check_lineage"]

from pathlib import Path

from fusejax.config import FusionConfig
from fusejax.errors import InputError
from fusejax.io.manifest import MANIFEST, read_manifest
from fusejax.stages.context import Run


def check_lineage(run: Run, fusion: FusionConfig) -> None:
    """Refuses fused targets that do not descend from the artefacts that stand now, or were fused otherwise.

    Artefacts that were removed after use are not asked for.

    Raises:
      InputError: names the artefact, what it disagrees with, and the stages to run.
    """
    fused = read_manifest(run.fused_dir(fusion.name), kind="fused")
    wanted = fusion.model_dump(mode="json") | {"sources": run.fusion_sources(fusion)}
    for key, value in wanted.items():
        if fused.settings.get(key) != value:
            raise InputError(
                f"{run.fused_dir(fusion.name)} was made with {key} = {fused.settings.get(key)!r}, the configuration "
                f"says {value!r}; run `fusejax fuse` first"
            )
    for name in run.fusion_sources(fusion):
        _check_link(run.fused_dir(fusion.name), name, run.aligned_dir(name), "fuse")
        _check_link(run.aligned_dir(name), "captured", run.captured_dir(name), "align")
        _check_link(run.captured_dir(name), "corpus", run.corpus_dir, "capture")


def _check_link(child: Path, key: str, parent: Path, stage: str) -> None:
    if not (child / MANIFEST).is_file() or not (parent / MANIFEST).is_file():
        return
    if read_manifest(child).parents.get(key) not in (None, read_manifest(parent).fingerprint):
        raise InputError(
            f"{child} was made from another {key} than {parent} holds now; run `fusejax {stage}` and what follows"
        )
