"""Int8 products of U8 activations and S8 weights, which have one scale per output channel.

An x86 processor without VNNI adds two 8-bit products in 16 bits. The sum of two U8 × S8 products can exceed 16 bits. A
sum that exceeds 16 bits saturates, and the model's outputs are wrong without an error. Weights of 7 bits avoid
saturation; ONNX Runtime calls this reduce_range.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from toolchain.passes.graph import constant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

LARGEST = 127  # No weight becomes -128, so that a weight and its negative have equal rounding errors.
LARGEST_OF_7_BITS = 64  # With 7-bit weights, the largest sum of two products, 2 × 255 × 64, fits in 16 bits.
INT8_PRODUCTS = ("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QAttention")

# A `Codes` function takes the model, a graph value, and a list to which it appends the nodes that quantise the value.
# A `Codes` function returns the quantised U8 value, the scale and the zero point.
Codes = Callable[["ir.Model", Any, "list[ir.Node]"], "list[ir.Value]"]


def quantize_weight(weight: np.ndarray, axis: int, limit: int = LARGEST) -> tuple[np.ndarray, np.ndarray]:
    """Quantises a 2-D array to symmetric int8 with one float32 scale per index of `axis`.

    Returns:
        The int8 array, with absolute values of at most `limit`, and an array with one scale per index of `axis`. A
        weight is approximately its int8 value times its scale.
    """
    import numpy as np

    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scale = np.maximum(largest / limit, np.finfo(np.float32).tiny).astype(np.float32)
    return np.clip(np.rint(weight / scale), -limit, limit).astype(np.int8), scale.reshape(-1)


def weight_codes(model: ir.Model, name: str, array: np.ndarray, limit: int = LARGEST) -> list[ir.Value]:
    """Stores a weight of shape [inner, outer] as int8 values, with one scale and a zero point of 0 per outer index."""
    import numpy as np

    weight, scale = quantize_weight(array, 1, limit)
    return [
        constant(model, f"{name}_int8", weight),
        constant(model, f"{name}_scale", scale),
        constant(model, f"{name}_zero_point", np.zeros(scale.shape, np.int8)),
    ]


def run_time_codes(model: ir.Model, data: Any, new_nodes: list[ir.Node]) -> list[ir.Value]:
    """Quantises `data` by its range at run time, with one node for all readers of `data`; implements `Codes`."""
    import onnx_ir as ir

    node = next((node for node in data.consumers() if node.op_type == "DynamicQuantizeLinear"), None)
    if node is None:
        node = ir.node("DynamicQuantizeLinear", [data], num_outputs=3, name=f"{data.name}/codes")
        for value, role in zip(node.outputs, ("codes", "scale", "zero_point"), strict=True):
            value.name = f"{data.name}/{role}"
        new_nodes.append(node)
    return list(node.outputs)


def weight_of(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Finds the input that holds the int8 weights of a product.

    Returns:
        A node, and the index of the input through which this node reads the int8 weights. The returned node is the
        product itself, or the DequantizeLinear before the product (QDQ). None if `node` is no int8 product.
    """
    if node.op_type in INT8_PRODUCTS:
        return node, 1
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    producer = weight.producer() if weight is not None else None
    codes = producer.inputs[0] if producer is not None and producer.op_type == "DequantizeLinear" else None
    return (producer, 0) if producer is not None and codes is not None and codes.const_value is not None else None
