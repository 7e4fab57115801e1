"""Export: converts the PyTorch model to one ONNX file with standard operators."""

from __future__ import annotations

from toolchain.artifacts.steps import Export
from toolchain.artifacts.store import ONNX, copy_companions
from toolchain.backends.pytorch import load_model
from toolchain.build.job import Built, Job
from toolchain.errors import GraphError
from toolchain.exporters.optimum_exporter import to_onnx
from toolchain.passes import facts, read, specs

VERSION = 2


def export(job: Job[Export]) -> Built:
    """Exports the parent to ONNX; see `to_onnx`.

    Raises:
        GraphError: The inputs of the graph differ from those of the model.
    """
    given = job.given
    target = job.folder / ONNX
    wanted = [spec.name for spec in given.manifest.inputs]
    to_onnx(load_model(given.path), target, job.step.opset, wanted)
    graph = read(target)
    inputs = specs(graph.graph.inputs)
    if {spec.name for spec in inputs} != set(wanted):
        got = ", ".join(spec.name for spec in inputs)
        raise GraphError(f"The exported graph takes {got}; the model takes {', '.join(sorted(wanted))}.")
    copy_companions(given, job.folder)
    return Built.like(job, facts(graph), inputs=inputs, outputs=specs(graph.graph.outputs))
