"""Scores a chunk and writes its part, for every engine.

A worker of a cluster imports this module, so its imports must stay light.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from toolchain.data.chunks import Chunk, ChunkReader, Columns
from toolchain.data.files import Text, group_texts
from toolchain.data.sources import InputFile
from toolchain.errors import CheckpointError, DataError
from toolchain.predict import WINDOW_CHARACTERS, LoadedModel, Model, answer_values, predict_texts
from toolchain.predict.output_folder import OutputFolder, PartRecord, write_record

# The texts of one window are tokenised together and sorted by length.
WINDOW_TEXTS = 8192
ROW_ID = "row_id"
# A row id has the index of the input file in its upper bits, and the index of the row in the file in these lower bits.
# So an engine knows the id of a row without the lengths of earlier files, and the ids have the order of the input.
ROW_BITS = 40


@dataclass(frozen=True)
class Rest:
    """The chunks of an input file that no earlier run has scored.

    Attributes:
        file: The input file.
        index: Index of the input file.
        done: Number of rows of each chunk that an earlier run has scored.
    """

    file: InputFile
    index: int
    done: Sequence[int]


@dataclass(frozen=True)
class Job:
    """What an engine needs besides the model to score and write the rest of the inputs.

    Attributes:
        run_id: `output_folder.Run.id` of the run.
        output: Absolute path or URL of the output folder.
        answer_columns: `Model.answer_columns` of the model.
        column: Column of the texts; None for ``sentence``, ``text`` or ``tokens``.
        pair: Column of the second texts if rows are pairs; None otherwise.
        chunk_rows: Largest number of rows of a chunk.
        most_errors: Largest number of rows without an answer in the rest of the inputs.
        first_name: Name of the first input file, for error messages.
        columns: Columns of the first input file; None if no earlier run has read it.
    """

    run_id: str
    output: str
    answer_columns: Sequence[str]
    column: str | None
    pair: str | None
    chunk_rows: int
    most_errors: int
    first_name: str
    columns: Columns | None


@dataclass(frozen=True)
class PlacedChunk:
    """A chunk and its place in the input.

    Attributes:
        chunk: The chunk.
        input_name: Name of the input file.
        file: Index of the input file.
        number: Index of the chunk in the input file.
        first_row: Number of rows of the input file before the chunk.
        columns: Name and type of each column of the input.
    """

    chunk: Chunk
    input_name: str
    file: int
    number: int
    first_row: int
    columns: Columns


def read_rest(reader: ChunkReader, rest: Rest, job: Job, columns: Columns | None, errors: int) -> Iterator[PlacedChunk]:
    """Yields the chunks of an input file after those that an earlier run has scored.

    Args:
        reader: The child process that reads.
        rest: The input file.
        job: Inputs and settings.
        columns: Columns of the first input file; None for the first file itself.
        errors: Number of rows of this run without an answer so far.
    """
    file = rest.file
    reader.open(file, columns, job.first_name, job.column, job.pair)
    taken = {name for name, _ in reader.columns} & {ROW_ID, *job.answer_columns}
    if taken:
        raise DataError(f"{file.name} has the column {min(taken)!r}, which `predict` writes.", "Rename the column.")
    for rows in rest.done:
        reader.skip(rows)
    number, first_row, is_last = len(rest.done), sum(rest.done), False
    while not is_last:
        chunk = reader.read(job.chunk_rows, job.most_errors - errors)
        is_last = chunk.is_last
        if is_last:
            file.require_unchanged()
        require_few_errors(chunk.faults, job.most_errors - errors, file.name, first_row)
        errors += len(chunk.faults)
        yield PlacedChunk(chunk, file.name, rest.index, number, first_row, reader.columns)
        number, first_row = number + 1, first_row + len(chunk.texts)


def require_few_errors(faults: Sequence[tuple[int, str]], most: int, name: str, first_row: int) -> None:
    """Raises `DataError` if there are more than `most` faults in the chunk that begins at `first_row`."""
    if len(faults) > most:
        row, reason = faults[most]
        raise DataError(
            f"{name}, row {first_row + row + 1}: {reason}.",
            "Correct the row, or allow a number of rows without an answer with --max-errors. Finished parts stay.",
        )


class ChunkScorer:
    """Scores chunks with a loaded model and writes their parts."""

    def __init__(self, model: Model, loaded_model: LoadedModel, job: Job) -> None:
        self._model, self._loaded_model, self._job = model, loaded_model, job
        self._folder = OutputFolder(job.output)

    def score(self, placed: PlacedChunk, most_errors: int) -> PartRecord:
        """Scores a chunk, and writes its part, the list of its rows without an answer, and its record.

        Raises:
            DataError: More than `most_errors` rows have no answer.
        """
        chunk, model = placed.chunk, self._model
        rows, values, faults = _score_texts(self._loaded_model, model, chunk)
        faults = sorted([*chunk.faults, *faults])
        require_few_errors(faults, most_errors, placed.input_name, placed.first_row)
        first_id = (placed.file << ROW_BITS) + placed.first_row
        content = _to_parquet(chunk.columns, rows, _to_columns(model, values), first_id, model.id)
        record = PartRecord(
            run=self._job.run_id,
            file=placed.file,
            chunk=placed.number,
            first_row=placed.first_row,
            rows=len(chunk.texts),
            errors=len(faults),
            is_last=chunk.is_last,
            size=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            columns=[list(column) for column in placed.columns],
        )
        if faults:
            lines = [_error_line(placed, first_id, row, reason) for row, reason in faults]
            self._folder.write(f"_errors/{record.name}.jsonl", "".join(lines).encode())
        self._folder.write(f"{record.name}.parquet", content)
        write_record(self._folder, record)
        return record


def _error_line(placed: PlacedChunk, first_id: int, row: int, reason: str) -> str:
    body = {ROW_ID: first_id + row, "input": placed.input_name, "row": placed.first_row + row + 1, "reason": reason}
    return json.dumps(body) + "\n"


def _score_texts(
    loaded_model: LoadedModel, model: Model, chunk: Chunk
) -> tuple[list[int], list[list[Any]], list[tuple[int, str]]]:
    """Returns the rows with an answer, their answers, and index and reason for each text that cannot be tokenised."""
    omitted, faults = {row for row, _ in chunk.faults}, list[tuple[int, str]]()
    rows: list[int] = []
    values: list[list[Any]] = []
    for window in _windows(chunk.texts):
        indices = [index for index in window if index not in omitted]
        try:
            predictions = predict_texts(loaded_model, model.label_set, [chunk.texts[index] for index in indices])
        except CheckpointError:
            found = dict(_find_faults(loaded_model, chunk.texts, indices))
            if not found:
                raise
            faults += found.items()
            indices = [index for index in indices if index not in found]
            predictions = predict_texts(loaded_model, model.label_set, [chunk.texts[index] for index in indices])
        values += [answer_values(model.label_set, prediction) for prediction in predictions]
        rows += indices
    return rows, values, faults


def _windows(texts: Sequence[Text]) -> Iterator[range]:
    start = 0
    for group in group_texts(texts, WINDOW_TEXTS, WINDOW_CHARACTERS):
        yield range(start, start + len(group))
        start += len(group)


def _find_faults(loaded_model: LoadedModel, texts: Sequence[Text], indices: Sequence[int]) -> list[tuple[int, str]]:
    """Returns index and reason for each text on which the tokenizer fails; halves the texts to find these."""
    if not indices:
        return []
    try:
        loaded_model.encode([texts[index] for index in indices])
        return []
    except CheckpointError as error:
        if len(indices) == 1:
            return [(indices[0], error.cause.rstrip("."))]
    middle = len(indices) // 2
    return [
        *_find_faults(loaded_model, texts, indices[:middle]),
        *_find_faults(loaded_model, texts, indices[middle:]),
    ]


def _to_columns(model: Model, values: Sequence[Sequence[Any]]) -> Any:
    """Returns the answers as a table of pyarrow."""
    import pyarrow

    names = model.answer_columns
    arrays = []
    for name, column in zip(names, zip(*values, strict=True) if values else [()] * len(names), strict=True):
        if name == "score" or name.startswith("score_"):
            arrays.append(pyarrow.array(column, pyarrow.float32()))
        else:
            texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in column]
            arrays.append(pyarrow.array(texts, pyarrow.string()))
    return pyarrow.table(arrays, names=names)


def _to_parquet(columns: Any, rows: Sequence[int], answers: Any, first_id: int, model_id: str) -> bytes:
    """Returns the content of a part: the ids and the input's columns of the rows with an answer, and the answers."""
    import pyarrow
    import pyarrow.parquet

    kept = columns if len(rows) == columns.num_rows else columns.take(pyarrow.array(rows, pyarrow.int64()))
    ids = pyarrow.array([first_id + row for row in rows], pyarrow.int64())
    table = pyarrow.table(
        [ids, *kept.columns, *answers.columns],
        names=[ROW_ID, *kept.column_names, *answers.column_names],
        metadata={"toolchain": json.dumps({"model": model_id})},
    )
    sink = pyarrow.BufferOutputStream()
    try:
        pyarrow.parquet.write_table(table, sink, compression="zstd")
    except pyarrow.ArrowException as error:
        raise DataError(
            f"Parquet cannot hold a column of the input ({type(error).__name__}: {error}).", "Leave the column out."
        ) from error
    return bytes(sink.getvalue())
