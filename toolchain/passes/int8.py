"""Weights and activations in int8: S8 weights per output channel × U8 activations.

x86 without VNNI adds two products of 8 bits in 16, which is too little for U8 × S8: it saturates, and the model answers
wrongly without a word. Weights of 7 bits fit (ONNX Runtime calls it reduce_range).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from toolchain.passes.graph import constant

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

LARGEST = 127  # symmetric: -128 is left out, so that a weight and its negative are equally exact
LARGEST_OF_7_BITS = 64  # two products with the largest activation, 2 × 255 × 64, are 16 bits
INT8_PRODUCTS = ("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat", "QAttention")

# The model and a value → the value in U8, its scale and its zero point; what computes them is appended to the nodes.
Codes = Callable[["ir.Model", Any, "list[ir.Node]"], "list[ir.Value]"]


def quantize_weight(weight: np.ndarray, axis: int, most: int = LARGEST) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 of a 2-D array with one float32 scale per index of `axis`: weight ≈ int8 × scale, |int8| ≤
    `most`."""
    import numpy as np

    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scale = np.maximum(largest / most, np.finfo(np.float32).tiny).astype(np.float32)
    return np.clip(np.rint(weight / scale), -most, most).astype(np.int8), scale.reshape(-1)


def weight_codes(model: ir.Model, name: str, array: np.ndarray, most: int = LARGEST) -> list[ir.Value]:
    """A weight [inner, outer] as initializers: int8, scales [outer] and zero points [outer], which are 0."""
    import numpy as np

    weight, scale = quantize_weight(array, 1, most)
    return [
        constant(model, f"{name}_int8", weight),
        constant(model, f"{name}_scale", scale),
        constant(model, f"{name}_zero_point", np.zeros(scale.shape, np.int8)),
    ]


def run_time_codes(model: ir.Model, data: Any, new: list[ir.Node]) -> list[ir.Value]:
    """By the range of `data` at run time, once for all that read it; `Codes`."""
    import onnx_ir as ir

    node = next((node for node in data.consumers() if node.op_type == "DynamicQuantizeLinear"), None)
    if node is None:
        node = ir.node("DynamicQuantizeLinear", [data], num_outputs=3, name=f"{data.name}/codes")
        for value, role in zip(node.outputs, ("codes", "scale", "zero_point"), strict=True):
            value.name = f"{data.name}/{role}"
        new.append(node)
    return list(node.outputs)


def weight_of(node: ir.Node) -> tuple[ir.Node, int] | None:
    """Where the int8 weights of a product are read, as a node and the index of its input: by the product itself, or by
    what dequantises them for it (QDQ); None for a node that is no such product."""
    if node.op_type in INT8_PRODUCTS:
        return node, 1
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    before = weight.producer() if weight is not None else None
    codes = before.inputs[0] if before is not None and before.op_type == "DequantizeLinear" else None
    return (before, 0) if before is not None and codes is not None and codes.const_value is not None else None
