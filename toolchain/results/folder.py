"""The folder of result files: named files to commit, and a subfolder for local files of single runs."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import BenchError, ResultFileError
from toolchain.progress import Say
from toolchain.results.measurements import Measurement
from toolchain.results.providers import CUDA_GRAPHS, TENSORRT
from toolchain.results.result_file import ResultFile
from toolchain.system import files


@dataclass(frozen=True)
class ResultsFolder:
    """A folder of result files.

    Attributes:
        path: Path of the folder; it need not exist.
    """

    path: Path = Path("benchmarks/results")

    @property
    def local(self) -> Path:
        """Returns the subfolder for result files and journals of single benchmark runs; neither is committed."""
        return self.path / "local"

    def named_path(self, name: str, machine_id: str | None = None) -> Path:
        """Returns the path of a named result file.

        Args:
            name: Name of the result.
            machine_id: Id of the machine if several machines each write a result with this name; None otherwise.
        """
        return self.path / (f"{name}-{machine_id}.json" if machine_id else f"{name}.json")

    def save_local(self, result: ResultFile, model: str, machine_id: str | None = None) -> Path:
        """Writes the result to a new file in `local` and returns its path.

        Raises:
            ResultFileError: The file cannot be written.
        """
        suffix = f"-{machine_id}" if machine_id else ""
        path = self.local / f"{model}-{_stamp(result.created)}{suffix}.json"
        try:
            return files.write_to_free(path, result.to_json())
        except OSError as error:
            raise ResultFileError.unwritable(path, error) from error

    def session_path(self, model: str, variant: str, created: str) -> Path:
        """Returns the path of a new session file; its folder holds no result files.

        Args:
            model: Name of the model.
            variant: Name of the variant.
            created: Date and time of the file, in UTC and ISO 8601 format.
        """
        return self.local / "sessions" / f"{model}-{variant}-{_stamp(created)}.json"

    def read_newest(self, model: str, say: Say) -> ResultFile:
        """Returns the newest run that measured the model.

        Raises:
            BenchError: No run measured the model.
        """
        runs = [run for _, run in self._read_all(say) if any(row.model == model for row in run.rows)]
        if not runs:
            raise BenchError(
                f"There is no result of {model} in {self.path}.", f"Measure {model} with `toolchain bench`."
            )
        return max(runs, key=lambda run: run.created)

    def measurements_of(self, ids: Collection[str], say: Say) -> dict[str, tuple[ResultFile, Measurement]]:
        """Returns, for each measured artifact in `ids`, the newest run that measured it and the artifact's row.

        Rows on ``cuda-graphs`` and ``tensorrt`` do not count, because a bundle runs on neither.
        """
        newest: dict[str, tuple[ResultFile, Measurement]] = {}
        for run in sorted((run for _, run in self._read_all(say)), key=lambda run: run.created):
            for row in run.rows:
                if row.status == "ok" and row.artifact_id in ids and row.provider not in (CUDA_GRAPHS, TENSORRT):
                    newest[str(row.artifact_id)] = run, row
        return newest

    def runs_with(self, artifact_id: str, say: Say) -> list[tuple[Path, ResultFile]]:
        """Returns the runs that measured the artifact, with the paths of their result files, newest first."""
        runs = [
            (path, run)
            for path, run in self._read_all(say)
            if any(row.status == "ok" and row.artifact_id == artifact_id for row in run.rows)
        ]
        return sorted(runs, key=lambda item: item[1].created, reverse=True)

    def _read_all(self, say: Say) -> Iterator[tuple[Path, ResultFile]]:
        for path in [*sorted(self.path.glob("*.json")), *sorted(self.local.glob("*.json"))]:
            try:
                yield path, ResultFile.read(path)
            except ResultFileError as error:
                say(f"ignored: {error}")  # an unreadable file is no error, because it may belong to another model


DEFAULT_FOLDER = ResultsFolder()


def _stamp(created: str) -> str:
    """Returns a date and time in UTC and ISO 8601 format as a part of a file name."""
    return created.replace(":", "").replace("-", "").removesuffix("+0000") + "Z"


def require_free(path: Path) -> None:
    """Requires that the path does not exist.

    Raises:
        ResultFileError: The path exists.
    """
    if os.path.lexists(path):
        raise _name_taken(path)


def _name_taken(path: Path) -> ResultFileError:
    return ResultFileError(f"{path} exists.", "Choose another name with --save-as, or replace the file with --force.")


def save_named(result: ResultFile, path: Path, *, force: bool) -> None:
    """Writes the result to a path from `ResultsFolder.named_path`.

    Raises:
        ResultFileError: The path exists and `force` is false, or the file cannot be written.
    """
    try:
        result.write(path, replace=force)
    except FileExistsError as error:
        raise _name_taken(path) from error


def read_old_run(path: Path, new_runs: Sequence[ResultFile]) -> ResultFile:
    """Reads the old run of a regression check.

    Args:
        path: Result file of the old run.
        new_runs: The new runs.

    Raises:
        BenchError: The old run is one of the new runs, so the regression check could never fail.
    """
    old = ResultFile.read(path)
    if any(run.run.get("id") == old.run.get("id") and run.created == old.created for run in new_runs):
        raise BenchError(
            f"{path} is the new run itself, so there is no older run to compare with.",
            "Name the newer result file first, as in `toolchain compare NEW --against OLD`.",
        )
    return old


def require_measured(*results: ResultFile) -> None:
    """Requires that the runs measured at least one cell, and that no planned cell failed.

    Raises:
        BenchError: A planned cell failed, or no cell was measured.
    """
    rows = [row for result in results for row in result.rows]
    failed = [row for row in rows if row.status == "failed"]
    if failed:
        reasons = "; ".join(f"{row.cell}: {row.reason}" for row in failed)
        raise BenchError(f"{len(failed)} of {len(rows)} cells failed: {reasons}", failed[0].mend)
    if not any(row.status == "ok" for row in rows):
        raise BenchError(f"No cell was measured: {rows[0].reason}", rows[0].mend)
