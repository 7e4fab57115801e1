"""Weights of a graph, nodes in the place of others, and what a node is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from toolchain.errors import GraphError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """An initializer of the graph: a new one, or that of this name where layers that share a weight want it again."""
    import numpy as np
    import onnx_ir as ir

    there = model.graph.initializers.get(name)
    if there is not None:
        found = stored(there)
        if found.dtype == array.dtype and np.array_equal(found, array):
            return there
        return constant(model, f"{name}_other", array)  # read both ways, upright and transposed
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.val(name, dtype=tensor.dtype, shape=array.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def stored(weight: ir.Value | None) -> np.ndarray:
    """The array of a weight; `GraphError` where there is none."""
    if weight is None or weight.const_value is None:
        raise GraphError("The weights of a layer are computed, not stored.", "Fold constants when exporting.")
    array: np.ndarray = weight.const_value.numpy()
    return array


def negated(model: ir.Model, weight: ir.Value | None) -> ir.Value:
    """An initializer that is the weight's negative; `GraphError` where none is stored."""
    array = stored(weight)
    return constant(model, f"{weight.name if weight else ''}/negated", -array)


def replace(model: ir.Model, first: ir.Node, last: ir.Node, new: list[ir.Node], result: ir.Value) -> None:
    """Puts `new` after `last`; readers of `last` read `result`; `first` to `last` go."""
    old = last.outputs[0]
    name = old.name
    model.graph.insert_after(last, new)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    model.graph.remove([last, first] if last is not first else [first], safe=True)
    result.name = name


def adder(name: str, new: list[ir.Node]) -> Callable[..., ir.Value]:
    """A function that makes a node of one output, both called `name`/`what`, appends it to `new` and gives the output:
    `add(operator, inputs, what, **attributes)`."""
    import onnx_ir as ir

    def add(operator: str, inputs: Sequence[ir.Value | None], what: str, **attributes: int) -> ir.Value:
        node = ir.node(operator, inputs, attributes, name=f"{name}/{what}")
        node.outputs[0].name = f"{name}/{what}"
        new.append(node)
        return node.outputs[0]

    return add


def takes_first_token(node: ir.Node) -> bool:
    """Whether the node is a Gather of token 0 of [batch, sequence, width]."""
    if node.op_type != "Gather" or node.inputs[1] is None or node.inputs[1].const_value is None:
        return False
    index = node.inputs[1].const_value.numpy()
    return node.attributes.get_int("axis", 0) == 1 and index.ndim == 0 and int(index) == 0
