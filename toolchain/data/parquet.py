"""Reads Parquet files in a child process, in bounded memory and time.

The library for Parquet is written in C++: a damaged file can end its process, or make it allocate any amount of memory.
`toolchain.data.parquet_worker` runs in the child process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

from toolchain.errors import DataError
from toolchain.system.child import Child

ANSWER_S = 60.0  # seconds for the columns of a file, and for some rows
MEMORY_BYTES = 1 << 31  # memory of the child beyond its imports
HINT = "Save the file again as Parquet, or as CSV."


class _Reader(Child):
    """A new child process for one file."""

    def __init__(self, file: str) -> None:
        super().__init__("toolchain.data.parquet_worker", {})
        self._file = file

    def _make_error(self, cause: str) -> DataError:
        return DataError(f"{self._file} cannot be read. {cause}", HINT)


def read_rows(file: str, choose: Callable[[Sequence[str]], Sequence[str]], row_bytes: int) -> Iterator[tuple[Any, ...]]:
    """Yields the chosen columns of each row in order, with None for a missing value.

    A value is a text, a number, true or false, None, or a list of these. Any other value becomes a dictionary that has
    its Python representation.

    Args:
        file: Name of the file.
        choose: Function that takes the columns of the file, and returns the columns to read.
        row_bytes: Largest number of bytes of the chosen columns of a row.

    Raises:
        DataError: The file is missing or damaged, has a row that is too long, or exceeds a limit of time or memory.
    """
    with closing(_Reader(file)) as reader:
        # The child answers before it opens the file, so this needs no limit of time.
        reader.ask({"file": file, "row_bytes": row_bytes, "memory_bytes": MEMORY_BYTES}, None)
        columns = reader.ask({"do": "open"}, ANSWER_S)["columns"]
        reader.ask({"do": "choose", "columns": choose(columns)}, ANSWER_S)
        while rows := reader.ask({"do": "read"}, ANSWER_S)["rows"]:
            yield from map(tuple, rows)
