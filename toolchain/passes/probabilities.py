"""Probabilities as a second output, for apps that run the graph without this project's code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# Output names of every shipped graph.
LOGITS = "logits"
PROBABILITIES = "probabilities"


def add_probabilities(model: ir.Model, multi_label: bool) -> ir.Model:
    """Renames the graph's only output to `LOGITS`, and adds the output `PROBABILITIES` of the same shape in float32.

    Args:
        multi_label: Whether a text can have several labels. A multi-label graph applies a sigmoid to each logit, and a
            single-label graph applies softmax.
    """
    import onnx_ir as ir

    logits = model.graph.outputs[0]
    activation = ir.node("Sigmoid", [logits]) if multi_label else ir.node("Softmax", [logits], {"axis": -1})
    activation.name = PROBABILITIES
    probabilities = activation.outputs[0]
    logits.name, probabilities.name = LOGITS, PROBABILITIES
    probabilities.shape, probabilities.dtype = logits.shape, ir.DataType.FLOAT
    model.graph.append(activation)
    model.graph.outputs[:] = [logits, probabilities]
    return model
