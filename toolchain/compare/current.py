"""Rows of runs beside the artifacts that a folder has now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from toolchain.artifacts.store import current_ids
from toolchain.compare.rows import Row, compare
from toolchain.results.result_file import ResultFile


def compare_current(runs: Sequence[ResultFile], baseline: str | None, exported: Path) -> list[Row]:
    """Returns the rows of `compare`; a row is stale if the artifact in the folder `exported` has changed."""
    names = {(row.model, row.variant) for run in runs for row in run.rows}
    return compare(runs, baseline, current_ids(exported, names))
