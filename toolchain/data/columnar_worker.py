"""The child process that reads Parquet files and Arrow streams; `toolchain.data.columnar` is the parent's handle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import pyarrow
import pyarrow.parquet

from toolchain.data.columnar import HINT
from toolchain.data.tables import LONG_ROW_HINT, Table, convert_read_errors, kind_of
from toolchain.errors import DataError, first_line
from toolchain.system.decoding import check_line, decode_object
from toolchain.system.serving import limit_memory, serve

BATCH_ROWS = 32  # largest number of rows in a batch, which is decoded at once
BATCH_BYTES = 1 << 22  # a batch has about this number of bytes; a batch has at least one row
ANSWER_ROWS = 1024  # an answer has at least this number of rows, or `BATCH_BYTES` bytes
MAX_CLASSES = 10_000  # largest number of class names of a column
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # the last bytes of an Arrow stream
_METADATA = b"huggingface"  # key under which the library datasets saves the class names


class _File(Protocol):
    """An open file."""

    schema: Any

    def batches(self, names: Sequence[str]) -> Iterator[Any]:
        """Yields the rows of some columns, as valid record batches of pyarrow with few rows."""


class ParquetFile:
    """An open Parquet file; see `_File`."""

    def __init__(self, file: str) -> None:
        self._parquet = pyarrow.parquet.ParquetFile(file, buffer_size=BATCH_BYTES)
        self.schema = self._parquet.schema_arrow

    def batches(self, names: Sequence[str]) -> Iterator[Any]:
        """Yields the rows of some columns; see `_File`."""
        for batch in self._parquet.iter_batches(self._batch_rows(names), columns=names, use_threads=False):
            batch.validate(full=True)
            yield batch

    def _batch_rows(self, columns: Sequence[str]) -> int:
        """Returns a number of rows that have about `BATCH_BYTES` bytes in the chosen columns."""
        metadata = self._parquet.metadata
        most_bytes = 1.0
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            chunks = map(group.column, range(group.num_columns))
            size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
            most_bytes = max(most_bytes, size / max(group.num_rows, 1))
        return _row_count(most_bytes)


class ArrowStream:
    """An open Arrow stream with its end; see `_File`."""

    def __init__(self, file: str) -> None:
        self._file = file
        with open(file, "rb") as stream:
            stream.seek(-min(stream.seek(0, 2), len(STREAM_END)), 2)
            if stream.read() != STREAM_END:  # pyarrow accepts a stream that ends between two batches
                raise DataError(f"{file} is no Arrow stream, or its end is missing.", "Copy or save the data again.")
        with pyarrow.memory_map(file) as source, pyarrow.ipc.open_stream(source) as reader:
            self.schema = reader.schema

    def batches(self, names: Sequence[str]) -> Iterator[Any]:
        """Yields the rows of some columns; see `_File`."""
        options = pyarrow.ipc.IpcReadOptions(included_fields=[self.schema.names.index(n) for n in names])
        with (
            pyarrow.memory_map(self._file) as source,
            pyarrow.ipc.open_stream(source, options=options) as reader,
        ):
            for batch in reader:
                count = _row_count(batch.nbytes / max(batch.num_rows, 1))
                batch.validate(full=True)
                for start in range(0, batch.num_rows, count):
                    yield batch.slice(start, count)


class FileWorker:
    """Reads files for a parent process; the public methods of a subclass answer the parent's messages.

    Args:
        row_bytes: Largest number of bytes of a row.
        memory_bytes: Number of bytes that this process may allocate, for error messages.
    """

    ready: Mapping[str, Any] = {}
    _table: Table  # the file that is being read

    def __init__(self, row_bytes: int, memory_bytes: int) -> None:
        self._row_bytes, self._memory_bytes = row_bytes, memory_bytes

    def _require_short_rows(self, batch: Any, count: int) -> None:
        """Raises `DataError` if a row of the batch is too long; `count` rows precede the batch."""
        index = find_long_row(batch, self._row_bytes)
        if index is not None:
            raise self._long_row_error(count + index + 1)

    def _long_row_error(self, number: int) -> DataError:
        return self._table.row_error(number, f"the row has more than {self._row_bytes:,} bytes", LONG_ROW_HINT)

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


class Worker(FileWorker):
    """Reads the chosen columns of the files of one table."""

    def __init__(self, row_bytes: int, memory_bytes: int) -> None:
        super().__init__(row_bytes, memory_bytes)
        self._first: Table | None = None
        self._columns: set[str] = set()
        self._kinds: dict[str, tuple[str, Sequence[str]]] = {}

    def open(self, file: str) -> dict[str, Any]:
        """Opens a file and returns its ``columns``, and the ``classes`` of columns with class names."""
        self._table = Table(file)
        with self._convert_errors():
            self._file: _File = ParquetFile(file) if kind_of(file) == ".parquet" else ArrowStream(file)
            self._classes = _class_names(self._file.schema, file)
        columns = self._file.schema.names
        if self._first and set(columns) != self._columns:
            raise DataError(
                f"{file} has the columns {_format_names(columns)}, but {self._first.file} has "
                f"{_format_names(self._columns)}.",
                "Save all files of the folder with the same columns.",
            )
        self._columns = set(columns)
        return {"columns": columns, "classes": self._classes}

    def choose(self, columns: Sequence[str]) -> dict[str, Any]:
        """Chooses the columns for `read`."""
        with self._convert_errors():
            header = self._file.schema.names
            names = [header[self._table.column_index(header, name)] for name in columns]
            kinds: dict[str, tuple[str, Sequence[str]]] = {
                name: (str(self._file.schema.field(name).type), self._classes.get(name, ())) for name in names
            }
            self._require_same_kinds(kinds)
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

    def _require_same_kinds(self, kinds: dict[str, tuple[str, Sequence[str]]]) -> None:
        """Raises `DataError` unless the chosen columns have the types and class names of the first file."""
        if self._first is None:
            self._first, self._kinds = self._table, kinds
        for name, kind in kinds.items():
            if kind != self._kinds[name]:
                difference = "other class names" if kind[0] == self._kinds[name][0] else "another type"
                raise DataError(
                    f"The column {name!r} of {self._table.file} has {difference} than in {self._first.file}.",
                    "Save all files of the folder with the same columns.",
                )

    def _read_batches(self, names: Sequence[str]) -> Iterator[tuple[list[tuple[Any, ...]], int]]:
        """Yields the rows of each batch, and their number of bytes."""
        count = 0
        for batch in self._file.batches(list(dict.fromkeys(names))):
            self._require_short_rows(batch, count)
            columns = [[_plain(value) for value in batch.column(name).to_pylist()] for name in names]
            rows = list(zip(*columns, strict=True))
            size = 0
            for number, row in enumerate(rows, start=count + 1):
                # Values that share bytes in the file are longer than the bytes of their row.
                row_size = sum(map(_length, row))
                if row_size > self._row_bytes:
                    raise self._long_row_error(number)
                size += row_size
            count += batch.num_rows
            yield rows, max(size, batch.nbytes)


def _class_names(schema: Any, file: str) -> dict[str, list[str]]:
    """Returns the class names of each column that has class names in the metadata of the library datasets."""
    text = (schema.metadata or {}).get(_METADATA)
    if text is None:
        return {}
    try:
        features = (decode_object(text).get("info") or {}).get("features") or {}
        return {name: names for name, feature in features.items() if (names := _names_of(feature))}
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(
            f"The class names in the metadata of {file} cannot be read ({type(error).__name__}).", HINT
        ) from error


def _names_of(feature: Any) -> list[str]:
    """Returns the class names of a column, or of the members of its lists; empty if the column has none."""
    if isinstance(feature, list) and feature:
        feature = feature[0]
    elif isinstance(feature, dict) and isinstance(feature.get("feature"), dict):
        feature = feature["feature"]
    names = feature.get("names") if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" else None
    if names is None:
        return []
    if not isinstance(names, list) or len(names) > MAX_CLASSES:
        raise ValueError("the class names are no list, or too many")
    return [check_line(name) for name in names]


def _plain(value: Any) -> Any:
    """Returns a value that JSON can represent."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list):
        return [_plain(member) for member in value]
    return {"value": repr(value)}


