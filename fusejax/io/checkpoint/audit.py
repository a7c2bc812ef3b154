"""Reading saved train states only to find out whether they are what was written.

A step says which leaves it holds, so no model is needed: its files are compared with their digests, and where some are
too large to have one, the leaves are restored to the host and their checksums compared. That takes the memory of the
state, as nothing else of a verification does.
"""

import warnings
from pathlib import Path

import jax
import numpy as np

from fusejax.io.checkpoint.checksums import (
    DIGESTS,
    LARGE,
    DamagedCheckpoint,
    damaged_files,
    tree_checksums,
    unsealed_json,
)
from fusejax.io.checkpoint.guards import explained, quiet

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import orbax.checkpoint as ocp

__all__ = ["damaged_state", "saved_states"]


def saved_states(directory: str | Path) -> list[Path]:
    """Returns the steps of train states anywhere under a directory, in order; unsealed ones are none."""
    return sorted(path.parent for path in Path(directory).rglob(DIGESTS) if path.parent.name.isdigit())


def damaged_state(place: str | Path) -> dict[str, str]:
    """Returns what is wrong with the saved step in `place`, by file or leaf; {} where nothing is."""
    place = Path(place).absolute()
    bad = dict.fromkeys(damaged_files(place), "size or checksum differs from the one saved")
    if bad or all(path.stat().st_size <= LARGE for path in place.rglob("*") if path.is_file()):
        return bad
    try:
        with quiet(), explained(place), ocp.PyTreeCheckpointer() as reader:
            shapes = reader.metadata(place / "state").item_metadata.tree
            numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            state = reader.restore(place / "state", restore_args=numpy)
            record = ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(place / "record")
        saved = unsealed_json(record, place)["leaves"]
    except DamagedCheckpoint as error:
        return {".": str(error)}
    found = tree_checksums(state)
    return {
        path: "the leaf's checksum differs from the one saved"
        for path, entry in saved.items()
        if found.get(path) != entry["checksum"]
    }
