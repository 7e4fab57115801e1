"""Converts weights and arithmetic to fp16 with ONNX Runtime's own conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context


def half(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Converts fp32 to fp16 wherever CUDA has an fp16 kernel; counts the converted weights.

    The graph's inputs and outputs keep their types, so the logits stay fp32.
    """
    import onnx_ir as ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    fp32_count = _count_weights(model, ir.DataType.FLOAT)
    converted_model = ir.from_proto(convert_float_to_float16(ir.to_proto(model), keep_io_types=True))
    return converted_model, fp32_count - _count_weights(converted_model, ir.DataType.FLOAT)


def _count_weights(model: ir.Model, dtype: ir.DataType) -> int:
    return sum(value.dtype == dtype for value in model.graph.initializers.values())