def _length(value: Any) -> int:
    """Returns the number of characters of a plain value's texts."""
    if isinstance(value, str):
        return len(value)
    return sum(map(_length, value)) if isinstance(value, list) else 0


def _row_count(row_bytes: float) -> int:
    """Returns a number of rows for a batch, from the average size of a row."""
    return max(1, min(BATCH_ROWS, int(BATCH_BYTES / max(row_bytes, 1.0))))


def _format_names(names: Sequence[str] | set[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"


def find_long_row(batch: Any, row_bytes: int) -> int | None:
    """Returns the index of the first row of a record batch with more than `row_bytes` bytes; None if there is none."""
    if batch.nbytes <= row_bytes:
        return None
    sizes = (sum(map(_decoded_bytes, batch.slice(index, 1).columns)) for index in range(batch.num_rows))
    return next((index for index, size in enumerate(sizes) if size > row_bytes), None)


def _decoded_bytes(column: Any) -> int:
    """Returns the number of bytes of a pyarrow array without dictionary encoding."""
    return int((column.dictionary_decode() if hasattr(column, "dictionary_decode") else column).nbytes)


def start(first: Mapping[str, Any]) -> Worker:
    """Limits the memory of this process, and returns the object that answers the parent's messages.

    Args:
        first: The first message, with the limits ``row_bytes`` and ``memory_bytes``.
    """
    limit_memory(first["memory_bytes"])
    return Worker(first["row_bytes"], first["memory_bytes"])


if __name__ == "__main__":
    serve(start)
