"""Reads tables row by row, in bounded memory: CSV, TSV, JSON lines, Parquet and folders of files."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import shlex
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from toolchain.data import columnar, folders
from toolchain.data.columnar import Header
from toolchain.errors import DataError

# Endings of files with columns. An input file without an ending of `FORMATS` has plain lines, with one text per line.
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
# Further endings of compressed text files.
COMPRESSIONS = (".gz", ".bz2", ".zst")
# Largest size of a row: characters of a row in a text file, bytes of the chosen columns in Parquet and Arrow. `Table`
# refuses a file with a longer row, because a row must fit into memory. A novel has about a million characters.
MAX_ROW_SIZE = 1 << 24
_LONG_ROW = f"the row has more than {MAX_ROW_SIZE:,}"
LONG_ROW_HINT = "Shorten the text. In CSV, also look for a quote without an end."
# Function that takes the columns of a table, and returns the columns to read or raises `DataError` if one is missing.
ChooseColumns = Callable[[Header], Sequence[str]]


@dataclass(frozen=True)
class RowFault:
    """A row that cannot be read.

    Attributes:
        number: Number of the row, from 1.
        cause: Description of the fault.
        hint: Advice to the user.
    """

    number: int
    cause: str
    hint: str = "Correct the row."


@dataclass(frozen=True)
class Table:
    """A file or folder with columns.

    The ending of a file says whether it is CSV, TSV, JSON lines (each also compressed) or Parquet.
    `folders.list_files` lists the files of a folder.
    """

    file: str

    def read(self, choose: ChooseColumns) -> Iterator[tuple[Any, ...]]:
        """Yields the chosen columns of each row in order, with None for a missing value.

        The method holds only a few rows in memory.

        Args:
            choose: Function that takes the columns of the file, and returns the columns to read.

        Raises:
            DataError: The file is missing, is not UTF-8, does not have the format of its ending, or has a row longer
                than `MAX_ROW_SIZE`. The error message names the faulty row where possible. Or a file of the folder has
                other columns than the first one.
        """
        if Path(self.file).is_dir():
            files = [str(path) for path in folders.list_files(Path(self.file))]
            yield from columnar.read_rows(files, choose, MAX_ROW_SIZE)
            return
        kind = kind_of(self.file)
        if kind not in FORMATS:
            raise DataError(
                f"The ending of {self.file} is none of {', '.join(FORMATS)}.",
                "Convert the file to one of these formats.",
            )
        if kind == ".parquet":
            yield from columnar.read_rows([self.file], choose, MAX_ROW_SIZE)
            return
        for row in self.read_text(choose):
            if isinstance(row, RowFault):
                raise self.row_error(row.number, row.cause, row.hint)
            yield row

    def read_text(self, choose: ChooseColumns, *, fixed_keys: bool = False) -> Iterator[tuple[Any, ...] | RowFault]:
        """Yields the chosen columns of each row of a text file in order, and the fault of each row that cannot be read.

        Args:
            choose: Function that takes the columns of the file, and returns the columns to read.
            fixed_keys: Whether a row of JSON lines with a key that the first row lacks has a fault.

        Raises:
            DataError: As in `read`, except for a faulty row whose end is known.
        """
        with convert_read_errors(self.file):
            yield from self._jsonl(choose, fixed_keys) if kind_of(self.file) == ".jsonl" else self._csv(choose)

    def _csv(self, choose: ChooseColumns) -> Iterator[tuple[Any, ...] | RowFault]:
        csv.field_size_limit(MAX_ROW_SIZE)  # Python's default limit for the length of a CSV field is 131,072
        # The TSV format of IANA and GLUE has no quoting. If the reader interpreted quotes, an unpaired quote
        # would join several rows.
        tsv_dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        dialect = tsv_dialect if kind_of(self.file) == ".tsv" else {"strict": True}
        with open_text(self.file, "utf-8-sig", "") as stream:
            lines = RowLines(stream, self.file)
            rows = csv.reader(lines, **dialect)
            try:
                header = Header(next(rows, []))
                indices = [self.column_index(header, name) for name in choose(header)]
                lines.begin_row()
                for number, row in enumerate(rows, start=1):
                    lines.begin_row()
                    if not row:  # a blank line
                        continue
                    if len(row) != len(header):
                        fault = f"the number of fields is {len(row)} instead of {len(header)}"
                        yield RowFault(number, fault, "Quote texts that contain commas or line breaks.")
                    else:
                        yield tuple(row[i] for i in indices)
            except csv.Error as error:
                raise DataError(
                    f"{self.file}, line {rows.line_num}: {error}.", "Quote texts that contain commas."
                ) from error

    def column_index(self, header: Sequence[str], name: str) -> int:
        """Returns the index of a column; raises `DataError` if several columns have its name."""
        if header.count(name) > 1:
            raise DataError(
                f"{self.file} has {header.count(name)} columns with the name {name!r}.",
                "Rename or remove one of these columns.",
            )
        return header.index(name)

    def _jsonl(self, choose: ChooseColumns, fixed_keys: bool) -> Iterator[tuple[Any, ...] | RowFault]:
        names: Sequence[str] | None = None
        with open_text(self.file, "utf-8", "\n") as stream:
            lines = RowLines(stream, self.file)
            for number, line in enumerate(lines, start=1):
                lines.begin_row()
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    yield RowFault(number, f"the line is not JSON ({error})")
                    continue
                if not isinstance(row, dict):
                    yield RowFault(number, "the line is not a JSON object")
                    continue
                names = choose(Header(row)) if names is None else names
                if fixed_keys and (extra := row.keys() - set(names)):
                    yield RowFault(number, f"the key {min(extra)!r} is not in the first row")
                else:
                    yield tuple(row.get(name) for name in names)

    def row_error(self, number: int, fault: str, hint: str = "Correct the row.") -> DataError:
        """Returns an error about one row of the file.

        Args:
            number: Number of the row, from 1.
            fault: Description of the fault.
            hint: Advice to the user.
        """
        return DataError(f"{self.file}, row {number}: {fault}.", hint)


class RowLines:
    """Iterates over the lines of a text file, and reads no row with more than `MAX_ROW_SIZE` characters.

    The caller calls `begin_row` after each complete row, because a row of CSV may have several lines.
    """

    def __init__(self, stream: IO[str], file: str) -> None:
        self._stream, self._file = stream, file
        self._lines = self._row_size = 0

    def begin_row(self) -> None:
        """Starts to count the characters of the next row."""
        self._row_size = 0

    def __iter__(self) -> RowLines:
        return self

    def __next__(self) -> str:
        line = self._stream.readline(MAX_ROW_SIZE - self._row_size + 1)
        if not line:
            raise StopIteration
        self._lines += 1
        self._row_size += len(line)
        if self._row_size > MAX_ROW_SIZE:
            raise DataError(f"{self._file}, line {self._lines}: {_LONG_ROW} characters.", LONG_ROW_HINT)
        return line


def has_columns(file: str) -> bool:
    """Returns whether `file` names a folder, or a file with columns."""
    return Path(file).is_dir() or kind_of(file) in FORMATS


def kind_of(file: str) -> str:
    """Returns the ending in lower case that states the format of a file, such as ``.csv`` for ``a.csv.gz``."""
    path = Path(file.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix


@contextmanager
def convert_read_errors(file: str) -> Iterator[None]:
    """Converts errors of the operating system, the UTF-8 decoder and the decompressors to `DataError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: {error.reason} at byte {error.start}.",
            f"Save the file as UTF-8. If the file is Latin-1, run: iconv -f LATIN1 -t UTF-8 {shlex.quote(file)} > NEW.",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read: {cause}.", "Pass a readable file.") from error


def open_text(file: str, encoding: str, newline: str) -> IO[str]:
    """Opens a text file, and decompresses it if its name has an ending in `COMPRESSIONS`."""
    ending = Path(file).suffix.lower()
    if ending == ".zst":
        import pyarrow

        stream = pyarrow.CompressedInputStream(pyarrow.OSFile(file), "zstd")
        return io.TextIOWrapper(stream, encoding=encoding, newline=newline)
    if ending == ".bz2":
        return bz2.open(file, "rt", encoding=encoding, newline=newline)
    if ending == ".gz":
        return gzip.open(file, "rt", encoding=encoding, newline=newline)
    return open(file, encoding=encoding, newline=newline)
