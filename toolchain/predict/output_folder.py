"""The output folder of a large prediction: Parquet parts, the records of finished chunks, and a manifest.

    part-00012-000003.parquet           answers of chunk 3 of input file 12
    _errors/part-00012-000003.jsonl     rows of this chunk without an answer, with the reason; only if there are any
    _records/part-00012-000003.json     record of this chunk, written after its part
    _records/run.json                   model, inputs and settings, written first
    _toolchain.json                     manifest, written last

Readers of data folders, such as those of Arrow and Spark, ignore names that begin with ``_``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from toolchain.data import storage
from toolchain.errors import ArtifactError, DataError
from toolchain.system import files
from toolchain.system.decoding import MAX_BYTES, Check, Count, Line, decode, strict

MANIFEST, RUN = "_toolchain.json", "_records/run.json"
FORMAT = 1
OTHER_HINT = "Choose another output folder, or move the existing one away."


def _check_sha256(text: str) -> str:
    if len(text) != 64 or set(text) - set("0123456789abcdef"):
        raise ValueError("the text is not a sha256")
    return text


Sha256 = Annotated[str, Check(_check_sha256)]


@strict
@dataclass(frozen=True)
class InputRecord:
    """An input file: its name without secrets, its number of bytes, and a text that changes with its content."""

    name: Line
    size: Count
    version: Line


@strict
@dataclass(frozen=True)
class Run:
    """Everything that decides the content of an output folder.

    Attributes:
        format: Version of the folder's format.
        model: Id of the model.
        text_column: Column of the texts that the user named; None for the default.
        pair_column: Column of the second texts; None if rows are single texts.
        chunk_rows: Largest number of rows of a chunk.
        inputs: The input files in order.
    """

    format: Count
    model: Line
    text_column: Line | None
    pair_column: Line | None
    chunk_rows: Count
    inputs: list[InputRecord]

    @property
    def id(self) -> str:
        """Returns the sha256 of the run's content."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def difference(self, other: Run) -> str:
        """Returns a sentence that states the first difference to the run `other`, which wrote the folder."""
        if self.model != other.model:
            return f"They come from the model {other.model}, not {self.model}."
        if (self.text_column, self.pair_column) != (other.text_column, other.pair_column):
            return "They come from other columns of texts."
        if [entry.name for entry in self.inputs] != [entry.name for entry in other.inputs]:
            return f"They come from other input files: {len(other.inputs)}, not {len(self.inputs)}, or other names."
        changed = [new.name for new, old in zip(self.inputs, other.inputs, strict=True) if new != old]
        return f"{changed[0]} has changed since then." if changed else "Another release wrote them."


@strict
@dataclass(frozen=True)
class PartRecord:
    """The record of a finished part.

    Attributes:
        run: `Run.id` of the run.
        file: Index of the input file.
        chunk: Index of the chunk in the input file.
        first_row: Number of rows of the input file before the chunk.
        rows: Number of rows of the chunk.
        errors: Number of rows of the chunk without an answer.
        is_last: Whether the chunk is the last one of its input file.
        size: Number of bytes of the part.
        sha256: Digest of the part.
        columns: Name and type of each column of the input.
    """

    run: Sha256
    file: Count
    chunk: Count
    first_row: Count
    rows: Count
    errors: Count
    is_last: bool
    size: Count
    sha256: Sha256
    columns: list[list[str]]

    @property
    def name(self) -> str:
        """Returns the name of the part without its ending."""
        return part_name(self.file, self.chunk)


def part_name(file: int, chunk: int) -> str:
    """Returns the name, without ending, of the chunk `chunk` of the input file `file`."""
    return f"part-{file:05}-{chunk:06}"


