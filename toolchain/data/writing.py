"""Writes predictions, row by row, as CSV, TSV, JSON lines or Parquet."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from toolchain.system.escaping import escape_formula, to_json

Row = Mapping[str, Any]
# Endings of files that a spreadsheet opens, and that may contain formulas.
SPREADSHEETS = (".csv", ".tsv")


@contextmanager
def open_writer(
    path: Path | None, columns: Sequence[str], escape_formulas: bool = False
) -> Iterator[Callable[[Sequence[Row]], None]]:
    """Yields a function that appends rows to a file, in the format of the file's ending.

    Args:
        path: The file; None for JSON lines on standard output, in which escapes replace control characters.
        columns: Columns of the file. In Parquet, the column ``score`` and columns that begin with ``score_`` are
            float32, and all other columns are text. In formats other than JSON lines, a list becomes JSON text.
        escape_formulas: Whether an apostrophe precedes each text that a spreadsheet would read as a formula; see
            `escape_formula`. Only for the formats in `SPREADSHEETS`.
    """
    kind = path.suffix.lower() if path else ".jsonl"
    with ExitStack() as stack:
        if path is None:
            yield _write_lines(sys.stdout, to_json)
        elif kind == ".parquet":
            yield _parquet_writer(stack, path, columns)
        else:
            stream = stack.enter_context(path.open("w", encoding="utf-8", newline=""))
            if kind == ".jsonl":
                yield _write_lines(stream, lambda row: json.dumps(row, ensure_ascii=False))
                return
            # TSV cannot represent a tab or line break inside a text, so Python quotes such a text, as spreadsheets do.
            delimiter = "\t" if kind == ".tsv" else ","
            table = csv.DictWriter(_LineFeeds(stream), columns, delimiter=delimiter, lineterminator="\r\n")
            table.writeheader()
            convert = _escape_formulas if escape_formulas else _flatten_lists
            yield lambda rows: table.writerows(map(convert, rows))


@dataclass(frozen=True)
class _LineFeeds:
    r"""A stream for `csv.writer` that ends rows with a line feed.

    Before Python 3.13, `csv.writer` quotes a carriage return in a text only if the rows end with ``\r\n``. Without
    quotes, the rest of the text would become a new row.
    """

    stream: IO[str]

    def write(self, row: str) -> int:
        return self.stream.write(row.removesuffix("\r\n") + "\n")


def _write_lines(stream: Any, encode: Callable[[Row], str]) -> Callable[[Sequence[Row]], None]:
    """Returns a function that writes rows as lines of JSON and flushes the stream."""

    def write(rows: Sequence[Row]) -> None:
        stream.writelines(f"{encode(row)}\n" for row in rows)
        stream.flush()

    return write


def _flatten_lists(row: Row) -> Row:
    """Returns the row with each list as JSON text."""
    return {
        name: json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value for name, value in row.items()
    }


def _escape_formulas(row: Row) -> Row:
    """Returns the row for a spreadsheet: each list as JSON text, and no text that is a formula."""
    return {
        name: escape_formula(value) if isinstance(value, str) else value for name, value in _flatten_lists(row).items()
    }


def _parquet_writer(stack: ExitStack, path: Path, columns: Sequence[str]) -> Callable[[Sequence[Row]], None]:
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
