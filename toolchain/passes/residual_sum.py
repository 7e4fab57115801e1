"""The residual addition before a LayerNormalization as `Sum`, so that no runtime fuses the two."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context


def residual_sum(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Add → LayerNormalization becomes Sum → LayerNormalization where both addends are computed.

    Wherever ONNX Runtime knows both shapes, as in an app that fixes the dimensions, it makes SkipLayerNormalization of
    Add + LayerNormalization when it loads a file under default options; on its CPU provider that kernel is several
    times slower than the two it replaces. A two-input Sum is the same operation and is not matched.
    """
    count = 0
    for node in model.graph:
        if node.op_type != "LayerNormalization" or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if add is None or add.op_type != "Add" or any(v is None or v.is_initializer() for v in add.inputs):
            continue
        add.op_type = "Sum"
        count += 1
    return model, count
