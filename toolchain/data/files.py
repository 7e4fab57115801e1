"""Reads texts from CSV, TSV, JSON lines, Parquet or plain lines, and writes predictions, row by row."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from toolchain.errors import DataError

# One text, or a pair of texts that together are one input of the model.
Text = str | tuple[str, str]
TEXT_COLUMNS = ("sentence", "text", "tokens")
WORD = re.compile(r"\S+")
STDIN = "-"
# Endings of files with columns. An input file without an ending of `FORMATS` has plain lines, with one text per line.
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
PARQUET_ROWS = 1000  # Number of Parquet rows to read at once.
MAX_FIELD_CHARACTERS = 1 << 30  # Limit for the length of a CSV field; Python's default limit is 131,072.

Row = Mapping[str, Any]
# Function that takes the columns of a table, and returns the columns to read or raises `DataError` if one is missing.
ChooseColumns = Callable[[Sequence[str]], Sequence[str]]


@dataclass(frozen=True)
class Table:
    """A file with columns; its ending says whether it is CSV, TSV, JSON lines (each also gzipped) or Parquet."""

    file: str

    def read(self, choose: ChooseColumns) -> Iterator[tuple[Any, ...]]:
        """Yields the chosen columns of each row in order, with None for a missing value.

        The method holds only a few rows in memory.

        Args:
            choose: Function that takes the columns of the file, and returns the columns to read.

        Raises:
            DataError: The file is missing, is not UTF-8, or does not have the format of its ending. The error
                message names the faulty row where possible.
        """
        readers = {".csv": self._csv, ".tsv": self._csv, ".jsonl": self._jsonl, ".parquet": self._parquet}
        reader = readers.get(kind_of(self.file))
        if reader is None:
            raise DataError(
                f"The ending of {self.file} is none of {', '.join(FORMATS)}.",
                "Convert the file to one of these formats.",
            )
        with convert_read_errors(self.file):
            yield from reader(choose)

    def _csv(self, choose: ChooseColumns) -> Iterator[tuple[Any, ...]]:
        csv.field_size_limit(MAX_FIELD_CHARACTERS)
        # The TSV format of IANA and GLUE has no quoting. If the reader interpreted quotes, an unpaired quote
        # would join several rows.
        tsv_dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        dialect = tsv_dialect if kind_of(self.file) == ".tsv" else {"strict": True}
        with open_text(self.file, "utf-8-sig", "") as stream:
            rows = csv.reader(stream, **dialect)
            try:
                header = next(rows, [])
                indices = [self._column_index(header, name) for name in choose(header)]
                for number, row in enumerate(rows, start=1):
                    if not row:  # a blank line
                        continue
                    if len(row) != len(header):
                        fault = f"the number of fields is {len(row)} instead of {len(header)}"
                        raise self.row_error(number, fault, "Quote texts that contain commas or line breaks.")
                    yield tuple(row[i] for i in indices)
            except csv.Error as error:
                raise DataError(
                    f"{self.file}, line {rows.line_num}: {error}.", "Quote texts that contain commas."
                ) from error

    def _column_index(self, header: Sequence[str], name: str) -> int:
        if header.count(name) > 1:
            raise DataError(
                f"{self.file} has {header.count(name)} columns with the name {name!r}.",
                "Rename or remove one of these columns.",
            )
        return header.index(name)

    def _jsonl(self, choose: ChooseColumns) -> Iterator[tuple[Any, ...]]:
        names: Sequence[str] | None = None
        with open_text(self.file, "utf-8", "\n") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise self.row_error(number, f"the line is not JSON ({error})") from error
                if not isinstance(row, dict):
                    raise self.row_error(number, "the line is not a JSON object")
                names = choose(list(row)) if names is None else names
                yield tuple(row.get(name) for name in names)

    def _parquet(self, choose: ChooseColumns) -> Iterator[tuple[Any, ...]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.file) as file:
                header = file.schema_arrow.names
                indices = [self._column_index(header, name) for name in choose(header)]
                names = [header[i] for i in indices]
                for batch in file.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(names))):
                    yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.file} cannot be read: {error}.", "Save the file again as Parquet.") from error

    def row_error(self, number: int, fault: str, hint: str = "Correct the row.") -> DataError:
        """Returns an error about one row of the file.

        Args:
            number: Number of the row, from 1.
            fault: Description of the fault.
            hint: Advice to the user.
        """
        return DataError(f"{self.file}, row {number}: {fault}.", hint)


@dataclass(frozen=True)
class Texts:
    """A source of texts.

    Attributes:
        file: Name of a file; ``-`` for plain lines on standard input.
        column: Column of the texts; None for ``sentence`` or ``text``.
        pair: Column of the second texts if rows are pairs; None otherwise.
    """

    file: str
    column: str | None = None
    pair: str | None = None

    def read(self) -> Iterator[Text]:
        """Yields every text or pair in order, and holds only a few of them in memory.

        Raises:
            DataError: The file is missing, is not UTF-8, lacks the column, or has a value that is not a text. The error
                message names the faulty row where possible.
        """
        if self.file == STDIN or kind_of(self.file) not in FORMATS:
            yield from self._lines()
            return
        table, names = Table(self.file), list[str]()

        def choose(header: Sequence[str]) -> list[str]:
            names.extend(text_columns(header, self.column, self.pair, self.file))
            return names

        for number, row in enumerate(table.read(choose), start=1):
            yield text_of(row, names, number, table)

    @functools.cached_property
    def sha256(self) -> str:
        """Returns the sha256 in hex of the file's bytes; empty for standard input, which can be read only once.

        Raises:
            DataError: The file is unreadable.
        """
        if self.file == STDIN:
            return ""
        with convert_read_errors(self.file), open(self.file, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def columns(self) -> list[str]:
        """Returns the columns of texts that the user named."""
        return [name for name in (self.column, self.pair) if name]

    @property
    def digest(self) -> str:
        """Returns an id of the texts: file name, sha256 of the bytes, and the columns that the user named."""
        return ":".join([Path(self.file).name, self.sha256, *self.columns])

    def count(self) -> int | None:
        """Returns the number of texts, or None for standard input, which can be read only once.

        It reads all texts, so that a faulty row raises an error before the first prediction.
        """
        return None if self.file == STDIN else sum(1 for _ in self.read())

    def _lines(self) -> Iterator[str]:
        if self.columns:
            raise DataError(
                f"{self.file} has plain lines, which have no columns.", "Leave out the options that name columns."
            )
        with convert_read_errors(self.file):
            stream: AbstractContextManager[IO[str]] = (
                nullcontext(_set_utf8(sys.stdin))  # standard input must stay open
                if self.file == STDIN
                else open(self.file, encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by the with below)
            )
            with stream as lines:
                for line in lines:
                    yield line.rstrip("\r\n")


def kind_of(file: str) -> str:
    """Returns the file's ending in lower case, without ``.gz``, such as ``.csv``."""
    name = file.lower()
    return Path(name.removesuffix(".gz")).suffix


