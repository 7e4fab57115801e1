"""Embedding tables in fewer bits: they hold most bytes of a small model, and fewer bits do not slow down look-ups."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from toolchain.passes.graph import constant
from toolchain.passes.int8 import quantize_weight

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from toolchain.passes import Context

# A `LookUp` takes the model, the name of an embedding table, the embedding table [rows, width], and the row indices.
# The result of a `LookUp` is the nodes that look up rows of the embedding table; the last node gives the rows in fp32.
LookUp = Callable[["ir.Model", str, "np.ndarray", Any], "list[ir.Node]"]


def quantize_embedding(model: ir.Model, context: Context, look_up: LookUp) -> tuple[ir.Model, int]:
    """Replaces each Gather from a constant 2-D fp32 embedding table by nodes from `look_up`; counts the Gather nodes.

    `look_up` builds the nodes that replace a Gather.
    """
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        table, rows = node.inputs[:2] if node.op_type == "Gather" else (None, None)
        tensor = table.const_value if table is not None else None
        if tensor is None or tensor.shape.rank() != 2 or tensor.dtype != ir.DataType.FLOAT:
            continue
        if node.attributes.get_int("axis", 0) != 0:
            continue
        new_nodes = look_up(model, table.name or "" if table is not None else "", tensor.numpy(), rows)
        old_output, result = node.outputs[0], new_nodes[-1].outputs[0]
        name = old_output.name
        model.graph.insert_after(node, new_nodes)
        old_output.replace_all_uses_with(result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        result.name = name
        count += 1
    return model, count


def look_up_int8_rows(model: ir.Model, name: str, array: np.ndarray, rows: Any) -> list[ir.Node]:
    """Builds standard operators that look up int8 embeddings and multiply each by its scale; implements `LookUp`."""
    import onnx_ir as ir

    int8, scale = quantize_weight(array, axis=0)
    codes = ir.node("Gather", [constant(model, f"{name}_int8", int8), rows], name=f"{name}/rows")
    scales = ir.node("Gather", [constant(model, f"{name}_scale", scale[:, None]), rows], name=f"{name}/scales")
    cast = ir.node("Cast", [codes.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}/cast")
    product = ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=f"{name}/scaled")
    for node in (codes, scales, cast):
        node.outputs[0].name = f"{node.name}_output"
    return [codes, scales, cast, product]
