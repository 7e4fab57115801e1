"""Probabilities as a second output, for apps that run the graph without this project's code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.data.labels import MULTI, REGRESSION

if TYPE_CHECKING:
    import onnx_ir as ir

# Output names of every shipped graph.
LOGITS = "logits"
PROBABILITIES = "probabilities"


def add_probabilities(model: ir.Model, task: str) -> ir.Model:
    """Renames the graph's only output to `LOGITS`, and adds the output `PROBABILITIES` of the same shape in float32.

    A regression has no probabilities, so its graph gets no second output.

    Args:
        task: Task of the model, one of `toolchain.data.labels.TASKS`. A multi-label graph applies a sigmoid to each
            logit, and a single-label graph applies softmax.
    """
    import onnx_ir as ir

    logits = model.graph.outputs[0]
    if task == REGRESSION:
        logits.name = LOGITS
        return model
    activation = ir.node("Sigmoid", [logits]) if task == MULTI else ir.node("Softmax", [logits], {"axis": -1})
    activation.name = PROBABILITIES
    probabilities = activation.outputs[0]
    logits.name, probabilities.name = LOGITS, PROBABILITIES
    probabilities.shape, probabilities.dtype = logits.shape, ir.DataType.FLOAT
    model.graph.append(activation)
    model.graph.outputs[:] = [logits, probabilities]
    return model