def text_columns(names: Sequence[str], text: str | None, pair: str | None, file: str) -> list[str]:
    """Returns the column of texts, followed by the column of second texts if `pair` is set.

    Args:
        names: Columns of the file.
        text: Column of the texts; None for ``sentence`` or ``text``.
        pair: Column of the second texts if rows are pairs; None otherwise.
        file: Name of the file, for error messages.

    Raises:
        DataError: The file lacks a column.
    """
    if text is None and not any(name in names for name in TEXT_COLUMNS):
        fault = f"none of the columns {', '.join(map(repr, TEXT_COLUMNS))}"
        raise DataError(
            f"{file} has {fault}. Its columns: {_format_names(names)}.", "Name the column of texts with --text-column."
        )
    text = text or next(name for name in TEXT_COLUMNS if name in names)
    text_column = require_column(names, text, file, "--text-column")
    return [text_column, require_column(names, pair, file, "--text-pair-column")] if pair else [text_column]


def text_of(values: Sequence[Any], names: Sequence[str], number: int, table: Table) -> Text:
    """Returns the text of a row, or its pair of texts; joins a list of words with spaces.

    Args:
        values: The row's text, or its two texts if rows are pairs.
        names: Names of the one or two columns of texts.
        number: Number of the row, from 1.
        table: The file, for error messages.

    Raises:
        DataError: A value in a column of texts is neither a text nor a list of words without spaces.
    """
    texts = []
    for name, value in zip(names, values, strict=True):
        if isinstance(value, list | tuple) and all(isinstance(word, str) for word in value):
            if wrong := [word for word in value if not WORD.fullmatch(word)]:
                raise table.row_error(number, f"the word {wrong[0]!r} in the column {name!r} is empty or has a space")
            value = " ".join(value)
        if not isinstance(value, str):
            raise table.row_error(number, f"the column {name!r} holds no text")
        texts.append(value)
    return texts[0] if len(texts) == 1 else (texts[0], texts[1])


