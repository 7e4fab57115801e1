"""Exit numbers: a copy of a graph with exits can say which exit each text uses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.errors import GraphError
from toolchain.passes.graph import adder, constant

if TYPE_CHECKING:
    import onnx_ir as ir


def add_exit_numbers(model: ir.Model) -> int:
    """Adds a last column to the logits: the number of exits that the text passes; returns the number of exits.

    A text that uses the first exit has the number 0. A text that uses no exit has the number of exits. The branches of
    an exit merge the logits of its texts, and with them the new column; see `toolchain.passes.exits`.

    Raises:
        GraphError: The graph has no exits, or other `If` nodes than the pass `exits` makes.
    """
    import onnx_ir as ir

    output = model.graph.outputs[0]
    node, graph, passed = output.producer(), model.graph, 0
    merged: ir.Node | None = None
    while node is not None and node.op_type == "If":
        branches = {name: node.attributes[name].as_graph() for name in ("then_branch", "else_branch")}
        done, merged = (branch.outputs[0].producer() for branch in branches.values())
        if done is None or merged is None or (done.op_type, merged.op_type) != ("Identity", "ScatterND"):
            raise _unknown_graph()
        for value in (node.outputs[0], *(branch.outputs[0] for branch in branches.values())):
            value.shape = None
        logits = done.inputs[0]
        numbered = _append_number(model, graph, node, logits, passed)
        done.replace_input_with(0, numbered)
        merged.replace_input_with(0, numbered)
        graph, passed = branches["else_branch"], passed + 1
        deeper = merged.inputs[2]
        node = deeper.producer() if deeper is not None else None
    if merged is None:
        raise _unknown_graph()
    merged.replace_input_with(2, _append_number(model, graph, merged, merged.inputs[2], passed))
    output.shape = ir.Shape([None, None])
    return passed


def _append_number(model: ir.Model, graph: ir.Graph, before: ir.Node, logits: ir.Value | None, number: int) -> ir.Value:
    """Returns the logits of shape [texts, labels] with a last column that holds `number`."""
    import numpy as np

    nodes: list[ir.Node] = []
    pads = constant(model, "exit_numbers/pads", np.array([0, 0, 0, 1], np.int64))
    value = constant(model, f"exit_numbers/{number}", np.array(number, np.float32))
    numbered: ir.Value = adder("exit_numbers", nodes)("Pad", [logits, pads, value], f"{number}/logits")
    graph.insert_before(before, nodes)
    return numbered


def _unknown_graph() -> GraphError:
    return GraphError("The graph has no exits of the toolchain.", "Build exits with `toolchain exits`.")
