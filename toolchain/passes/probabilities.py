"""Probabilities beside the logits, for those who ask a graph and no code of ours."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# Names of the outputs of every graph that is shipped.
LOGITS = "logits"
PROBABILITIES = "probabilities"


def add_probabilities(model: ir.Model, multi_label: bool) -> ir.Model:
    """The graph's one output is called `LOGITS` and has `PROBABILITIES` after it, float32 [batch, labels]: a softmax
    over the labels, or each for itself where a text can have several."""
    import onnx_ir as ir

    logits = model.graph.outputs[0]
    last = ir.node("Sigmoid", [logits]) if multi_label else ir.node("Softmax", [logits], {"axis": -1})
    last.name = PROBABILITIES
    shares = last.outputs[0]
    logits.name, shares.name = LOGITS, PROBABILITIES
    shares.shape, shares.dtype = logits.shape, ir.DataType.FLOAT
    model.graph.append(last)
    model.graph.outputs[:] = [logits, shares]
    return model
