"""Helpers for the passes: read and store weights, add and replace nodes, recognise nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.errors import GraphError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

MASK = "attention_mask"  # name of the input that marks the tokens of a text


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """Returns an initializer of the graph that holds `array`.

    If the graph has an initializer `name` with an equal array, the function returns that initializer. Layers with
    the same weight share one initializer. If the initializer `name` holds a different array, the name of the new
    initializer ends in `_other`.
    """
    import numpy as np
    import onnx_ir as ir

    existing = model.graph.initializers.get(name)
    if existing is not None:
        existing_array = array_of(existing)
        if existing_array.dtype == array.dtype and np.array_equal(existing_array, array):
            return existing
        # Callers derive `name` from the name of a layer's weight. If one layer uses a weight and another layer uses the
        # transpose of that weight, the two layers pass different arrays with the same `name`.
        return constant(model, f"{name}_other", array)
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.val(name, dtype=tensor.dtype, shape=array.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def array_of(weight: ir.Value | None) -> np.ndarray:
    """Returns the array of a weight.

    Raises:
        GraphError: The weight is missing or is computed in the graph.
    """
    if weight is None or weight.const_value is None:
        raise GraphError(
            "The graph computes the weights of a layer, and a pass needs stored weights.",
            "Export with constant folding.",
        )
    array: np.ndarray = weight.const_value.numpy()
    return array


def store_negative(model: ir.Model, weight: ir.Value | None) -> ir.Value:
    """Returns an initializer that holds the weight's negative.

    Raises:
        GraphError: The weight is missing or is computed in the graph.
    """
    array = array_of(weight)
    return constant(model, f"{weight.name if weight else ''}/negated", -array)


def replace_nodes(model: ir.Model, first: ir.Node, last: ir.Node, new_nodes: list[ir.Node], result: ir.Value) -> None:
    """Replaces two connected nodes, `first` and `last`, by `new_nodes`; `first` and `last` may be the same node.

    The function inserts `new_nodes` after `last`. The nodes that read the output of `last` then read `result`, which
    is an output of one of the `new_nodes`. At the end, the function removes `first` and `last`.
    """
    old_output = last.outputs[0]
    name = old_output.name
    model.graph.insert_after(last, new_nodes)
    old_output.replace_all_uses_with(result, replace_graph_outputs=True)
    model.graph.remove([last, first] if last is not first else [first], safe=True)
    result.name = name


def adder(name: str, new_nodes: list[ir.Node]) -> Callable[..., ir.Value]:
    """Returns a function that adds a node with one output to `new_nodes` and returns that output.

    Call the returned function as `add(operator, inputs, suffix, **attributes)`. The node and its output are both named
    `name`/`suffix`.
    """
    import onnx_ir as ir

    def add(operator: str, inputs: Sequence[ir.Value | None], suffix: str, **attributes: Any) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"{name}/{suffix}")
        node.outputs[0].name = f"{name}/{suffix}"
        new_nodes.append(node)
        return node.outputs[0]

    return add


def takes_first_token(node: ir.Node) -> bool:
    """Returns whether the node is a Gather of token 0 from [batch, sequence, width]."""
    if node.op_type != "Gather" or node.inputs[1] is None or node.inputs[1].const_value is None:
        return False
    index = node.inputs[1].const_value.numpy()
    return node.attributes.get_int("axis", 0) == 1 and index.ndim == 0 and int(index) == 0


def reads_table(node: ir.Node) -> bool:
    """Returns whether the input of the node is rows that a Gather looks up in a stored table.

    This is the case for the linear layer of word embeddings of low rank.
    """
    gather = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    table = gather.inputs[0] if gather is not None and gather.op_type == "Gather" else None
    return table is not None and table.const_value is not None and table.const_value.shape.rank() == 2


def projection_width(value: ir.Value | None) -> int | None:
    """Returns the width of the output of a dense layer (a MatMul, or an Add after a MatMul), or None."""
    node = value.producer() if value else None
    if node is not None and node.op_type == "Add":
        products = [product for product in node.predecessors() if product.op_type == "MatMul"]
        node = products[0] if products else None
    if node is None or node.op_type != "MatMul" or node.inputs[1] is None or node.inputs[1].const_value is None:
        return None
    return int(array_of(node.inputs[1]).shape[-1])
