"""Texts out of a file and predictions into one, row by row: CSV, TSV, JSON lines, Parquet, plain lines."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from toolchain.errors import DataError
from toolchain.inputs import TEXT_COLUMNS

STDIN = "-"
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")  # by a file's ending; of input, anything else is plain lines
PARQUET_ROWS = 1000  # read and written at once
MOST_FIELD = 1 << 30  # characters of a CSV field; Python's own limit is 131,072

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Texts:
    """Where texts are: a file's name, or ``-`` for plain lines on standard input; `column` names the texts, else it is
    `sentence` or `text`."""

    file: str
    column: str | None = None

    def read(self) -> Iterator[str]:
        """Every text in order, holding a few at a time.

        Raises `DataError` for a file that is not there, is not UTF-8, lacks the column, or holds something that is no
        text, which it names by its row.
        """
        kind = Path(self.file).suffix.lower()
        readers: dict[str, Callable[[], Iterator[str]]] = {
            ".csv": self._csv,
            ".tsv": self._csv,
            ".jsonl": self._jsonl,
            ".parquet": self._parquet,
        }
        reader = readers.get(kind, self._lines) if self.file != STDIN else self._lines
        try:
            yield from reader()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.file} is not UTF-8: {error.reason} at byte {error.start}.", "Save it as UTF-8."
            ) from error
        except OSError as error:
            raise DataError(
                f"{self.file} cannot be read: {error.strerror or error}.", "Name a readable file."
            ) from error

    @functools.cached_property
    def sha256(self) -> str:
        """Of the file's bytes, in hex; empty for standard input, which can be read once. `DataError` for a file that
        cannot be read."""
        if self.file == STDIN:
            return ""
        try:
            with open(self.file, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise DataError(f"{self.file} cannot be read: {error.strerror}.", "Name a readable file.") from error

    @property
    def digest(self) -> str:
        """Name, sha256 of the bytes and the column where one was named: the same text for the same texts."""
        return ":".join([Path(self.file).name, self.sha256, *([self.column] if self.column else [])])

    def count(self) -> int | None:
        """How many texts `read` gives, found by reading them: what is wrong with one is told before any is scored. None
        for standard input, which can be read once."""
        return None if self.file == STDIN else sum(1 for _ in self.read())

    def _lines(self) -> Iterator[str]:
        if self.file == STDIN and not self.column:
            stream: AbstractContextManager[IO[str]] = nullcontext(_utf8(sys.stdin))  # not ours to close
        elif self.column:
            raise DataError(f"{self.file} is read as plain lines, which have no columns.", "Leave --text-column out.")
        else:
            stream = open(self.file, encoding="utf-8", newline="\n")  # noqa: SIM115 (closed by the with below)
        with stream as lines:
            for line in lines:
                yield line.rstrip("\r\n")

    def _csv(self) -> Iterator[str]:
        tab = self.file.lower().endswith(".tsv")
        csv.field_size_limit(MOST_FIELD)
        # Tab-separated values have no quoting (IANA).
        dialect: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {"strict": True}
        with open(self.file, encoding="utf-8-sig", newline="") as stream:
            rows = csv.reader(stream, **dialect)
            try:
                header = next(rows, [])
                at = header.index(self._chosen(header))
                for number, row in enumerate(rows, start=1):
                    if not row:  # a blank line
                        continue
                    if len(row) != len(header):
                        raise self._wrong(number, f"{len(row)} fields instead of {len(header)}")
                    yield row[at]
            except csv.Error as error:
                raise DataError(
                    f"{self.file}, line {rows.line_num}: {error}.", "Quote texts that hold commas."
                ) from error

    def _jsonl(self) -> Iterator[str]:
        name = None
        with open(self.file, encoding="utf-8", newline="\n") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise self._wrong(number, f"no JSON ({error})") from error
                if not isinstance(row, dict):
                    raise self._wrong(number, "no JSON object")
                name = name or self._chosen(list(row))
                if not isinstance(row.get(name), str):
                    raise self._wrong(number, f"no text in {name!r}")
                yield row[name]

    def _parquet(self) -> Iterator[str]:
        import pyarrow
        import pyarrow.parquet

        number = 0
        try:
            with pyarrow.parquet.ParquetFile(self.file) as file:
                name = self._chosen(file.schema_arrow.names)
                for batch in file.iter_batches(PARQUET_ROWS, columns=[name]):
                    for text in batch.column(0).to_pylist():
                        number += 1
                        if not isinstance(text, str):
                            raise self._wrong(number, f"no text in {name!r}")
                        yield text
        except pyarrow.ArrowException as error:
            raise DataError(f"{self.file} cannot be read: {error}.", "Write it again as Parquet.") from error

    def _chosen(self, names: Sequence[str]) -> str:
        found = self.column or next((name for name in TEXT_COLUMNS if name in names), None)
        if found in names:
            return str(found)
        what = f"no column {found!r}" if found else f"no column {' or '.join(map(repr, TEXT_COLUMNS))}"
        raise DataError(
            f"{self.file} has {what}; it has {', '.join(map(repr, names)) or 'none'}.", "Name it with --text-column."
        )

    def _wrong(self, number: int, what: str) -> DataError:
        return DataError(f"{self.file}, row {number}: {what}.", "Correct the row.")


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

    kinds = [pyarrow.string() if name in ("text", "prediction") else pyarrow.float32() for name in columns]
    schema = pyarrow.schema(list(zip(columns, kinds, strict=True)))
    file = stack.enter_context(pyarrow.parquet.ParquetWriter(path, schema))

    def write(rows: Sequence[Row]) -> None:
        file.write_table(pyarrow.Table.from_pylist(list(rows), schema))

    return write
