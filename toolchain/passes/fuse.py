"""ONNX Runtime's own transformer fusions, those of them that pay on an execution provider."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context

DOMAIN = "com.microsoft"  # of the fused operators
# What stays apart on the CPU, by the names of `FusionOptions`: Skip- and embedding LayerNormalization, whose kernels
# there are scalar, and BiasGelu, which would take the bias that belongs inside the quantised matmul.
APART_ON_CPU = ("embed_layer_norm", "skip_layer_norm", "bias_skip_layer_norm", "bias_gelu")


def fuse(model: ir.Model, context: Context, *, apart: Collection[str] = APART_ON_CPU) -> tuple[ir.Model, int]:
    """Attention → one node, erf-Gelu → Gelu, and whatever else is not to stay `apart`; counts the fused nodes.

    The mask stays the raw [batch, sequence]: by default it counts tokens from the left, which is wrong for sentences
    padded on the left.
    """
    import onnx_ir as ir
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel

    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)
    for name in apart:
        setattr(options, f"enable_{name}", False)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        fused = BertOnnxModel(ir.to_proto(model), context.heads, context.width)
        fused.optimize(options, add_dynamic_axes=False)
    finally:
        logging.disable(before)
    result = ir.from_proto(fused.model)
    result.graph.opset_imports.setdefault(DOMAIN, 1)
    result.graph.sort()  # fused nodes were appended at the end
    return result, sum(node.domain == DOMAIN for node in result.graph)
