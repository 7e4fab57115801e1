"""ONNX Runtime's own transformer fusions, those of them that pay on an execution provider."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnxruntime.transformers.fusion_options import FusionOptions

    from toolchain.passes import Context

DOMAIN = "com.microsoft"  # of the fused operators


def fuse(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """For the CPU: attention → one node, erf-Gelu → Gelu; counts the fused nodes.

    Skip- and embedding LayerNormalization stay apart: their CPU kernels are scalar, and BiasGelu would take the bias
    that belongs inside the quantised matmul.
    """
    options = _options()
    options.enable_embed_layer_norm = False
    options.enable_skip_layer_norm = False
    options.enable_bias_skip_layer_norm = False
    options.enable_bias_gelu = False
    return _fused(model, context, options)


def fuse_cuda(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """For CUDA, whose kernels of the fused forms are the fast ones: all of them; counts the fused nodes."""
    return _fused(model, context, _options())


def _options() -> FusionOptions:
    """All fusions, with the raw [batch, sequence] mask: the default one counts tokens from the left, which is wrong for
    sentences padded on the left."""
    from onnxruntime.transformers.fusion_options import FusionOptions

    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)
    return options


def _fused(model: ir.Model, context: Context, options: FusionOptions) -> tuple[ir.Model, int]:
    import onnx_ir as ir
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel

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
