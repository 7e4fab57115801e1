"""Texts out of a file and predictions into one, row by row: CSV, TSV, JSON lines, Parquet, plain lines."""

from __future__ import annotations

import csv
import functools
import gzip
import hashlib
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from toolchain.errors import DataError

# One text, or two that are asked together.
Text = str | tuple[str, str]
TEXT_COLUMNS = ("sentence", "text")
STDIN = "-"
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")  # by a file's ending; of input, anything else is plain lines
PARQUET_ROWS = 1000  # read and written at once
MOST_FIELD = 1 << 30  # characters of a CSV field; Python's own limit is 131,072

Row = Mapping[str, Any]
Choose = Callable[[Sequence[str]], Sequence[str]]  # a table's columns → those wanted; raises where they are not there


@dataclass(frozen=True)
class Table:
    """A file of rows with named columns: CSV, TSV, JSON lines (each also gzipped) or Parquet, by its ending."""

    file: str

    def read(self, choose: Choose) -> Iterator[tuple[Any, ...]]:
        """The chosen columns of every row in order, holding a few at a time; None where a row lacks one.

        Raises `DataError` for a file that is not there, is not UTF-8, or is not what its ending says, by its row.
        """
        readers = {".csv": self._csv, ".tsv": self._csv, ".jsonl": self._jsonl, ".parquet": self._parquet}
        reader = readers.get(kind_of(self.file))
        if reader is None:
            raise DataError(f"{self.file} is none of {', '.join(FORMATS)}.", "Convert it to one of them.")
        with readable(self.file):
            yield from reader(choose)

    def _csv(self, choose: Choose) -> Iterator[tuple[Any, ...]]:
        csv.field_size_limit(MOST_FIELD)
        # Tab-separated values have no quoting (IANA, GLUE): a stray quote must not swallow the rows that follow.
        tab: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
        dialect = tab if kind_of(self.file) == ".tsv" else {"strict": True}
        with open_text(self.file, "utf-8-sig", "") as stream:
            rows = csv.reader(stream, **dialect)
            try:
                header = next(rows, [])
                at = [self._once(header, name) for name in choose(header)]
                for number, row in enumerate(rows, start=1):
                    if not row:  # a blank line
                        continue
                    if len(row) != len(header):
                        what = f"{len(row)} fields instead of {len(header)}"
                        raise self.wrong(number, what, "Quote texts that hold commas or line breaks.")
                    yield tuple(row[i] for i in at)
            except csv.Error as error:
                raise DataError(
                    f"{self.file}, line {rows.line_num}: {error}.", "Quote texts that hold commas."
                ) from error

    def _once(self, header: Sequence[str], name: str) -> int:
        if header.count(name) > 1:
            raise DataError(
                f"{self.file} has {header.count(name)} columns {name!r}, and which is meant cannot be told.",
                "Rename or remove one.",
            )
        return header.index(name)

    def _jsonl(self, choose: Choose) -> Iterator[tuple[Any, ...]]:
        names: Sequence[str] | None = None
        with open_text(self.file, "utf-8", "\n") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise self.wrong(number, f"no JSON ({error})") from error
                if not isinstance(row, dict):
                    raise self.wrong(number, "no JSON object")
                names = choose(list(row)) if names is None else names
                yield tuple(row.get(name) for name in names)

    def _parquet(self, choose: Choose) -> Iterator[tuple[Any, ...]]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.file) as file:
                header = file.schema_arrow.names
                at = [self._once(header, name) for name in choose(header)]
                names = [header[i] for i in at]
                for batch in file.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(names))):
                    yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.file} cannot be read: {error}.", "Write it again as Parquet.") from error

    def wrong(self, number: int, what: str, mend: str = "Correct the row.") -> DataError:
        """The error that a row, counted from 1, is."""
        return DataError(f"{self.file}, row {number}: {what}.", mend)


