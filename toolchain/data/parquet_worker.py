"""The child process that reads one Parquet file; `toolchain.data.parquet` is the parent's handle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pyarrow
import pyarrow.parquet

from toolchain.data.parquet import HINT
from toolchain.data.tables import LONG_ROW_HINT, Table, convert_read_errors
from toolchain.errors import DataError, first_line
from toolchain.system.serving import limit_memory, serve

BATCH_ROWS = 32  # largest number of rows in a batch, which is read at once
BATCH_BYTES = 1 << 22  # a batch has about this number of bytes; a batch has at least one row
ANSWER_ROWS = 1024  # an answer has at least this number of rows, or `BATCH_BYTES` bytes


class Worker:
    """A Parquet file; the public methods answer the parent's messages.

    Args:
        file: Name of the file.
        row_bytes: Largest number of bytes of the chosen columns of a row.
        memory_bytes: Number of bytes that this process may allocate, for error messages.
    """

    ready: Mapping[str, Any] = {}

    def __init__(self, file: str, row_bytes: int, memory_bytes: int) -> None:
        self._table = Table(file)
        self._row_bytes = row_bytes
        self._memory_bytes = memory_bytes

    def open(self) -> dict[str, Any]:
        """Opens the file and returns its ``columns``."""
        with self._convert_errors():
            self._parquet = pyarrow.parquet.ParquetFile(self._table.file, buffer_size=BATCH_BYTES)
            return {"columns": self._parquet.schema_arrow.names}

    def choose(self, columns: Sequence[str]) -> dict[str, Any]:
        """Chooses the columns for `read`."""
        with self._convert_errors():
            header = self._parquet.schema_arrow.names
            names = [header[self._table.column_index(header, name)] for name in columns]
            self._batches = self._read_batches(names)
            return {}

    def read(self) -> dict[str, Any]:
        """Returns the next ``rows``; none at the end of the file."""
        rows: list[tuple[Any, ...]] = []
        size = 0
        with self._convert_errors():
            for batch, batch_bytes in self._batches:
                rows += batch
                size += batch_bytes
                if len(rows) >= ANSWER_ROWS or size >= BATCH_BYTES:
                    break
        return {"rows": rows}

    def _read_batches(self, names: Sequence[str]) -> Iterator[tuple[list[tuple[Any, ...]], int]]:
        """Yields the rows of each batch, and their number of bytes."""
        count = 0
        batch_rows = _batch_rows(self._parquet.metadata, names)
        for batch in self._parquet.iter_batches(batch_rows, columns=list(dict.fromkeys(names)), use_threads=False):
            batch.validate(full=True)
            self._require_short_rows(batch, count)
            count += batch.num_rows
            values = [[_plain(value) for value in batch.column(name).to_pylist()] for name in names]
            yield list(zip(*values, strict=True)), batch.nbytes

    def _require_short_rows(self, batch: Any, count: int) -> None:
        """Raises `DataError` if a row of the batch is too long; `count` rows precede the batch."""
        if batch.nbytes <= self._row_bytes:
            return
        for index in range(batch.num_rows):
            row = batch.slice(index, 1)
            if sum(map(_decoded_bytes, row.columns)) > self._row_bytes:
                raise self._table.row_error(
                    count + index + 1, f"the row has more than {self._row_bytes:,} bytes", LONG_ROW_HINT
                )

    @contextmanager
    def _convert_errors(self) -> Iterator[None]:
        """Converts errors of the operating system and of pyarrow to `DataError`."""
        file = self._table.file
        try:
            with convert_read_errors(file):
                yield
        except MemoryError as error:
            raise DataError(f"{file} needs more than {self._memory_bytes / 1e6:.0f} MB to read.", HINT) from error
        except pyarrow.ArrowException as error:
            raise DataError(f"{file} cannot be read: {first_line(error).rstrip('.')}.", HINT) from error


def _plain(value: Any) -> Any:
    """Returns a value that JSON can represent."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [_plain(member) for member in value]
    return {"value": repr(value)}


def _batch_rows(metadata: Any, columns: Sequence[str]) -> int:
    """Returns a number of rows that have about `BATCH_BYTES` bytes in the chosen columns of a Parquet file."""
    most_bytes = 1.0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
        most_bytes = max(most_bytes, size / max(group.num_rows, 1))
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / most_bytes)))


def _decoded_bytes(column: Any) -> int:
    """Returns the number of bytes of a pyarrow array without dictionary encoding."""
    return int((column.dictionary_decode() if hasattr(column, "dictionary_decode") else column).nbytes)


def start(first: Mapping[str, Any]) -> Worker:
    """Limits the memory of this process, and returns the object that answers the parent's messages.

    Args:
        first: The first message: the name of the ``file``, and the limits ``row_bytes`` and ``memory_bytes``.
    """
    limit_memory(first["memory_bytes"])
    return Worker(first["file"], first["row_bytes"], first["memory_bytes"])


if __name__ == "__main__":
    serve(start)
