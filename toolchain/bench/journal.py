"""The journal of a benchmark run stores each result immediately, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from toolchain.bench.journal_records import decode_record
from toolchain.errors import ResultFileError
from toolchain.system import files
from toolchain.system.decoding import decode_object, read_bytes

SUFFIX = ".journal"


class Journal:
    """A file of JSON lines: first the head (the settings that identify the run), then one record for each result.

    Attributes:
        path: Path of the journal.
        records: Records that an interrupted run has written; empty for a new run.
    """

    def __init__(self, path: Path, records: list[dict[str, Any]]) -> None:
        self.path, self.records = path, records

    @classmethod
    def begin(cls, path: Path, head: Mapping[str, Any]) -> Journal:
        """Creates the journal of a new run.

        Args:
            path: Path of the journal. If a file already has this path, the method adds a number to the journal's name.
            head: The settings that identify the run.

        Raises:
            ResultFileError: The file cannot be written.
        """
        try:
            return cls(files.write_to_free(path, _line(head)), [])
        except OSError as error:
            raise ResultFileError.unwritable(path, error) from error

    @classmethod
    def resume(cls, path: Path, head: Mapping[str, Any]) -> Journal:
        """Opens the journal of an interrupted run to resume it, and removes an incomplete last line.

        Args:
            path: Path of the journal.
            head: The settings that identify the run.

        Raises:
            ResultFileError: The journal's head differs from `head`, or the file is not a valid journal.
        """
        try:
            content = read_bytes(path)
            complete = content[: content.rfind(b"\n") + 1]  # a killed run may leave an incomplete last line
            first, *lines = complete.split(b"\n")[:-1] or [b""]
            old_head = decode_object(first)
            records = [decode_record(line) for line in lines]
        except (ValueError, OSError) as error:
            raise invalid_journal(path, str(error)) from error
        changed = [key for key in head if old_head.get(key) != json.loads(json.dumps(head[key]))]
        if changed:
            raise ResultFileError(
                f"The interrupted run {path} had another value of {' and '.join(changed)}.",
                "Use the options of the interrupted run, or omit --resume.",
            )
        if any(record.cell >= len(head["cells"]) for record in records):
            raise invalid_journal(path, "a record has an unknown cell")
        os.truncate(path, len(complete))
        return cls(path, [asdict(record) for record in records])

    def append(self, record: Mapping[str, Any]) -> None:
        """Appends one record.

        Raises:
            ResultFileError: The file cannot be written.
        """
        try:
            with self.path.open("a") as file:
                file.write(_line(record))
        except OSError as error:
            raise ResultFileError.unwritable(self.path, error) from error

    def end(self) -> None:
        """Deletes the journal. Call `end` only after the result file is written."""
        self.path.unlink(missing_ok=True)


def invalid_journal(path: Path, fault: str) -> ResultFileError:
    """Returns the error for a journal with a `fault`."""
    return ResultFileError(f"{path} is not a valid journal: {fault}.", "Delete this file, and omit --resume.")


def find_newest(folder: Path, model: str) -> Path:
    """Returns the path of the model's newest journal in `folder`.

    Raises:
        ResultFileError: The folder has no journal of the model.
    """
    # The file name of a journal is `<model>-<start time>`, followed by a number if two runs start in one second.
    paths = [path for path in folder.glob(f"*{SUFFIX}") if path.stem.rsplit("-", 1)[0] == model]
    if not paths:
        raise ResultFileError(f"There is no interrupted run of {model} in {folder}.", "Omit --resume.")
    return max(paths, key=lambda path: path.stem)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