@dataclass(frozen=True)
class Texts:
    """Where texts are: a file's name, or ``-`` for plain lines on standard input; `column` names the texts, else it is
    `sentence` or `text`, and `pair` that of second texts, where each row has two."""

    file: str
    column: str | None = None
    pair: str | None = None

    def read(self) -> Iterator[Text]:
        """Every text or pair in order, holding a few at a time.

        Raises `DataError` for a file that is not there, is not UTF-8, lacks the column, or holds something that is no
        text, which it names by its row.
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
        """Of the file's bytes, in hex; empty for standard input, which can be read once. `DataError` for a file that
        cannot be read."""
        if self.file == STDIN:
            return ""
        with readable(self.file), open(self.file, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    @property
    def columns(self) -> list[str]:
        """The columns that were named."""
        return [name for name in (self.column, self.pair) if name]

    @property
    def digest(self) -> str:
        """Name, sha256 of the bytes and the columns where any was named: the same text for the same texts."""
        return ":".join([Path(self.file).name, self.sha256, *self.columns])

    def count(self) -> int | None:
        """How many texts `read` gives, found by reading them: what is wrong with one is told before any is scored. None
        for standard input, which can be read once."""
        return None if self.file == STDIN else sum(1 for _ in self.read())

    def _lines(self) -> Iterator[str]:
        if self.columns:
            raise DataError(
                f"{self.file} is read as plain lines, which have no columns.", "Leave out the options that name any."
            )
        with readable(self.file):
            stream: AbstractContextManager[IO[str]] = (
                nullcontext(_utf8(sys.stdin))  # not ours to close
                if self.file == STDIN
                else open(self.file, encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by the with below)
            )
            with stream as lines:
                for line in lines:
                    yield line.rstrip("\r\n")


def kind_of(file: str) -> str:
    """The ending that says what a file is, without that of its compression."""
    name = file.lower()
    return Path(name.removesuffix(".gz")).suffix


def text_columns(names: Sequence[str], text: str | None, pair: str | None, file: str) -> list[str]:
    """The column of texts, `sentence` or `text` where it is not named, and that of second texts where it is; raises
    `DataError` where `names` lack it."""
    if text is None and not any(name in names for name in TEXT_COLUMNS):
        what = f"no column {' or '.join(map(repr, TEXT_COLUMNS))}"
        raise DataError(f"{file} has {what}; it has {_listed(names)}.", "Name it with --text-column.")
    text = text or next(name for name in TEXT_COLUMNS if name in names)
    first = named(names, text, file, "--text-column")
    return [first, named(names, pair, file, "--text-pair-column")] if pair else [first]


def text_of(values: Sequence[Any], names: Sequence[str], number: int, table: Table) -> Text:
    """The text of a row, or its pair of texts, by the columns `names`; `DataError` where one is none."""
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, str):
            raise table.wrong(number, f"no text in {name!r}")
    return values[0] if len(values) == 1 else (values[0], values[1])


def named(names: Sequence[str], asked: str, file: str, option: str) -> str:
    """`asked`, which `option` names; `DataError` where `names` lack it."""
    if asked not in names:
        raise DataError(f"{file} has no column {asked!r}; it has {_listed(names)}.", f"Name it with {option}.")
    return asked


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


@contextmanager
def readable(file: str) -> Iterator[None]:
    """Raises `DataError` for what the system or the decoder says of a file."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8: {error.reason} at byte {error.start}.",
            f"Save it as UTF-8; from Latin-1: iconv -f LATIN1 -t UTF-8 {file} > NEW.",
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        said = getattr(error, "strerror", None) or error
        raise DataError(f"{file} cannot be read: {said}.", "Name a readable file.") from error


def open_text(file: str, encoding: str, newline: str) -> IO[str]:
    """A text file, decompressed where it is gzipped."""
    if file.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding=encoding, newline=newline)
    return open(file, encoding=encoding, newline=newline)


def _utf8(stream: Any) -> Any:
    """Standard input as UTF-8 whatever the locale says."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(encoding="utf-8", errors="strict")
    return stream


@contextmanager
def writer(path: Path | None, columns: Sequence[str]) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Takes rows a few at a time into a file, in the format of its ending; JSON lines to standard output for None."""
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
            # In TSV a tab or line break inside a text has no place: Python writes it quoted, as spreadsheets do.
            table = csv.DictWriter(stream, columns, delimiter="\t" if kind == ".tsv" else ",", lineterminator="\n")
            table.writeheader()

            def write(rows: Sequence[Row]) -> None:
                table.writerows(rows)

        yield write


def _parquet_writer(stack: ExitStack, path: Path | None, columns: Sequence[str]) -> Callable[[Sequence[Row]], None]:
    import pyarrow
    import pyarrow.parquet

    kinds = [pyarrow.float32() if name.startswith("score_") else pyarrow.string() for name in columns]
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
    file = stack.enter_context(pyarrow.parquet.ParquetWriter(path, schema))

    def write(rows: Sequence[Row]) -> None:
        file.write_table(pyarrow.Table.from_pylist(list(rows), schema))

    return write
