"""Export: the PyTorch model in memory to one ONNX file of standard operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolchain.artifacts import TensorSpec, copy_companions
from toolchain.backends.exporting import to_onnx
from toolchain.backends.pytorch import load_model
from toolchain.errors import GraphError
from toolchain.jobs import Built, Job
from toolchain.passes import facts, read
from toolchain.variants import Export

if TYPE_CHECKING:
    import onnx_ir as ir

VERSION = 1


def export(job: Job) -> Built:
    """See `to_onnx`; raises `GraphError` where the graph does not take the model's inputs."""
    assert isinstance(job.step, Export)
    given = job.given
    target = job.folder / "model.onnx"
    wanted = [spec.name for spec in given.manifest.inputs]
    to_onnx(load_model(given.path), target, job.step.opset, wanted)
    graph = read(target)
    inputs = specs(graph.graph.inputs)
    if {spec.name for spec in inputs} != set(wanted):
        got = ", ".join(spec.name for spec in inputs)
        raise GraphError(f"The exported graph takes {got}; the model takes {', '.join(sorted(wanted))}.")
    copy_companions(given, job.folder)
    return Built.like(job, facts(graph), inputs=inputs, outputs=specs(graph.graph.outputs))


def specs(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Inputs or outputs of a graph as the manifest states them."""
    return tuple(
        TensorSpec(
            value.name or "",
            value.dtype.numpy().name if value.dtype else "",
            tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()),
        )
        for value in values
    )
