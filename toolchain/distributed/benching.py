"""A benchmark on the machines of a cluster: each measures its share as one run of its own; a result file a machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toolchain.bench import run
from toolchain.bench.cells import Cell, unmeasured
from toolchain.build.workspace import Workspace
from toolchain.data.inputs import Data
from toolchain.distributed import Cluster, Node
from toolchain.errors import BenchError
from toolchain.models import checkpoints
from toolchain.progress import Say
from toolchain.results.measurements import ResultFile

NO_CUDA = ("No node of the cluster has an NVIDIA GPU.", "Add one that has; `ray status` counts what Ray knows of.")


@dataclass(frozen=True)
class Plan:
    """What is to be measured: which cells, on which sentences, how; with so many `threads`, or each node's own."""

    workspace: Workspace
    request: run.Request
    cells: Sequence[Cell]
    data: Data
    threads: int | None

    def message(self) -> dict[str, Any]:
        """As `remote.Order` takes it, with the folders and names of all files that are needed."""
        found: dict[str, list[str]] = {}
        for name in [checkpoints.ROOT_VARIANT, *(cell.variant for cell in self.cells if cell.artifact)]:
            for variant in self.workspace.lineage(name):
                artifact = self.workspace.load(variant.name)
                assert artifact is not None
                found[variant.name] = list(artifact.files)
        return {
            "folder": str(self.workspace.exported / self.workspace.model),
            "files": [f"{variant}/{file}" for variant, files in found.items() for file in files],
            "model": self.workspace.model,
            "source": asdict(self.workspace.source),
            "data": {**vars(self.data), "label_set": asdict(self.data.label_set)},
            "protocol": asdict(self.request.protocol),
            "threads": self.threads,
        }


def measure(
    cluster: Cluster, workspace: Workspace, request: run.Request, threads: int | None, say: Say
) -> Iterator[ResultFile]:
    """Builds what is missing here and measures it there; the result of each machine when it has one, by rows that say
    why where it failed. Raises as `run.measure`."""
    nodes = distinct(cluster.nodes, say)
    data, cells = run.prepared(workspace, request, None if any(node.gpus for node in nodes) else NO_CUDA, say)
    plan = Plan(workspace, request, cells, data, threads)
    yield from on(cluster, plan, shares(nodes, cells), say)


def distinct(nodes: Sequence[Node], say: Say) -> list[Node]:
    """One node of each kind of machine: what is equal would give the same rows again."""
    found: dict[str, Node] = {}
    for node in nodes:
        first = found.setdefault(node.machine["id"], node)
        if first is not node:
            say(f"{node.host} ({node.id[:8]}): the same hardware as {first.host} ({first.id[:8]}), left out")
    return list(found.values())


def shares(nodes: Sequence[Node], cells: Sequence[Cell]) -> list[tuple[Node, list[Cell]]]:
    """What each node measures: cells on CUDA where it has a GPU, or to say so where none has; those on the CPU
    everywhere, so that every machine has its own ratios."""
    with_gpu = any(node.gpus for node in nodes)
    found = [(node, [c for c in cells if c.provider == "cpu" or node.gpus or not with_gpu]) for node in nodes]
    return [(node, share) for node, share in found if share]


def on(cluster: Cluster, plan: Plan, planned: Sequence[tuple[Node, Sequence[Cell]]], say: Say) -> Iterator[ResultFile]:
    """Measures each node's cells there, all nodes at once."""
    by_id = {node.id: (node, cells) for node, cells in planned}
    for node, cells in planned:
        say(f"{node.host}: measuring {len(cells)} cells as soon as its {node.cpus} CPUs are free")
    asked = [[node.id, [_told(cell) for cell in cells]] for node, cells in planned]
    cluster.ask("bench", order=plan.message(), shares=asked)
    with tempfile.TemporaryDirectory() as scratch:
        for _ in planned:
            told = cluster.ask("measured", folder=scratch)
            node, cells = by_id[told["node"]]
            if "cause" in told:
                say(f"{node.host}: failed")
                yield _failed(plan, node, cells, BenchError(f"On the node {node.host}: {told['cause']}", told["mend"]))
            else:
                say(f"{node.host}: measured")
                yield ResultFile.read(Path(told["file"]))


def _told(cell: Cell) -> dict[str, Any]:
    """The cell without what lies on this machine."""
    there = {name: value for name, value in vars(cell).items() if name not in ("artifact", "encoder")}
    return {**there, "artifact": cell.artifact is not None}


def _failed(plan: Plan, node: Node, cells: Sequence[Cell], error: BenchError) -> ResultFile:
    """A run of which nothing came."""
    rows = [unmeasured(cell, error if cell.artifact else None) for cell in cells]
    root = plan.workspace.load(checkpoints.ROOT_VARIANT)
    assert root is not None
    how = asdict(plan.request.protocol)
    return replace(run.result_of(rows, how, plan.data, root.manifest.max_length), machine=node.machine)
