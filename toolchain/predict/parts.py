"""Predicts the texts of many input files into a folder of Parquet parts; a killed run continues.

Each input file is read in work units. A unit becomes one part: the input's columns, the id of each row, and the answers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

from toolchain.artifacts import publishing
from toolchain.data.sources import Part, find_parts
from toolchain.data.units import Columns, PartReader, Unit, open_part
from toolchain.errors import DataError
from toolchain.predict import LoadedModel, Model, load_model
from toolchain.predict.output_folder import (
    FORMAT,
    InputRecord,
    OutputFolder,
    Run,
    UnitRecord,
    claim,
    finished_units,
    part_name,
    require_apart,
    write_manifest,
    write_record,
)
from toolchain.predict.table_scoring import score_texts
from toolchain.progress import Bar, Say
from toolchain.system import hardware

UNIT_ROWS = 1 << 16  # largest number of rows of a unit
ROW_ID = "row_id"
# A row id has the index of the input file in its upper bits, and the index of the row in the file in these lower bits.
# So an engine knows the id of a row without the number of rows of earlier files, and the ids have the order of the input.
ROW_BITS = 40


@dataclass(frozen=True)
class Request:
    """A prediction of many input files.

    Attributes:
        inputs: Files, folders, patterns and URLs.
        output: Path or URL of the output folder.
        column: Column of the texts; None for ``sentence``, ``text`` or ``tokens``.
        pair: Column of the second texts if rows are pairs; None otherwise.
        max_errors: Largest number of rows without an answer.
    """

    inputs: Sequence[str]
    output: str
    column: str | None = None
    pair: str | None = None
    max_errors: int = 0


@dataclass(frozen=True)
class Summary:
    """What a run wrote.

    Attributes:
        rows: Number of rows with an answer, of this run and of earlier runs into the same folder.
        errors: Number of rows without an answer.
        digest: Digest of all parts; see `output_folder.write_manifest`.
    """

    rows: int
    errors: int
    digest: str


@dataclass
class _Progress:
    """The state of a run: the records of the finished units, and the columns of the first input file."""

    units: list[tuple[str, UnitRecord]] = field(default_factory=list)
    columns: Columns | None = None

    def add(self, part: int, unit: int, record: UnitRecord) -> None:
        self.units.append((part_name(part, unit), record))
        self.columns = self.columns or record.columns

    @property
    def errors(self) -> int:
        return sum(record.errors for _, record in self.units)


def predict_parts(
    model: Model,
    request: Request,
    say: Say,
    bar: Bar,
    load: Callable[[Model, int], LoadedModel] = load_model,
) -> Summary:
    """Scores all rows of the inputs that no earlier run has scored, and writes the manifest.

    Args:
        model: The model.
        request: Inputs, output and settings.
        say: Called with each event.
        bar: Shows the progress.
        load: Function that loads the model with a number of threads.

    Raises:
        DataError: An input cannot be read, or more than `request.max_errors` rows have no answer. Finished parts stay.
        ArtifactError: The output folder has other files or cannot be written.
    """
    folder = OutputFolder(request.output)
    require_apart(folder, request.inputs)
    parts = find_parts(request.inputs)
    inputs = [InputRecord(part.name, part.size, part.version) for part in parts]
    run = Run(FORMAT, model.id, request.column, request.pair, UNIT_ROWS, inputs)
    with _lock(folder, say), ExitStack() as stack:
        sizes = claim(folder, run)
        state = _Progress()
        finished = [finished_units(folder, run, sizes, index) for index in range(len(parts))]
        if done := sum(record.rows for records in finished for record in records):
            say(f"{folder.name}: {done} rows are already scored")
        scorer = _Scorer(model, request, folder, run, load, stack)
        progress = stack.enter_context(bar("predict"))
        for index, (part, records) in enumerate(zip(parts, finished, strict=True)):
            for unit, record in enumerate(records):
                state.add(index, unit, record)
            if not (records and records[-1].is_last):
                scorer.score_part(index, part, records, state, parts[0].name)
            progress(index + 1, len(parts), "scoring")
        digest = write_manifest(folder, run, state.units)
    rows = sum(record.rows for _, record in state.units)
    return Summary(rows - state.errors, state.errors, digest)


def _lock(folder: OutputFolder, say: Say) -> AbstractContextManager[None]:
    """Locks a local folder. Two runs into one folder behind a URL write equal parts, so they need no lock."""
    if folder.local is None:
        return nullcontext()
    return publishing.lock(folder.local, lambda: say(f"{folder.name}: waiting, because another run is writing there"))


@dataclass
class _Scorer:
    """Scores the units of input files, and loads the model for the first one."""

    model: Model
    request: Request
    folder: OutputFolder
    run: Run
    load: Callable[[Model, int], LoadedModel]
    stack: ExitStack
    loaded: LoadedModel | None = None

    def score_part(
        self, index: int, part: Part, records: Sequence[UnitRecord], state: _Progress, first_name: str
    ) -> None:
        """Scores the units of one input file after those with `records`."""
        with open_part(part) as reader:
            reader.start(state.columns, first_name, self.request.column, self.request.pair)
            _require_free_names(reader.columns, self.model.answer_columns, part.name)
            first_row = sum(record.rows for record in records)
            reader.skip(first_row)
            for number, unit in enumerate(self._units(reader, state), start=len(records)):
                if unit.is_last:
                    part.require_unchanged()
                record = self._score_unit(index, number, part, first_row, unit, reader.columns, state.errors)
                state.add(index, number, record)
                first_row += record.rows

    def _units(self, reader: PartReader, state: _Progress) -> Iterator[Unit]:
        while True:
            unit = reader.read(UNIT_ROWS, self.request.max_errors - state.errors)
            yield unit
            if unit.is_last:
                return

    def _score_unit(
        self, index: int, number: int, part: Part, first_row: int, unit: Unit, columns: Columns, errors: int
    ) -> UnitRecord:
        """Scores and writes one unit; `errors` rows of earlier units have no answer."""
        self._require_few(unit.faults, errors, part, first_row)
        if self.loaded is None:
            self.loaded = self.stack.enter_context(closing(self.load(self.model, hardware.cores())))
        names = self.model.answer_columns
        skipped = [row for row, _ in unit.faults]
        answers = score_texts(self.loaded, self.model.label_set, names, unit.texts, skipped)
        faults = sorted([*unit.faults, *answers.faults])
        self._require_few(faults, errors, part, first_row)
        name = part_name(index, number)
        content = _to_parquet(unit, answers.rows, answers.table, (index << ROW_BITS) + first_row, self.run)
        if faults:
            lines = [_error_line(index, part, first_row + row, reason) for row, reason in faults]
            self.folder.write(f"_errors/{name}.jsonl", "".join(lines).encode())
        self.folder.write(f"{name}.parquet", content)
        digest = hashlib.sha256(content).hexdigest()
        record = UnitRecord(
            self.run.id, first_row, len(unit.texts), len(faults), unit.is_last, len(content), digest,
            [list(column) for column in columns],
        )  # fmt: skip
        write_record(self.folder, f"_units/{name}.json", record)
        return record

    def _require_few(self, faults: Sequence[tuple[int, str]], errors: int, part: Part, first_row: int) -> None:
        left = self.request.max_errors - errors
        if len(faults) > left:
            row, reason = faults[left]
            raise DataError(
                f"{part.name}, row {first_row + row + 1}: {reason}.",
                "Correct the row, or allow a number of rows without an answer with --max-errors. Finished parts stay.",
            )


def _error_line(index: int, part: Part, row: int, reason: str) -> str:
    body = {ROW_ID: (index << ROW_BITS) + row, "input": part.name, "row": row + 1, "reason": reason}
    return json.dumps(body) + "\n"


def _require_free_names(columns: Columns, answer_columns: Sequence[str], name: str) -> None:
    taken = {column for column, _ in columns} & {ROW_ID, *answer_columns}
    if taken:
        raise DataError(f"{name} has the column {min(taken)!r}, which `predict` writes.", "Rename the column.")


def _to_parquet(unit: Unit, rows: Sequence[int], answers: Any, first_id: int, run: Run) -> bytes:
    """Returns the content of a part: the ids and the input's columns of the rows with an answer, and the answers."""
    import pyarrow
    import pyarrow.parquet

    kept = unit.columns.take(pyarrow.array(rows, pyarrow.int64()))
    ids = pyarrow.array([first_id + row for row in rows], pyarrow.int64())
    table = pyarrow.table(
        [ids, *kept.columns, *answers.columns], names=[ROW_ID, *kept.column_names, *answers.column_names]
    )
    described = {"model": run.model, "run": run.id}
    sink = pyarrow.BufferOutputStream()
    try:
        pyarrow.parquet.write_table(
            table.replace_schema_metadata({"toolchain": json.dumps(described)}), sink, compression="zstd"
        )
    except pyarrow.ArrowException as error:
        raise DataError(
            f"Parquet cannot hold a column of the input ({type(error).__name__}: {error}).", "Leave the column out."
        ) from error
    return bytes(sink.getvalue())
