"""How much of a source was read when only its first records were: what an estimate is scaled by."""

__all__ = ["share_read"]

import gzip
from pathlib import Path

from fusejax.data.readers import ReadCounts

_LINES, _PACKED = (".jsonl", ".ndjson", ".json"), ".gz"


def share_read(path: Path, counts: ReadCounts) -> float | None:
    """Returns which part of a source its first records are, in (0, 1]; None where the source does not say.

    By bytes for JSON lines, by rows for parquet; of a folder of other files by the bytes of its text.

    Args:
      path: a file or a folder.
      counts: of the records that were read, from the first on.
    """
    if path.is_file():
        share = _share_of_file(path, counts.documents + counts.empty + counts.left_out)
    elif path.is_dir():
        share = _share_of_folder(path, counts)
    else:
        return None
    return None if share is None else min(max(share, 1e-9), 1.0)


def _share_of_file(path: Path, rows: int) -> float | None:
    name = path.name.lower()
    if name.endswith(".parquet"):
        return rows / max(1, _parquet_rows(path))
    if not name.removesuffix(_PACKED).endswith(_LINES):
        return None
    with path.open("rb") as raw:
        lines = gzip.GzipFile(fileobj=raw) if name.endswith(_PACKED) else raw
        for _ in range(rows):
            lines.readline()
        return raw.tell() / max(1, path.stat().st_size)


def _share_of_folder(path: Path, counts: ReadCounts) -> float | None:
    files = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
    if any(p.suffix == ".arrow" for p in files):  # compressed or not: only its reader knows
        return None
    if files and all(p.suffix == ".parquet" for p in files):
        return (counts.documents + counts.empty + counts.left_out) / max(1, sum(map(_parquet_rows, files)))
    return counts.bytes / max(1, sum(p.stat().st_size for p in files))


def _parquet_rows(path: Path) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows
