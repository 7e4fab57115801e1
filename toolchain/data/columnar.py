"""Reads Parquet files and Arrow streams in a child process, in bounded memory and time.

The library for both formats is written in C++: a damaged file can end its process, or make it allocate any amount of
memory. `toolchain.data.columnar_worker` runs in the child process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from toolchain.errors import DataError
from toolchain.system.child import Child

ANSWER_S = 60.0  # seconds for the columns of a file, and for some rows
MEMORY_BYTES = 1 << 31  # memory of the child beyond its imports
HINT = "Save the data again, or save it as CSV."


class Header(list[str]):
    """The names of a table's columns.

    Attributes:
        classes: Class names of each column whose values are indices of class names.
    """

    classes: Mapping[str, Sequence[str]] = {}


class _Reader(Child):
    """A new child process for the files of one table.

    Attributes:
        file: The file that the child process reads now.
    """

    file = ""

    def __init__(self) -> None:
        super().__init__("toolchain.data.columnar_worker", {})

    def open(self, file: str) -> Header:
        self.file = file
        reply = self.ask({"do": "open", "file": file}, ANSWER_S)
        header = Header(reply["columns"])
        header.classes = reply["classes"]
        return header

    def _make_error(self, cause: str) -> DataError:
        return DataError(f"{self.file} cannot be read. {cause}", HINT)


def read_rows(
    files: Sequence[str], choose: Callable[[Header], Sequence[str]], row_bytes: int
) -> Iterator[tuple[Any, ...]]:
    """Yields the chosen columns of each row of all files in order, with None for a missing value.

    A value is a text, a number, true or false, None, or a list of these. Any other value becomes a dictionary that has
    its Python representation.

    Args:
        files: Names of the files, which must have the same columns. A file whose name ends in ``.parquet`` is a Parquet
            file, and any other file is an Arrow stream.
        choose: Function that takes the columns of the first file, and returns the columns to read.
        row_bytes: Largest number of bytes of the chosen columns of a row.

    Raises:
        DataError: A file is missing or damaged, has other columns than the first file, has a row that is too long, or
            exceeds a limit of time or memory.
    """
    with closing(_Reader()) as reader:
        # The child answers before it opens a file, so this needs no limit of time.
        reader.ask({"row_bytes": row_bytes, "memory_bytes": MEMORY_BYTES}, None)
        names: Sequence[str] | None = None
        for file in files:
            header = reader.open(file)
            names = choose(header) if names is None else names
            reader.ask({"do": "choose", "columns": names}, ANSWER_S)
            while rows := reader.ask({"do": "read"}, ANSWER_S)["rows"]:
                yield from map(tuple, rows)
