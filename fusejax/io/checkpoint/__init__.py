"""Train states and model parameters on disk, by Orbax; the only package that imports it.

Orbax gives atomic commits, resharding on restore, multi-host writing and writing in the background. It was seen to
restore a flipped bit as wrong weights without a word, to cast silently to the dtype it is asked for, and to leave
temporary directories behind. So here

* every leaf has a checksum that does not depend on its sharding, saved in the same commit and compared on restore
  (`checksums`); small files of a step have digests as well, so that a flipped bit in any of them is refused;
* shapes and dtypes are compared before anything is read;
* leftovers of killed saves are removed, and named, when a run starts (`states.remove_orphans`), a step that was
  committed and has no digests yet among them;
* a damaged step is an error; `on_damaged="previous"` goes back to the one before it, saying so, and keeps the damaged
  one aside.

`states` holds the steps of a run, `audit` reads them only to check them, `models` holds the directory of a finished
model, `guards` what is said when it fails.
"""

from fusejax.io.checkpoint.audit import damaged_state, saved_states
from fusejax.io.checkpoint.checksums import CHECKSUMS, DamagedCheckpoint, tree_checksums
from fusejax.io.checkpoint.models import load_model_params, save_model
from fusejax.io.checkpoint.states import (
    StateWriter,
    all_steps,
    drop_steps_after,
    latest_step,
    remove_orphans,
    restore_newest_state,
    restore_train_state,
    save_train_state,
)

__all__ = [
    "CHECKSUMS",
    "DamagedCheckpoint",
    "StateWriter",
    "all_steps",
    "damaged_state",
    "drop_steps_after",
    "latest_step",
    "load_model_params",
    "remove_orphans",
    "restore_newest_state",
    "restore_train_state",
    "save_model",
    "save_train_state",
    "saved_states",
    "tree_checksums",
]
