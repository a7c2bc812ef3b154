"""Files of array_record with any bytes in them: what other programs write and read, beside our own store."""

__all__ = ["read_array_record", "write_array_record"]

from collections.abc import Iterable, Iterator
from pathlib import Path

from fusejax.errors import InputError


def write_array_record(records: Iterable[bytes], path: Path) -> int:
    """Writes records, one per group, and returns how many; the file is complete or absent."""
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        writer = ArrayRecordWriter(str(temporary), "group_size:1")
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
        if not count:
            raise InputError("there are no records to export")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read_array_record(path: Path) -> Iterator[bytes]:
    """Yields the records of a file, in order.

    Raises:
      InputError: it is not an array_record file, or is damaged.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    try:
        reader = ArrayRecordReader(str(path), "readahead_buffer_size:0")
        count = reader.num_records()
        if not count:
            raise InputError(f"{path} holds no records, or is not an array_record file")
        for index in range(count):
            yield reader.read([index])[0]
        reader.close()
    except RuntimeError as error:
        raise InputError(f"{path} cannot be read as array_record ({error})") from error
