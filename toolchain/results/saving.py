"""Saves the results of a benchmark under the name that the user chooses, or in local files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import ResultFileError
from toolchain.progress import Say
from toolchain.results.folder import ResultsFolder, require_free, save_named
from toolchain.results.result_file import ResultFile


@dataclass
class Saver:
    """Saves results in a file that the user names and can commit, or in a local file of the model.

    If several machines measure, each machine has its own file, whose name also contains the machine's id.

    Attributes:
        folder: The folder of result files.
        model: Name of the model.
        name: Name of the result; None for a local file.
        force: Whether to replace an existing file.
        say: Called with each event.
        error: Error of a named file that could not be written; None if there is none.
    """

    folder: ResultsFolder
    model: str
    name: str | None
    force: bool
    say: Say
    error: ResultFileError | None = None

    def require_free(self, machine_ids: Iterable[str | None]) -> None:
        """Raises `ResultFileError` before the measurement if the result file exists and must not be replaced."""
        if self.name and not self.force:
            for machine_id in machine_ids:
                require_free(self.folder.named_path(self.name, machine_id))

    def save(self, result: ResultFile, machine_id: str | None) -> Path:
        """Writes the result and returns its path; writes a local file if the file that the user names is unwritable."""
        # A result without any measurement is not worth a commit, so it becomes a local file.
        if self.name and any(row.status == "ok" for row in result.rows):
            path = self.folder.named_path(self.name, machine_id)
            try:
                save_named(result, path, force=self.force)
            except ResultFileError as error:
                path = self.folder.save_local(result, self.model, machine_id)
                self.error = ResultFileError(f"{error.cause} The result of this run is in {path}.", "Rename the file.")
                self.say(error.cause)
        else:
            path = self.folder.save_local(result, self.model, machine_id)
        return path
