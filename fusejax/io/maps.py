"""Vocabulary maps kept on disk, by what they were made of: both tokenizers and the method.

A map between two large vocabularies takes seconds to a minute, and is the same in every run. It lies in the user's
cache directory, so that runs share it; a file that cannot be read is made again. Maps that are made at once are not
kept.
"""

__all__ = ["kept_map"]

import os
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fusejax.alignment import ByteVocabulary
from fusejax.io.manifest import fingerprint_of
from fusejax.io.models import cache_dir
from fusejax.types import VocabMap

VERSION = 1  # of the algorithms: a change of any map makes all of them again
WORTH_SECONDS = 0.5


def kept_map(
    method: str,
    source: ByteVocabulary,
    target: ByteVocabulary,
    make: Callable[[], VocabMap],
    *,
    directory: Path | None = None,
    worth_seconds: float = WORTH_SECONDS,
) -> VocabMap:
    """Returns a vocabulary map from the cache, or makes and keeps it.

    Args:
      method: the name of the map.
      source, target: the tokenizers; their fingerprints, special tokens and sizes name the file.
      make: computes the map.
      directory: of the cache; None: `maps` in the user's cache directory.
      worth_seconds: maps that are made faster are not kept.

    Returns:
      The map, int32. A directory that cannot be written to costs the cache and nothing else.
    """
    place = cache_dir() / "maps" if directory is None else Path(directory)
    made_of = [[x.fingerprint, dict(x.special_roles), len(x.token_bytes)] for x in (source, target)]
    path = place / f"{method}-{fingerprint_of([VERSION, method, *made_of])[:32]}.npz"
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return VocabMap(arrays["symbol_of_source"], arrays["symbol_of_target"])
    except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile):
        start = time.perf_counter()
        found = make()
    if time.perf_counter() - start < worth_seconds:
        return found
    try:
        place.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=place, suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **found._asdict())
        os.replace(temporary, path)
    except OSError:
        pass
    return found
