"""Export: the PyTorch model in memory to one ONNX file of standard operators."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolchain.artifacts import Built, Job, TensorSpec, copy_companions
from toolchain.backends.pytorch import load_model
from toolchain.errors import CheckpointError, GraphError
from toolchain.passes import facts, read
from toolchain.variants import Export

if TYPE_CHECKING:
    import onnx_ir as ir

VERSION = 1


def export(job: Job) -> Built:
    """Exports by optimum's configuration of the architecture: dynamic batch and sequence, exactly the model's inputs.

    Raises `CheckpointError` for an architecture optimum cannot export, `GraphError` where the graph is not as asked.
    """
    from optimum.exporters.onnx.convert import export as optimum_export
    from optimum.exporters.tasks import TasksManager

    assert isinstance(job.step, Export)
    given = job.given
    model = load_model(given.path)
    target = job.folder / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing speaks of constants that stay constant here
        logging.getLogger("optimum").setLevel(logging.ERROR)
        try:
            constructor = TasksManager.get_exporter_config_constructor(
                "onnx", model, task="text-classification", library_name="transformers"
            )
        except (KeyError, ValueError) as error:
            raise CheckpointError(
                f"{type(model).__name__} cannot be exported to ONNX by optimum: {error}.", "Use another architecture."
            ) from error
        optimum_export(model, constructor(model.config), target, opset=job.step.opset, do_constant_folding=True)
    if extra := sorted(p.name for p in job.folder.iterdir() if p != target):
        raise GraphError(
            f"The model is too large for one ONNX file (2 GB): the exporter also wrote {', '.join(extra)}."
        )
    graph = read(target)
    inputs = specs(graph.graph.inputs)
    wanted = {spec.name for spec in given.manifest.inputs}
    if {spec.name for spec in inputs} != wanted:
        got = ", ".join(spec.name for spec in inputs)
        raise GraphError(f"The exported graph takes {got}; the model takes {', '.join(sorted(wanted))}.")
    copy_companions(given, job.folder)
    return Built(
        step=job.step,
        inputs=inputs,
        outputs=specs(graph.graph.outputs),
        labels=given.manifest.labels,
        max_length=given.manifest.max_length,
        facts={"parameters": given.manifest.facts["parameters"], **facts(graph)},
    )


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
