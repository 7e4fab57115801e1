"""The journal of a benchmark run: it stores each result when it is known, so that an interrupted run can resume."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.errors import ResultFileError
from toolchain.system import files

SUFFIX = ".journal"


class Journal:
    """A file of JSON lines; the first line is the head.

    Attributes:
        path: Path of the file.
        records: Records of the interrupted run; empty for a new run.
    """

    def __init__(self, path: Path, records: list[dict[str, Any]]) -> None:
        self.path, self.records = path, records

    @classmethod
    def begin(cls, path: Path, head: Mapping[str, Any]) -> Journal:
        """Creates the journal of a new run.

        Args:
            path: Path of the file. If it exists, the new file's name gets a number.
            head: The settings that identify the run.

        Raises:
            ResultFileError: The file cannot be written.
        """
        try:
            return cls(files.write_to_free(path, _line(head)), [])
        except OSError as error:
            raise ResultFileError.unwritable(path, error) from error

    @classmethod
    def take_up(cls, path: Path, head: Mapping[str, Any]) -> Journal:
        """Opens the journal of an interrupted run to resume it, and removes an incomplete last line.

        Args:
            path: Path of the file.
            head: The settings that identify the run.

        Raises:
            ResultFileError: The run has another head, or the file is not a valid journal.
        """
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # a killed run may leave an incomplete last line
        try:
            found, *records = [json.loads(line) for line in whole.splitlines()]
            differs = [key for key in head if found.get(key) != json.loads(json.dumps(head[key]))]
            cells = range(len(head["cells"]))
            known = all(record["cell"] in cells and isinstance(record["kind"], str) for record in records)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ResultFileError(f"{path} is no interrupted run: {error}.", "Delete it and measure anew.") from error
        if differs:
            raise ResultFileError(
                f"The interrupted run {path} was of another {' and '.join(differs)}.",
                "Give the options it was begun with, or leave --resume out.",
            )
        if not known:
            raise ResultFileError(f"{path} is no interrupted run: it has a record of no cell.", "Delete it.")
        os.truncate(path, len(whole))
        return cls(path, records)

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
        """Deletes the journal; call it after the result file is written."""
        self.path.unlink(missing_ok=True)


def newest(folder: Path, model: str) -> Path:
    """Returns the path of the model's newest journal in `folder`.

    Raises:
        ResultFileError: There is none.
    """
    # A file name has only a time after the model's name, and a number if two runs began in the same second.
    found = [path for path in folder.glob(f"*{SUFFIX}") if path.stem.rsplit("-", 1)[0] == model]
    if not found:
        raise ResultFileError(f"There is no interrupted run of {model} in {folder}.", "Leave --resume out.")
    return max(found, key=lambda path: path.stem)


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n"
