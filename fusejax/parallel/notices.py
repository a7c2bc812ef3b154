"""Notices between the processes of one job, which nobody waits for: a key and a text in the coordination service.

For what must be told without a collective: that a process is to stop, has failed, or has left. With one process a
notice goes nowhere and nothing is found.
"""

import sys
from typing import Any

from fusejax.parallel.processes import process_count

__all__ = ["post", "read"]


def post(key: str, text: str) -> None:
    """Leaves a notice for all processes, in place of an earlier one; nothing where the coordinator is gone."""
    if process_count() > 1:
        try:
            _client().key_value_set(f"fusejax/notice/{key}", text, allow_overwrite=True)
        except Exception as error:  # whoever posts is leaving, and must not be kept from it
            print(f"no coordinator to tell ({str(error).splitlines()[0]})", file=sys.stderr)


def read(key: str) -> str | None:
    """Returns a notice at once, None where there is none."""
    if process_count() == 1:
        return None
    try:
        return _client().key_value_try_get(f"fusejax/notice/{key}")
    except Exception:  # NOT_FOUND, or no coordinator: JAX's own heartbeat deals with that
        return None


def _client() -> Any:
    from jax._src import distributed  # the public functions would start the devices

    return distributed.global_state.client
