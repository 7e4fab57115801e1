"""ONNX Runtime's own transformer fusions, those of them that pay on an execution provider."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from toolchain.system.quiet import quiet

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
    from onnx_ir.passes import common
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel

    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)
    for name in apart:
        setattr(options, f"enable_{name}", False)
    _residual_last(model)
    with quiet():
        fused = BertOnnxModel(ir.to_proto(model), context.heads, context.width)
        fused.optimize(options, add_dynamic_axes=False)
    result = ir.from_proto(fused.model)
    result.graph.opset_imports.setdefault(DOMAIN, 1)  # for whoever infers shapes next
    result.graph.sort()  # fused nodes were appended at the end
    # Layers that share query, key and value, as ALBERT's, were given a copy each of the three packed together.
    common.DeduplicateHashedInitializersPass()(result)
    return result, sum(node.domain == DOMAIN for node in result.graph)


def _residual_last(model: ir.Model) -> None:
    """What attention and projections read goes behind what they give in the addition before a LayerNormalization.

    The fusion looks for attention's result in the first addend that is itself an Add, and ALBERT's first layer has the
    projected embeddings there.
    """
    for norm in model.graph:
        add = norm.inputs[0].producer() if norm.op_type == "LayerNormalization" and norm.inputs[0] else None
        if add is None or add.op_type != "Add":
            continue
        first, second = add.inputs
        if first is None or second is None:
            continue
        # Of embeddings, which are looked up, the fusion takes the first for the words'.
        made = [value.producer() for value in (first, second)]
        if not all(node is not None and node.op_type == "Add" for node in made):
            continue
        if len(first.consumers()) > len(second.consumers()):
            add.replace_input_with(0, second)
            add.replace_input_with(1, first)
