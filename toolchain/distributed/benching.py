"""A benchmark on the machines of a cluster: each machine measures its cells as one run with its own result file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from toolchain.bench import run
from toolchain.bench.cells import Cell, make_row_without_figures
from toolchain.build.workspace import Workspace
from toolchain.data.inputs import Data
from toolchain.distributed import Cluster, Node
from toolchain.errors import BenchError
from toolchain.models import checkpoints
from toolchain.progress import Say
from toolchain.results.result_file import ResultFile
from toolchain.system.files import temporary_folder

NO_CUDA = (
    "No node of the cluster has an NVIDIA GPU.",
    "Add a node with a GPU; `ray status` shows the GPUs of the cluster.",
)


@dataclass(frozen=True)
class Plan:
    """The plan of a benchmark on a cluster.

    Attributes:
        workspace: Folder of the artifacts.
        request: The benchmark request, which contains the settings of the benchmark.
        cells: All cells of the benchmark.
        data: Sentences to measure on.
        threads: Number of threads; None for all cores of each node.
    """

    workspace: Workspace
    request: run.Request
    cells: Sequence[Cell]
    data: Data
    threads: int | None

    def message(self) -> dict[str, Any]:
        """Returns the plan as JSON data for `Driver.bench`, with the paths of all files that the nodes need."""
        files_by_variant: dict[str, list[str]] = {}
        for name in [checkpoints.ROOT_VARIANT, *(cell.variant for cell in self.cells if cell.artifact)]:
            for variant in self.workspace.lineage(name):
                artifact = self.workspace.load(variant.name)
                assert artifact is not None
                files_by_variant[variant.name] = list(artifact.files)
        return {
            "folder": str(self.workspace.exported / self.workspace.model),
            "files": [f"{variant}/{file}" for variant, files in files_by_variant.items() for file in files],
            "model": self.workspace.model,
            "source": asdict(self.workspace.source),
            "data": {**vars(self.data), "label_set": asdict(self.data.label_set)},
            "protocol": asdict(self.request.protocol),
            "threads": self.threads,
        }


def measure(
    cluster: Cluster, workspace: Workspace, request: run.Request, threads: int | None, say: Say
) -> Iterator[ResultFile]:
    """Builds missing variants on this machine, measures the cells on the cluster, and yields each node's result file.

    Result files arrive in the order in which the nodes finish. If a node fails, each row of its result file states the
    reason for the failure.

    Args:
        threads: Number of threads; None for all cores of each node.

    Raises:
        DataError: The data is unreadable.
        ToolchainError: The checkpoint cannot be imported.
    """
    nodes = distinct_nodes(cluster.nodes, say)
    data, cells = run.prepare_cells(workspace, request, None if any(node.gpus for node in nodes) else NO_CUDA, say)
    plan = Plan(workspace, request, cells, data, threads)
    yield from run_plan(cluster, plan, assign_cells(nodes, cells), say)


def distinct_nodes(nodes: Sequence[Node], say: Say) -> list[Node]:
    """Returns one node of each kind of hardware, because nodes with equal hardware give equal benchmark rows."""
    nodes_by_machine: dict[str, Node] = {}
    for node in nodes:
        first = nodes_by_machine.setdefault(node.machine["id"], node)
        if first is not node:
            say(f"{node.host} ({node.id[:8]}): skipped, because {first.host} ({first.id[:8]}) has the same hardware")
    return list(nodes_by_machine.values())


def assign_cells(nodes: Sequence[Node], cells: Sequence[Cell]) -> list[tuple[Node, list[Cell]]]:
    """Returns each node with the cells that it measures; leaves out nodes without a cell.

    Every node measures the CPU cells, so that each result file has its own baseline. Nodes with a GPU measure the CUDA
    cells. If no node has a GPU, every node gets the CUDA cells, and the result rows of these cells report the missing
    GPU.
    """
    with_gpu = any(node.gpus for node in nodes)
    assignments = [(node, [c for c in cells if c.provider == "cpu" or node.gpus or not with_gpu]) for node in nodes]
    return [(node, assigned_cells) for node, assigned_cells in assignments if assigned_cells]


def run_plan(
    cluster: Cluster, plan: Plan, assignments: Sequence[tuple[Node, Sequence[Cell]]], say: Say
) -> Iterator[ResultFile]:
    """Measures the cells of all nodes at the same time, and yields a result file when a node is done or fails."""
    by_id = {node.id: (node, cells) for node, cells in assignments}
    for node, cells in assignments:
        say(f"{node.host}: will measure {len(cells)} cells when its {node.cpus} CPUs are free")
    cells_as_json = [[node.id, [_cell_to_json(cell) for cell in cells]] for node, cells in assignments]
    cluster.ask("bench", plan=plan.message(), shares=cells_as_json)
    with temporary_folder() as scratch:
        for _ in assignments:
            reply = cluster.ask("next_result", folder=str(scratch))
            node, cells = by_id[reply["node"]]
            if "cause" in reply:
                say(f"{node.host}: failed")
                yield _failed_result(
                    plan, node, cells, BenchError(f"On the node {node.host}: {reply['cause']}", reply["hint"])
                )
            else:
                say(f"{node.host}: measured")
                yield ResultFile.read(Path(reply["file"]))


def _cell_to_json(cell: Cell) -> dict[str, Any]:
    """Returns the cell as JSON data without its tokenizer; ``artifact`` says whether the cell has an artifact."""
    fields = {name: value for name, value in vars(cell).items() if name not in ("artifact", "encoder")}
    return {**fields, "artifact": cell.artifact is not None}


def _failed_result(plan: Plan, node: Node, cells: Sequence[Cell], error: BenchError) -> ResultFile:
    """Returns the result file of a failed run: every row states the failure instead of figures."""
    rows = [make_row_without_figures(cell, error if cell.artifact else None) for cell in cells]
    root = plan.workspace.load(checkpoints.ROOT_VARIANT)
    assert root is not None
    protocol = asdict(plan.request.protocol)
    return replace(run.make_result(rows, protocol, plan.data, root.manifest.max_length), machine=node.machine)
