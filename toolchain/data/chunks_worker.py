"""The child process that reads input files in chunks; `toolchain.data.chunks` is the parent's handle."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow

from toolchain.data.columnar import HINT
from toolchain.data.columnar_worker import BATCH_BYTES, ArrowStream, FileWorker, ParquetFile
from toolchain.data.files import SURROGATE, text_of
from toolchain.data.tables import (
    FORMATS,
    RowFault,
    RowLines,
    Table,
    convert_read_errors,
    kind_of,
    open_text,
)
from toolchain.errors import DataError
from toolchain.system.serving import limit_memory, serve

BATCH_ROWS = 1024  # largest number of rows of a text file that are converted at once
LINES_COLUMN = "text"  # the column of a file with plain lines
COLUMNAR = (".parquet", ".arrow")
# Types that store a value once and use it in several rows, so that a small file may become large.
_SHARED_VALUES = re.compile("view|run_end_encoded")


@dataclass(frozen=True)
class _Rows:
    """Consecutive rows of a file.

    Attributes:
        table: All columns, as a table of pyarrow.
        values: For each row, the values of its one or two columns of texts, as the file states them; the fault of the
            row instead, if the row cannot be written to Parquet.
    """

    table: Any
    values: Sequence[Sequence[Any] | str]

    def slice(self, start: int, count: int) -> _Rows:
        """Returns at most `count` rows from the index `start`."""
        return _Rows(self.table.slice(start, count), self.values[start : start + count])


class Worker(FileWorker):
    """Reads the chunks of one file after the other."""

    def open(self, file: str) -> dict[str, Any]:
        """Opens a file, and returns the name and the type of each column under the key ``columns``."""
        self._table = Table(file)
        self._is_columnar = kind_of(file) in COLUMNAR
        with self._convert_errors():
            if self._is_columnar:
                self._file = ParquetFile(file) if kind_of(file) == ".parquet" else ArrowStream(file)
                columns = [[field.name, str(field.type)] for field in self._file.schema]
            else:
                columns = [[name, "string"] for name in self._header()]
        names = [name for name, _ in columns]
        for name, kind in columns:
            self._table.column_index(names, name)
            if _SHARED_VALUES.search(kind):
                raise DataError(f"The column {name!r} of {file} has the type {kind}, which Parquet lacks.", HINT)
        return {"columns": columns}

    def start(self, columns: Sequence[str], texts: Sequence[str]) -> dict[str, Any]:
        """Begins to read the rows of the file.

        Args:
            columns: Names of all columns, in the order of the output.
            texts: Names of the one or two columns of texts.
        """
        self._columns, self._names = list(columns), list(texts)
        self._source = self._columnar_rows() if self._is_columnar else self._text_rows()
        self._rest: _Rows | None = None  # rows that no chunk has used yet
        self._count = 0  # number of rows that chunks have used
        return {}

    def skip(self, rows: int) -> dict[str, Any]:
        """Skips the next rows and returns their number as ``skipped``; it is below `rows` at the end of the file."""
        skipped = 0
        with self._convert_errors():
            while skipped < rows and (piece := self._take(rows - skipped)):
                skipped += len(piece.values)
        return {"skipped": skipped}

    def read(self, rows: int, size: int, faults: int, target: str) -> dict[str, Any]:
        """Writes the next chunk to a file, as an Arrow stream.

        The columns of texts follow the columns of the file. In a row with a fault, the texts are empty.

        Args:
            rows: Largest number of rows.
            size: Number of bytes after which the chunk ends.
            faults: Largest number of rows with a fault; the chunk ends after more.
            target: The file to write.

        Returns:
            The number of ``rows``, whether the chunk ``is_last``, and ``faults``: index and reason for each row with a
            fault, at most `faults` + 1.
        """
        tables: list[Any] = []
        found: list[tuple[int, str]] = []
        count = written = 0
        with self._convert_errors():
            while count < rows and written < size and len(found) <= faults and (piece := self._take(rows - count)):
                table, table_faults = self._with_texts(piece)
                found += [(count + index, reason) for index, reason in table_faults]
                tables.append(table)
                count += table.num_rows
                written += table.nbytes
            self._fill()
            whole = pyarrow.concat_tables(tables) if tables else self._empty_table()
            with pyarrow.OSFile(target, "wb") as file, pyarrow.ipc.new_stream(file, whole.schema) as stream:
                stream.write_table(whole)
        return {"rows": count, "is_last": self._rest is None, "faults": found[: faults + 1]}

    def _take(self, rows: int) -> _Rows | None:
        """Returns at most `rows` of the next rows; None at the end of the file."""
        self._fill()
        if self._rest is None:
            return None
        piece = self._rest.slice(0, rows)
        self._rest = self._rest.slice(rows, len(self._rest.values)) if len(self._rest.values) > rows else None
        self._count += len(piece.values)
        return piece

    def _fill(self) -> None:
        """Reads the next rows if none are left; none are left after that only at the end of the file."""
        while self._rest is None and (piece := next(self._source, None)) is not None:
            self._rest = piece if piece.values else None

    def _with_texts(self, piece: _Rows) -> tuple[Any, list[tuple[int, str]]]:
        """Returns the table with its texts as last columns, and index and reason for each row with a fault."""
        first = self._count - len(piece.values) + 1
        texts: list[Sequence[str]] = []
        faults = []
        for index, values in enumerate(piece.values):
            fault, row_texts = "", ("",) * len(self._names)
            if isinstance(values, str):
                fault = values
            else:
                try:
                    text = text_of(values, self._names, first + index, self._table)
                    row_texts = (text,) if isinstance(text, str) else text
                except DataError as error:
                    fault = error.cause.removeprefix(f"{self._table.file}, row {first + index}: ").rstrip(".")
            if sum(map(len, row_texts)) > self._row_bytes:
                raise self._long_row_error(first + index)
            if fault:
                faults.append((index, fault))
            texts.append(row_texts)
        return _append_texts(piece.table, list(zip(*texts, strict=True))), faults

    def _empty_table(self) -> Any:
        """Returns a table without rows, for a file without rows."""
        if self._is_columnar:
            fields = [(name, self._file.schema.field(name).type) for name in self._columns]
        else:
            fields = [(name, pyarrow.string()) for name in self._columns]
        return _append_texts(pyarrow.schema(fields).empty_table(), [()] * len(self._names))

    def _columnar_rows(self) -> Iterator[_Rows]:
        count = 0
        for batch in self._file.batches(self._columns):
            self._require_short_rows(batch, count)
            count += batch.num_rows
            table = pyarrow.Table.from_batches([batch]).select(self._columns).replace_schema_metadata(None)
            values = [batch.column(name).to_pylist() for name in self._names]
            yield _Rows(table, list(zip(*values, strict=True)))

    def _text_rows(self) -> Iterator[_Rows]:
        has_columns = kind_of(self._table.file) in FORMATS
        rows = self._table.read_text(lambda _: self._columns, fixed_keys=True) if has_columns else self._lines()
        chosen = [self._columns.index(name) for name in self._names]
        cells: list[list[str | None]] = []
        values: list[Sequence[Any] | str] = []
        size = 0
        for row in rows:
            if isinstance(row, RowFault):
                converted: list[str | None] = [None] * len(self._columns)
                values.append(row.cause)
            else:
                converted = [_text_value(value) for value in row]
                values.append([row[index] for index in chosen])
            if any(value and SURROGATE.search(value) for value in converted):
                converted = [None] * len(converted)
                values[-1] = "a value has half of a surrogate pair"
            cells.append(converted)
            size += sum(len(value) for value in converted if value)
            if len(cells) == BATCH_ROWS or size >= BATCH_BYTES:
                yield self._text_table(cells, values)
                cells, values, size = [], [], 0
        if cells:
            yield self._text_table(cells, values)

    def _text_table(self, cells: Sequence[Sequence[str | None]], values: Sequence[Sequence[Any] | str]) -> _Rows:
        arrays = [pyarrow.array(column, pyarrow.string()) for column in zip(*cells, strict=True)]
        return _Rows(pyarrow.table(arrays, names=self._columns), values)

    def _lines(self) -> Iterator[tuple[str]]:
        with convert_read_errors(self._table.file), open_text(self._table.file, "utf-8", "\n") as stream:
            lines = RowLines(stream, self._table.file)
            for line in lines:
                lines.begin_row()
                yield (line.rstrip("\r\n"),)

    def _header(self) -> list[str]:
        """Returns the columns of a text file; reads the first row, because it states the columns of JSON lines."""
        if kind_of(self._table.file) not in FORMATS:
            return [LINES_COLUMN]
        names: list[str] = []

        def choose(header: Sequence[str]) -> Sequence[str]:
            names.extend(header)
            return names

        for _ in self._table.read_text(choose):
            if names:
                break
        return names


def _append_texts(table: Any, texts: Sequence[Sequence[str]]) -> Any:
    for number, column in enumerate(texts):
        table = table.append_column(f"text {number}", pyarrow.array(column, pyarrow.large_string()))
    return table


def _text_value(value: Any) -> str | None:
    """Returns a value of a text file as a text: JSON text for a value that is neither a text nor missing."""
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def start(first: Mapping[str, Any]) -> Worker:
    """Limits the memory of this process, and returns the object that answers the parent's messages.

    Args:
        first: The first message, with the limits ``row_bytes`` and ``memory_bytes``.
    """
    limit_memory(first["memory_bytes"])
    return Worker(first["row_bytes"], first["memory_bytes"])


if __name__ == "__main__":
    serve(start)