def require_column(names: Sequence[str], column: str, file: str, option: str) -> str:
    """Checks that the file has the column, and returns its name.

    Args:
        names: Columns of the file.
        column: The column that must exist.
        file: Name of the file, for error messages.
        option: The command-line option that names the column, for error messages.

    Raises:
        DataError: The file lacks the column.
    """
    if column not in names:
        raise DataError(
            f"{file} has no column {column!r}. Its columns: {_format_names(names)}.", f"Choose a column with {option}."
        )
    return column


def _format_names(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


@contextmanager
def convert_read_errors(file: str) -> Iterator[None]:
    """Converts errors of the operating system, the UTF-8 decoder and gzip to `DataError`."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: {error.reason} at byte {error.start}.",
            f"Save the file as UTF-8. If the file is Latin-1, run: iconv -f LATIN1 -t UTF-8 {file} > NEW.",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        cause = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read: {cause}.", "Pass a readable file.") from error


def open_text(file: str, encoding: str, newline: str) -> IO[str]:
    """Opens a text file, and decompresses it if its name ends in ``.gz``."""
    if file.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding=encoding, newline=newline)
    return open(file, encoding=encoding, newline=newline)


def _set_utf8(stream: Any) -> Any:
    """Sets the stream to UTF-8, independent of the locale."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(encoding="utf-8", errors="strict")
    return stream


@contextmanager
def open_writer(path: Path | None, columns: Sequence[str]) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Yields a function that appends rows to a file, in the format of the file's ending.

    Args:
        path: The file; None for JSON lines on standard output.
        columns: Columns of the file. In Parquet, the column ``score`` and columns that begin with ``score_`` are
            float32, and all other columns are text. In formats other than JSON lines, a list becomes JSON text.
    """
    kind = path.suffix.lower() if path else ".jsonl"
    with ExitStack() as stack:
        if kind == ".parquet":
            yield _parquet_writer(stack, path, columns)
            return
        stream = stack.enter_context(path.open("w", encoding="utf-8", newline="")) if path else sys.stdout
        if kind == ".jsonl":

            def write(rows: Sequence[Row]) -> None:
                stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                stream.flush()
        else:
            # TSV cannot represent a tab or line break inside a text, so Python quotes such a text, as spreadsheets do.
            table = csv.DictWriter(stream, columns, delimiter="\t" if kind == ".tsv" else ",", lineterminator="\n")
            table.writeheader()

            def write(rows: Sequence[Row]) -> None:
                table.writerows(map(_flatten_lists, rows))

        yield write


def _flatten_lists(row: Row) -> Row:
    """Returns the row with each list as JSON text."""
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for name, value in row.items()
    }


def _parquet_writer(stack: ExitStack, path: Path | None, columns: Sequence[str]) -> Callable[[Sequence[Row]], None]:
    import pyarrow
    import pyarrow.parquet

    kinds = [
        pyarrow.float32() if name == "score" or name.startswith("score_") else pyarrow.string() for name in columns
    ]
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
    file = stack.enter_context(pyarrow.parquet.ParquetWriter(path, schema))

    def write(rows: Sequence[Row]) -> None:
        file.write_table(pyarrow.Table.from_pylist(list(map(_flatten_lists, rows)), schema))

    return write
