"""Reads input files in chunks. A chunk is a list of consecutive rows that are scored and written as a whole.

A child process with limits reads the files, because a damaged file can crash a library or fill the memory. A file
behind a URL is copied to a temporary file first. `toolchain.data.chunks_worker` runs in the child process.
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
from toolchain.data.sources import InputFile
from toolchain.data.tables import MAX_ROW_SIZE, kind_of
from toolchain.errors import DataError
from toolchain.system.child import Child
from toolchain.system.files import temporary_folder

CHUNK_BYTES = 1 << 26  # a chunk ends when it has this number of bytes
# The name and the type of each column of a file.
Columns = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Chunk:
    """A list of consecutive rows of an input file.

    Attributes:
        columns: The input's columns, as a table of pyarrow.
        texts: The text or pair of texts of each row; empty texts in a row with a fault.
        faults: Index and reason for each row that holds no valid text.
        is_last: Whether the chunk has the last row of its file.
    """

    columns: Any
    texts: list[Text]
    faults: list[tuple[int, str]]
    is_last: bool


class ChunkReader(Child):
    """The child process that reads the chunks of one input file after the other; `open_reader` creates it.

    Attributes:
        columns: The name and the type of each column of the open file.
    """

    columns: Columns = ()

    def __init__(self, scratch: Path) -> None:
        self._copy, self._chunk = scratch / "copy", scratch / "chunk"
        self._name = self._file = ""
        super().__init__("toolchain.data.chunks_worker", {})

    def open(
        self, file: InputFile, first_columns: Columns | None, first_name: str, column: str | None, pair: str | None
    ) -> None:
        """Opens an input file.

        Args:
            file: The file.
            first_columns: Columns of the first input file, which this file must have too; None for the first file.
            first_name: Name of the first input file, for error messages.
            column: Column of the texts; None for ``sentence``, ``text`` or ``tokens``.
            pair: Column of the second texts if rows are pairs; None otherwise.

        Raises:
            DataError: The file cannot be read, has other columns than the first file, or lacks the column of texts.
        """
        self._name = file.name
        self._copy.unlink(missing_ok=True)
        if file.url is None:
            self._file = file.path
        else:
            # The endings of a name state the format.
            self._copy = self._copy.with_name("copy" + "".join(Path(file.path).suffixes[-2:]))
            self._file = str(self._copy)
            system, _ = storage.open_file_system(file.url)
            storage.copy_to_local(system, file.path, file.name, self._copy, file.size)
        self.columns = self._ask("open", file=self._file)["columns"]
        if first_columns is not None:
            if self.columns or kind_of(file.path) != ".jsonl":  # JSON lines without a line have no columns
                _require_same_columns(self.columns, file.name, first_columns, first_name)
            self.columns = first_columns
        header = [name for name, _ in self.columns]
        self._ask("start", columns=header, texts=text_columns(header, column, pair, file.name))

    def skip(self, rows: int) -> None:
        """Skips the rows of a chunk that an earlier run scored; raises `DataError` if the file has fewer rows."""
        if self._ask("skip", rows=rows)["skipped"] < rows:
            raise DataError(
                f"{self._name} has fewer rows than an earlier run has scored.",
                "Choose another output folder for the changed input.",
            )

    def read(self, rows: int, most_faults: int) -> Chunk:
        """Returns the next chunk, with at most `rows` rows; it ends early after more than `most_faults` faulty rows."""
        import pyarrow

        reply = self._ask("read", rows=rows, size=CHUNK_BYTES, faults=most_faults, target=str(self._chunk))
        faults = [(index, reason) for index, reason in reply["faults"]]
        with pyarrow.OSFile(str(self._chunk)) as file, pyarrow.ipc.open_stream(file) as stream:
            table = stream.read_all()
        table.validate(full=True)
        width = len(self.columns)
        values = [column.to_pylist() for column in table.columns[width:]]
        texts: list[Text] = list(values[0]) if len(values) == 1 else list(zip(*values, strict=True))
        return Chunk(table.select(range(width)), texts, faults, reply["is_last"])

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        """Asks the child; an error names the input file instead of its local copy."""
        try:
            return self.ask({"do": method, **arguments}, ANSWER_S)
        except DataError as error:
            cause, hint = (text.replace(self._file, self._name) for text in (error.cause, error.hint))
            raise DataError(cause, hint) from error

    def _make_error(self, cause: str) -> DataError:
        return DataError(f"{self._name or 'The input'} cannot be read. {cause}", HINT)


@contextmanager
def open_reader() -> Iterator[ChunkReader]:
    """Yields a reader with a new child process and a temporary folder, and removes both on exit."""
    with temporary_folder() as scratch:
        reader = ChunkReader(scratch)
        try:
            # The child answers before it opens a file, so this needs no limit of time.
            reader.ask({"row_bytes": MAX_ROW_SIZE, "memory_bytes": MEMORY_BYTES}, None)
            yield reader
        finally:
            reader.close()


def _require_same_columns(columns: Columns, name: str, first_columns: Columns, first_name: str) -> None:
    """Raises `DataError` if two files differ in the names or types of their columns; the order may differ."""
    kinds = {column[0]: column[1] for column in columns}
    first_kinds = {column[0]: column[1] for column in first_columns}
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
