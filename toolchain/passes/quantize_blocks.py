"""4-bit weights in blocks, each with one scale and one zero point: a format for small files, not for speed.

The module uses two operators of ONNX Runtime. MatMulNBits computes linear layers and quantises their activations to
8 bits. GatherBlockQuantized looks up rows of embedding tables.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.passes.graph import constant
from toolchain.passes.quantize_embedding import look_up_int8_rows

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

BITS, MAX_CODE = 4, 15
BLOCK = 32  # Number of weights that share a scale.
INT8_ACTIVATIONS = 4  # Value of MatMulNBits' attribute `accuracy_level` for 8-bit activations.
# Fractions of the weight range of a block that the quantisation tries, in this order. A smaller range has finer steps
# but clips the largest weights.
RANGE_FRACTIONS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def quantize_blocks(weight: np.ndarray, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantises a 2-D float array in blocks along its rows.

    For each block, the function tries several ranges of values. Each of these ranges is a fraction of the block's full
    range; `RANGE_FRACTIONS` lists the fractions. The function chooses the range with the least squared difference
    between the block's values and the quantised values. If the row length of the array is no multiple of `block`, the
    function pads each row with codes for zero.

    Returns:
        The codes (0 to 15), the scales and the zero points: weight ≈ (code − zero point) × scale. The codes have the
        dtype uint8 and the shape [rows, blocks × block]. The scales (float32) and the zero points (uint8) have the
        shape [rows, blocks].
    """
    import numpy as np

    rows, columns = weight.shape
    padded = np.zeros((rows, -(-columns // block) * block), np.float32)
    padded[:, :columns] = weight
    blocks = padded.reshape(rows, -1, block)
    # The range of each block includes 0, so that padding and pruned weights stay exactly 0.
    low, high = np.minimum(blocks.min(axis=2), 0), np.maximum(blocks.max(axis=2), 0)
    least_error = np.full(low.shape, np.inf, np.float32)
    codes = np.zeros(blocks.shape, np.uint8)
    scales, zeros = np.ones(low.shape, np.float32), np.zeros(low.shape, np.uint8)
    for fraction in RANGE_FRACTIONS:
        scale = np.maximum((high - low) * fraction / MAX_CODE, np.finfo(np.float32).tiny).astype(np.float32)
        zero = np.clip(np.rint(-low * fraction / scale), 0, MAX_CODE)
        code = np.clip(np.rint(blocks / scale[:, :, None]) + zero[:, :, None], 0, MAX_CODE)
        error = (((code - zero[:, :, None]) * scale[:, :, None] - blocks) ** 2).sum(axis=2)
        is_better = error < least_error
        least_error = np.where(is_better, error, least_error)
        codes[is_better], scales[is_better], zeros[is_better] = code[is_better], scale[is_better], zero[is_better]
    return codes.reshape(rows, -1), scales, zeros


def pack(codes: np.ndarray) -> np.ndarray:
    """Packs two codes into a byte along the last axis, the first in the low half; an odd length is padded with 0."""
    import numpy as np

    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], 1), np.uint8)], axis=-1)
    packed: np.ndarray = codes[..., ::2] | codes[..., 1::2] << 4
    return packed


def build_int4_product(
    model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None
) -> list[ir.Node]:
    """Builds MatMulNBits, which also adds the bias; implements `attention.Product`."""
    import onnx_ir as ir

    inner, outer = array.shape
    codes, scales, zeros = quantize_blocks(array.T)
    count = scales.shape[1]
    inputs = [
        data,
        constant(model, f"{name}_int4", pack(codes).reshape(outer, count, BLOCK // 2)),
        constant(model, f"{name}_scale", scales.reshape(-1)),
        constant(model, f"{name}_zero_point", pack(zeros).reshape(-1)),
        *([None, bias] if bias is not None else []),
    ]
    attributes = {"K": inner, "N": outer, "bits": BITS, "block_size": BLOCK, "accuracy_level": INT8_ACTIVATIONS}
    node = ir.node("MatMulNBits", inputs, attributes, domain="com.microsoft", name=f"{name}/product")
    node.outputs[0].name = f"{name}/product"
    return [node]


def look_up_int4_rows(
    model: ir.Model, name: str, array: np.ndarray, rows: Any, *, webgpu: bool = False
) -> list[ir.Node]:
    """Builds GatherBlockQuantized; implements `quantize_embedding.LookUp`.

    If the width of the embedding table is no multiple of `BLOCK`, this function calls `look_up_int8_rows`, or keeps the
    table in fp32 for WebGPU.

    Args:
        webgpu: Whether the nodes run on WebGPU, which cannot look up int8 rows. Its scales are fp32, because some
            graphics processors have no fp16.
    """
    import numpy as np
    import onnx_ir as ir

    if array.shape[1] % BLOCK and webgpu:
        return [ir.node("Gather", [constant(model, name, array), rows], name=f"{name}/rows")]
    if array.shape[1] % BLOCK:
        return look_up_int8_rows(model, name, array, rows)
    codes, scales, zeros = quantize_blocks(array)
    inputs = [
        constant(model, f"{name}_int4", pack(codes)),
        rows,
        # A scale in fp16 adds little to the rounding error of a 4-bit code.
        constant(model, f"{name}_scale", scales if webgpu else scales.astype(np.float16)),
        constant(model, f"{name}_zero_point", pack(zeros)),
    ]
    attributes = {"bits": BITS, "block_size": BLOCK, "gather_axis": 0, "quantize_axis": 1}
    gather = ir.node("GatherBlockQuantized", inputs, attributes, domain="com.microsoft", name=f"{name}/rows")
    gather.outputs[0].name = f"{name}/rows_output"
    if webgpu:
        return [gather]
    return [gather, ir.node("Cast", [gather.outputs[0]], {"to": ir.DataType.FLOAT}, name=f"{name}/cast")]
