"""Reads input files in work units. A work unit is a list of consecutive rows that is scored and written as a whole.

A child process with limits reads the files, because a damaged file can crash a library or fill the memory. A file
behind a URL is copied to a temporary file first. `toolchain.data.units_worker` runs in the child process.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.data import storage
from toolchain.data.columnar import ANSWER_S, HINT, MEMORY_BYTES
from toolchain.data.files import Text, text_columns
from toolchain.data.sources import Part
from toolchain.data.tables import MAX_ROW_SIZE
from toolchain.errors import DataError
from toolchain.system.child import Child
from toolchain.system.files import temporary_folder

UNIT_BYTES = 1 << 26  # a unit ends when it has this number of bytes
SKIPPED_ROWS = 100_000  # rows that one answer of the child skips
# The name and the type of each column of a file.
Columns = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Unit:
    """A work unit.

    Attributes:
        columns: The input's columns, as a table of pyarrow.
        texts: The text or pair of texts of each row; empty texts in a row with a fault.
        faults: Index and reason for each row that holds no valid text.
        is_last: Whether the unit has the last row of its file.
    """

    columns: Any
    texts: list[Text]
    faults: list[tuple[int, str]]
    is_last: bool


class _Child(Child):
    def __init__(self) -> None:
        super().__init__("toolchain.data.units_worker", {})

    def _make_error(self, cause: str) -> DataError:
        return DataError(f"The input cannot be read. {cause}", HINT)


class PartReader:
    """The open child process for one input file; `open_part` creates it.

    Attributes:
        columns: The name and the type of each column.
        names: Names of the one or two columns of texts.
    """

    def __init__(self, child: Child, part: Part, file: Path, scratch: Path) -> None:
        self._child, self._part, self._file = child, part, file
        self._target = scratch / ".unit"  # no input file has this name
        self.columns: Columns = self._ask("open", file=str(file))["columns"]
        self.names: list[str] = []

    def start(self, order: Columns | None, first_name: str, column: str | None, pair: str | None) -> None:
        """Begins to read the rows.

        Args:
            order: Columns of the first file, which this file must have too; None if this is the first file.
            first_name: Name of the first file, for error messages.
            column: Column of the texts; None for ``sentence``, ``text`` or ``tokens``.
            pair: Column of the second texts if rows are pairs; None otherwise.

        Raises:
            DataError: The file has other columns than the first file, or lacks the column of texts.
        """
        if order is not None:
            _require_same_columns(self.columns, self._part.name, order, first_name)
            self.columns = order
        header = [name for name, _ in self.columns]
        self.names = text_columns(header, column, pair, self._part.name)
        self._ask("start", columns=header, texts=self.names)

    def skip(self, rows: int) -> None:
        """Skips rows that an earlier run scored; raises `DataError` if the file has fewer rows."""
        while rows:
            asked = min(rows, SKIPPED_ROWS)
            if self._ask("skip", rows=asked)["skipped"] < asked:
                raise DataError(
                    f"{self._part.name} has fewer rows than an earlier run has scored.",
                    "Choose another output folder for the changed input.",
                )
            rows -= asked

    def read(self, rows: int, most_faults: int) -> Unit:
        """Returns the next unit, with at most `rows` rows; it ends early after more than `most_faults` faulty rows."""
        import pyarrow

        reply = self._ask("read", rows=rows, size=UNIT_BYTES, faults=most_faults, target=str(self._target))
        faults = [(index, reason) for index, reason in reply["faults"]]
        with pyarrow.OSFile(str(self._target)) as file, pyarrow.ipc.open_stream(file) as stream:
            table = stream.read_all()
        table.validate(full=True)
        width = len(self.columns)
        values = [column.to_pylist() for column in table.columns[width:]]
        texts: list[Text] = list(values[0]) if len(values) == 1 else list(zip(*values, strict=True))
        return Unit(table.select(range(width)), texts, faults, reply["is_last"])

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Asks the child; an error names the input file instead of its local copy."""
        try:
            return self._child.ask({"do": method, **arguments}, ANSWER_S)
        except DataError as error:
            copy, name = str(self._file), self._part.name
            raise DataError(
                error.cause.replace(copy, name).replace("The input cannot", f"{name} cannot"),
                error.hint.replace(copy, name),
            ) from error


@contextmanager
def open_part(part: Part) -> Iterator[PartReader]:
    """Yields a reader of one input file, in a new child process.

    Raises:
        DataError: The file cannot be read.
    """
    with temporary_folder() as scratch:
        file = Path(part.location)
        if storage.is_url(part.location):
            file = scratch / Path(part.name).name  # the endings of the name state the format
            storage.copy_to_local(part.location, file, part.size)
        child = _Child()
        try:
            child.ask({"row_bytes": MAX_ROW_SIZE, "memory_bytes": MEMORY_BYTES}, None)
            yield PartReader(child, part, file, scratch)
        finally:
            child.close()


def _require_same_columns(columns: Columns, name: str, first_columns: Columns, first_name: str) -> None:
    """Raises `DataError` if two files differ in the names or types of their columns; the order may differ."""
    kinds, first_kinds = dict(map(tuple, columns)), dict(map(tuple, first_columns))
    hint = "Save all input files with the same columns, or score them in several runs."
    for column, kind in first_kinds.items():
        if column not in kinds:
            raise DataError(f"{name} has no column {column!r}, which {first_name} has.", hint)
        if kinds[column] != kind:
            raise DataError(
                f"The column {column!r} has the type {kinds[column]} in {name}, but {kind} in {first_name}.", hint
            )
    for column in kinds:
        if column not in first_kinds:
            raise DataError(f"{name} has the column {column!r}, which {first_name} lacks.", hint)
