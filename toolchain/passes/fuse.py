"""ONNX Runtime's own transformer fusions, those of them that pay on the CPU provider."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Attention


def fuse(model: ir.Model, attention: Attention) -> tuple[ir.Model, int]:
    """Attention → one node, erf-Gelu → Gelu, by `onnxruntime.transformers`; counts the fused nodes.

    The raw [batch, sequence] mask is kept: the default fusion counts tokens from the left, which is wrong for sentences
    padded on the left. Skip- and embedding LayerNormalization stay apart: their CPU kernels are scalar, and BiasGelu
    would take the bias that belongs inside the quantised matmul.
    """
    import onnx_ir as ir
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel

    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)
    options.enable_embed_layer_norm = False
    options.enable_skip_layer_norm = False
    options.enable_bias_skip_layer_norm = False
    options.enable_bias_gelu = False
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        fused = BertOnnxModel(ir.to_proto(model), attention.heads, attention.width)
        fused.optimize(options, add_dynamic_axes=False)
        counts = fused.get_fused_operator_statistics()
    finally:
        logging.disable(before)
    result = ir.from_proto(fused.model)
    result.graph.opset_imports.setdefault("com.microsoft", 1)
    result.graph.sort()  # fused nodes were appended at the end
    return result, sum(counts[name] for name in ("Attention", "Gelu"))
