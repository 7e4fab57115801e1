"""What an artifact may be compared with: related variants, and the result files that measured it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from toolchain.artifacts.names import VariantName, label_prefixes
from toolchain.artifacts.store import Artifact
from toolchain.artifacts.variants import is_variant
from toolchain.build.workspace import Workspace
from toolchain.errors import ArtifactError
from toolchain.explain.origin import BUILT, MISSING
from toolchain.models.checkpoints import ROOT_VARIANT
from toolchain.progress import Say
from toolchain.results.folder import ResultsFolder
from toolchain.results.result_file import ResultFile

UNUSABLE = "unusable"


@dataclass(frozen=True)
class Relative:
    """A related variant.

    Attributes:
        variant: Name of the variant.
        relations: How it is related, such as ``parent``.
        state: ``built``, ``missing``, or ``unusable`` if its manifest cannot be read.
        id: Id of its artifact; None if it is missing or unusable.
        size_bytes: Size of its files; None if it is missing or unusable.
    """

    variant: str
    relations: tuple[str, ...]
    state: str
    id: str | None = None
    size_bytes: int | None = None


@dataclass(frozen=True)
class MeasuredCell:
    """The figures of a cell in a result file.

    Attributes:
        cell: Name of the cell.
        score: Name of the score: ``accuracy``, ``regression`` or ``entities``.
        value: The score: accuracy, R² or F1.
        p50_ms: Median latency at batch 1, in milliseconds.
        sentences_per_s: Sentences per second in batches.
    """

    cell: str
    score: str
    value: float
    p50_ms: float
    sentences_per_s: float


@dataclass(frozen=True)
class MeasuredRun:
    """A result file that measured the artifact, with the cells of the artifact and of its relatives.

    Attributes:
        file: Path of the file.
        created: UTC time of the run, in ISO 8601.
        machine: Processor of the run.
        data: Name of the data.
        cells: Cells of the artifact first, then those of its relatives.
    """

    file: str
    created: str
    machine: str
    data: str
    cells: tuple[MeasuredCell, ...]


def find_relatives(workspace: Workspace, artifact: Artifact) -> list[Relative]:
    """Returns the parent of an artifact, and the variants that differ from it by one kind of compression."""
    relations: dict[VariantName, list[str]] = {}
    for relation, name in _relations(workspace, artifact):
        relations.setdefault(name, []).append(relation)
    relatives = []
    for name, names in relations.items():
        state, artifact_of_name = _load(workspace, name)
        known = (artifact_of_name.id, artifact_of_name.size_bytes) if artifact_of_name else (None, None)
        relatives.append(Relative(name, tuple(names), state, *known))
    return relatives


def _relations(workspace: Workspace, artifact: Artifact) -> Iterator[tuple[str, VariantName]]:
    """Yields each relation and the name of the related variant; a name may occur twice."""
    own_name, parent = artifact.manifest.variant, artifact.manifest.parent
    parts = own_name.parts
    if parent:
        yield "parent", parent
    changes: dict[str, dict[str, Any]] = {
        "without exits": {"exits": False} if parts.exits else {},
        "unquantised": {"scheme": "fp32", "portable": False, "static": False} if parts.scheme != "fp32" else {},
        "unpruned": {"pruned": 0, "recovered": 0, "method": "fisher"} if parts.pruned else {},
    }
    for relation, change in changes.items():
        names = [own_name.with_parts(label=label, **change) for label in label_prefixes(parts.label)] if change else []
        names = [name for name in names if is_variant(name)]
        if names:
            yield relation, next((name for name in names if _load(workspace, name)[1]), names[-1])
    if own_name != ROOT_VARIANT:
        yield "imported model", VariantName(ROOT_VARIANT)


def _load(workspace: Workspace, name: str) -> tuple[str, Artifact | None]:
    """Returns the state of a variant, and its artifact if it is built."""
    try:
        artifact = workspace.load(name)
    except ArtifactError:
        return UNUSABLE, None  # the explanation of the artifact itself does not need this relative
    return (BUILT, artifact) if artifact else (MISSING, None)


def find_runs(results: ResultsFolder, artifact: Artifact, relatives: list[Relative], say: Say) -> list[MeasuredRun]:
    """Returns the runs in a folder of result files that measured the artifact, newest first.

    Args:
        results: Folder of the result files.
        artifact: The artifact.
        relatives: Relatives, whose cells the runs contain if these measured the same artifacts.
        say: Called with the reason if a result file is unreadable.
    """
    ids = [artifact.manifest.id, *(relative.id for relative in relatives if relative.id)]
    return [
        MeasuredRun(str(path), run.created, run.machine["cpu"], run.data["name"], tuple(_cells(run, ids)))
        for path, run in results.runs_with(artifact.manifest.id, say)
    ]


def _cells(run: ResultFile, ids: list[str]) -> Iterator[MeasuredCell]:
    """Yields the measured cells of a run whose artifacts are in `ids`, in the order of `ids`."""
    for artifact_id in ids:
        for row in run.rows:
            if row.status == "ok" and row.artifact_id == artifact_id and row.score and row.throughput_per_s:
                yield MeasuredCell(
                    row.cell, row.score.key, row.score.value, row.latency_ms["p50"], row.throughput_per_s
                )
