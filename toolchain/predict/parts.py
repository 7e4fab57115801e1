"""Predicts the texts of many input files into a folder of Parquet parts; a killed run continues.

Each input file is read in chunks. A chunk becomes one part, with the input's columns, the id of each row, and the
answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

from toolchain.artifacts import publishing
from toolchain.data.chunks import open_reader
from toolchain.data.sources import InputFile, find_input_files
from toolchain.errors import DataError
from toolchain.predict import Model, load_model
from toolchain.predict.chunk_scoring import ChunkScorer, Job, Rest, read_rest
from toolchain.predict.output_folder import (
    FORMAT,
    InputRecord,
    OutputFolder,
    PartRecord,
    Run,
    claim,
    require_apart,
    write_manifest,
)
from toolchain.progress import Bar, Say
from toolchain.system import hardware

CHUNK_ROWS = 1 << 16  # largest number of rows of a chunk


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


# A `PartsEngine` scores and writes the rest of each input file, and yields the record of each chunk, in any order.
PartsEngine = Callable[[Model, Job, Sequence[Rest]], Iterator[PartRecord]]


def score_parts_locally(model: Model, job: Job, rests: Sequence[Rest]) -> Iterator[PartRecord]:
    """Scores input files on this machine; the default `PartsEngine`."""
    columns, errors = job.columns, 0
    with open_reader() as reader, closing(load_model(model, hardware.cores())) as loaded_model:
        scorer = ChunkScorer(model, loaded_model, job)
        for rest in rests:
            for chunk in read_rest(reader, rest, job, columns, errors):
                record = scorer.score(chunk, job.most_errors - errors)
                columns = chunk.columns
                errors += record.errors
                yield record


def predict_parts(
    model: Model, request: Request, say: Say, bar: Bar, engine: PartsEngine = score_parts_locally
) -> Summary:
    """Scores all rows of the inputs that no earlier run has scored, and writes the manifest.

    Args:
        model: The model.
        request: Inputs, output and settings.
        say: Called with each event.
        bar: Shows the progress.
        engine: Function that scores and writes the chunks.

    Raises:
        DataError: An input cannot be read, or more than `request.max_errors` rows have no answer. Finished parts stay.
        ArtifactError: The output folder has other files or cannot be written.
    """
    folder = OutputFolder(request.output)
    require_apart(folder, request.inputs)
    files = find_input_files(request.inputs)
    inputs = [InputRecord(file.name, file.size, file.version) for file in files]
    run = Run(FORMAT, model.id, request.column, request.pair, CHUNK_ROWS, inputs)
    with _lock(folder, say), bar("predict") as progress:
        finished = claim(folder, run)
        records = [record for file_records in finished for record in file_records]
        if done := sum(record.rows for record in records):
            say(f"{folder.name}: {done} rows are already scored")
        errors = sum(record.errors for record in records)
        _require_few(errors, request.max_errors)
        job = Job(
            run_id=run.id,
            output=str(folder.local or request.output),
            answer_columns=model.answer_columns,
            column=request.column,
            pair=request.pair,
            chunk_rows=CHUNK_ROWS,
            most_errors=request.max_errors - errors,
            first_name=files[0].name,
            columns=records[0].columns if records else None,
        )
        rests = _rests(files, finished)
        count = len(files) - len(rests)
        for record in engine(model, job, rests) if rests else ():
            records.append(record)
            count += record.is_last
            progress(count, len(files), "scoring")
        records.sort(key=lambda record: (record.file, record.chunk))
        errors = sum(record.errors for record in records)
        _require_few(errors, request.max_errors)
        digest = write_manifest(folder, run, records)
    return Summary(sum(record.rows for record in records) - errors, errors, digest)


def _lock(folder: OutputFolder, say: Say) -> AbstractContextManager[None]:
    """Locks a local folder. Two runs into one folder behind a URL write equal parts, so they need no lock."""
    if folder.local is None:
        return nullcontext()
    return publishing.lock(folder.local, lambda: say(f"{folder.name}: waiting, because another run is writing there"))


def _rests(files: Sequence[InputFile], finished: Sequence[Sequence[PartRecord]]) -> list[Rest]:
    """Returns the input files that earlier runs have not scored completely."""
    return [
        Rest(file, index, [record.rows for record in records])
        for index, (file, records) in enumerate(zip(files, finished, strict=True))
        if not (records and records[-1].is_last)
    ]


def _require_few(errors: int, most: int) -> None:
    if errors > most:
        raise DataError(
            f"{errors} rows have no answer, but --max-errors allows {most}. The folder _errors lists them.",
            f"Pass --max-errors {errors} to accept them.",
        )
