"""Converts int8 weights to U8, for runtimes that saturate U8 × S8 products and have no option to prevent it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.passes.graph import array_of, constant
from toolchain.passes.int8 import weight_of

if TYPE_CHECKING:
    import onnx_ir as ir

OFFSET = 128
# Operator (a product, or the DequantizeLinear of its weights) → index of the input that is the weights' zero point.
ZERO_POINTS = {
    "DynamicQuantizeMatMul": 3,
    "MatMulInteger": 3,
    "MatMulIntegerToFloat": 5,
    "QAttention": 7,
    "DequantizeLinear": 2,
}


def unsigned_weights(model: ir.Model) -> int:
    """Adds 128 to the int8 weights and zero points of every product; returns the number of products changed.

    The rewrite is exact: products use the differences between weights and zero points, which stay the same. U8 × U8
    products saturate on no processor. U8 × U8 products are slower than U8 × S8 products on x86 with VNNI, and equally
    fast on ARM.
    """
    import numpy as np
    from onnx_ir.passes import common

    count = 0
    for node in list(model.graph):
        reader, index = weight_of(node) or (None, 0)
        if reader is None:
            continue
        codes, zero_point_index = reader.inputs[index], ZERO_POINTS[reader.op_type]
        array = array_of(codes)
        if array.dtype != np.int8:
            continue
        old_zero_point = reader.inputs[zero_point_index] if zero_point_index < len(reader.inputs) else None
        zero_point = np.array(0, np.int8) if old_zero_point is None else array_of(old_zero_point)
        reader.resize_inputs(max(zero_point_index + 1, len(reader.inputs)))
        for target, values in ((index, array), (zero_point_index, zero_point)):
            name = f"{codes.name if codes else ''}_unsigned{'' if target == index else '_zero_point'}"
            unsigned = (values.astype(np.int16) + OFFSET).astype(np.uint8)
            reader.replace_input_with(target, constant(model, name, unsigned))
        count += 1
    common.RemoveUnusedNodesPass()(model)  # No node reads the signed weights any more.
    return count


def shares_int8_weights(model: ir.Model) -> bool:
    """Returns whether several products share int8 weights, as in ALBERT."""
    readers = [location for node in model.graph if (location := weight_of(node))]
    weights = [reader.inputs[index] for reader, index in readers]
    return len(set(weights)) < len(weights)