class OutputFolder:
    """A local folder, or a folder behind a URL.

    A local file gets its name when it is complete. Storage behind URLs, such as S3, shows a file when it is complete.

    Args:
        location: Path or URL of the folder.
    """

    def __init__(self, location: str) -> None:
        self.name = storage.public_name(location)
        self.local = None if storage.is_url(location) else Path(os.path.abspath(storage.local_name(location)))
        self._system: Any = None
        self._root = ""
        if self.local is None:
            self._system, root = storage.open_file_system(location)
            self._root = root.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """Returns the number of bytes of each file, by relative name; ignores names that begin with a dot."""
        if self.local:
            found = {
                Path(place, name).relative_to(self.local).as_posix(): os.path.getsize(os.path.join(place, name))
                for place, _, names in os.walk(self.local)
                for name in names
            }
        else:
            with storage.convert_storage_errors(self.name):
                self._system.invalidate_cache()
                exists = self._system.exists(self._root)
                listing = self._system.find(self._root, detail=True) if exists else {}
                start = len(self._root) + 1
                found = {name[start:]: int(facts["size"] or 0) for name, facts in listing.items()}
        return {name: size for name, size in found.items() if not Path(name).name.startswith(".")}

    def read(self, name: str) -> bytes:
        """Returns the content of a file with at most `MAX_BYTES` bytes.

        Raises:
            ValueError: The file is larger.
            ArtifactError, DataError: The file cannot be read.
        """
        if self.local:
            try:
                with (self.local / name).open("rb") as file:
                    content = file.read(MAX_BYTES + 1)
            except OSError as error:
                raise ArtifactError(
                    f"{self.local / name} cannot be read: {error.strerror}.", "Correct the permissions."
                ) from error
        else:
            with (
                storage.convert_storage_errors(f"{self.name.rstrip('/')}/{name}"),
                self._system.open(f"{self._root}/{name}", "rb") as file,
            ):
                content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"the file has more than {MAX_BYTES >> 20} MiB")
        return bytes(content)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file whole; replaces an existing file.

        Raises:
            ArtifactError, DataError: The file cannot be written.
        """
        if self.local:
            try:
                files.write_whole(self.local / name, content)
            except OSError as error:
                raise ArtifactError(
                    f"{self.local} cannot be written: {error.strerror or error}.",
                    "Free disk space or correct the permissions, then run the same command again to continue the run.",
                ) from error
        else:
            with storage.convert_storage_errors(f"{self.name.rstrip('/')}/{name}", "written"):
                self._system.pipe_file(f"{self._root}/{name}", content)


def write_record(folder: OutputFolder, record: PartRecord) -> None:
    """Writes the record of a chunk, after its part."""
    folder.write(f"_records/{record.name}.json", _to_json(asdict(record)))


def _to_json(body: Mapping[str, Any]) -> bytes:
    return (json.dumps(body, indent=1) + "\n").encode()


def claim(folder: OutputFolder, run: Run) -> list[list[PartRecord]]:
    """Requires that the folder is empty or belongs to the same run; writes the record of the run into an empty folder.

    Returns:
        For each input file, the records of its first chunks, up to the first chunk that is not finished.

    Raises:
        ArtifactError: The folder has other files, or the parts of another run.
    """
    sizes = folder.sizes()
    if not sizes:
        folder.write(RUN, _to_json(asdict(run)))
        return [[] for _ in run.inputs]
    if RUN not in sizes:
        raise ArtifactError(f"{folder.name} holds files that `predict` did not write.", OTHER_HINT)
    try:
        other = decode(Run, folder.read(RUN))
    except ValueError as error:
        raise ArtifactError(f"{folder.name}/{RUN} is damaged: {error}.", OTHER_HINT) from error
    if other != run:
        raise ArtifactError(f"{folder.name} holds the answers of another run. {run.difference(other)}", OTHER_HINT)
    return [_finished_parts(folder, run, sizes, file) for file in range(len(run.inputs))]


def _finished_parts(folder: OutputFolder, run: Run, sizes: Mapping[str, int], file: int) -> list[PartRecord]:
    records: list[PartRecord] = []
    while not (records and records[-1].is_last):
        name = part_name(file, len(records))
        if f"_records/{name}.json" not in sizes:
            break
        try:
            record = decode(PartRecord, folder.read(f"_records/{name}.json"))
        except ValueError:  # the record is damaged, so the chunk is scored again
            break
        position = (run.id, file, len(records), sum(each.rows for each in records))
        is_whole = sizes.get(f"{name}.parquet") == record.size
        if (record.run, record.file, record.chunk, record.first_row) != position or not is_whole:
            break
        records.append(record)
    return records


def write_manifest(folder: OutputFolder, run: Run, records: Sequence[PartRecord]) -> str:
    """Writes the manifest, and returns the digest: the sha256 of the lines that `sha256sum` prints for all parts.

    Args:
        folder: The output folder.
        run: The run.
        records: The records of all chunks, in the order of the input.
    """
    lines = "".join(f"{record.sha256}  {record.name}.parquet\n" for record in records)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    errors = sum(record.errors for record in records)
    rows = sum(record.rows for record in records) - errors
    body = {**asdict(run), "rows": rows, "errors": errors, "parts": len(records), "digest": digest}
    folder.write(MANIFEST, _to_json(body))
    return digest


def require_apart(folder: OutputFolder, inputs: Sequence[str]) -> None:
    """Raises `DataError` if the output folder is an input or lies in an input folder: its parts would become inputs."""
    for location in inputs:
        if folder.local and not storage.is_url(location):
            source = Path(os.path.realpath(storage.local_name(location)))
            is_inside = Path(os.path.realpath(folder.local)).is_relative_to(source)
        else:
            is_inside = f"{folder.name.rstrip('/')}/".startswith(f"{storage.public_name(location).rstrip('/')}/")
        if is_inside:
            raise DataError(
                f"The output folder {folder.name} lies in the input {storage.public_name(location)}.",
                "Choose an output folder outside of the inputs.",
            )
