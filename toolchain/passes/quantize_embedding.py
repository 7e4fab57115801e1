"""Embedding tables in int8, one scale a row: most of a small model's bytes, and a look-up costs nothing more."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.passes.quantize_linear import constant, quantize_weight

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Attention


def quantize_embedding(model: ir.Model, attention: Attention) -> tuple[ir.Model, int]:
    """Gather from a constant 2-D fp32 table → Gather of int8 rows × Gather of their scales; counts the tables."""
    import onnx_ir as ir

    count = 0
    for node in list(model.graph):
        table, rows = node.inputs[:2] if node.op_type == "Gather" else (None, None)
        tensor = table.const_value if table is not None else None
        if tensor is None or tensor.shape.rank() != 2 or tensor.dtype != ir.DataType.FLOAT:
            continue
        if node.attributes.get_int("axis", 0) != 0:
            continue
        name = table.name if table is not None else ""
        int8, scale = quantize_weight(tensor.numpy(), axis=0)
        looked_up = ir.node("Gather", [constant(model, f"{name}_int8", int8), rows], name=f"{name}/rows")
        scales = ir.node("Gather", [constant(model, f"{name}_scale", scale[:, None]), rows], name=f"{name}/scales")
        cast = ir.node("Cast", [looked_up.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}/cast")
        scaled = ir.node("Mul", [cast.outputs[0], scales.outputs[0]], name=f"{name}/scaled")
        for new in (looked_up, scales, cast):
            new.outputs[0].name = f"{new.name}_output"
        old = node.outputs[0]
        result_name = old.name
        model.graph.insert_after(node, [looked_up, scales, cast, scaled])
        old.replace_all_uses_with(scaled.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        scaled.outputs[0].name = result_name
        count += 1
    return model, count
