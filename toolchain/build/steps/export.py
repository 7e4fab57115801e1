"""Export: converts the PyTorch model to one ONNX file with standard operators."""

from __future__ import annotations

from toolchain.artifacts.steps import Export
from toolchain.artifacts.store import ONNX, copy_companions
from toolchain.backends.pytorch import load_model
from toolchain.build.job import Job, StepResult
from toolchain.errors import GraphError
from toolchain.exporters import to_onnx
from toolchain.passes import facts, read, specs

VERSION = 2


def export(job: Job[Export]) -> StepResult:
    """Exports the parent to ONNX; see `to_onnx`.

    Raises:
        GraphError: The inputs of the graph differ from those of the model.
    """
    parent = job.parent_artifact
    target = job.folder / ONNX
    input_names = [spec.name for spec in parent.manifest.inputs]
    to_onnx(load_model(parent.path), target, job.step.opset, input_names, job.step.exporter)
    graph = read(target)
    inputs = specs(graph.graph.inputs)
    if {spec.name for spec in inputs} != set(input_names):
        graph_inputs = ", ".join(spec.name for spec in inputs)
        model_inputs = ", ".join(sorted(input_names))
        raise GraphError(f"The exported graph has the inputs {graph_inputs}, but the model has {model_inputs}.")
    copy_companions(parent, job.folder)
    return StepResult.from_parent(job, facts(graph), inputs=inputs, outputs=specs(graph.graph.outputs))
