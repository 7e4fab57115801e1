"""Applies the transformer fusions of ONNX Runtime that make a graph faster on an execution provider."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from toolchain.passes.graph import constant, projection_width
from toolchain.system.quiet import hide_logs

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context

DOMAIN = "com.microsoft"  # Domain of the fused operators.
# Fusions that are off on the CPU, by their names in `FusionOptions`. The CPU kernels of SkipLayerNormalization and
# EmbedLayerNormalization use no vector instructions. BiasGelu would absorb a bias that the quantised MatMul should add.
CPU_DISABLED_FUSIONS = ("embed_layer_norm", "skip_layer_norm", "bias_skip_layer_norm", "bias_gelu")


def fuse(
    model: ir.Model, context: Context, *, disabled_fusions: Collection[str] = CPU_DISABLED_FUSIONS
) -> tuple[ir.Model, int]:
    """Fuses attention into one node, erf-Gelu into Gelu, and other patterns; counts the fused nodes.

    The attention mask keeps its shape [batch, sequence]. By default, the fusion replaces the mask of each sentence by
    its number of tokens, which is wrong for padding on the left.

    Args:
        disabled_fusions: Fusions that stay off, by their names in `FusionOptions` without `enable_`.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.onnx_model_bert import BertOnnxModel

    options = FusionOptions("bert")
    options.use_raw_attention_mask(True)
    for name in disabled_fusions:
        setattr(options, f"enable_{name}", False)
    _move_residual_last(model)
    _write_head_counts(model)
    with hide_logs():
        fused = BertOnnxModel(ir.to_proto(model), context.heads, context.width)
        # The next line turns off the fusion of RMS normalisation into the operator SimplifiedLayerNormalization. A
        # stored graph must not contain SimplifiedLayerNormalization, because the ONNX checker rejects this operator.
        # ONNX Runtime does the same fusion when ONNX Runtime loads the graph.
        fused.fuse_simplified_layer_norm = lambda: None
        fused.optimize(options, add_dynamic_axes=False)
    result = ir.from_proto(fused.model)
    result.graph.opset_imports.setdefault(DOMAIN, 1)  # Shape inference needs an opset for the fused operators.
    result.graph.sort()  # The fusion appends its nodes at the end of the graph.
    # The fusion stores new projection weights for each layer, even if layers share their weights (ALBERT).
    common.DeduplicateHashedInitializersPass()(result)
    return result, sum(node.domain == DOMAIN for node in result.graph)


def _write_head_counts(model: ir.Model) -> None:
    """Replaces -1 by the number of heads in each Reshape that splits a projection into attention heads.

    Graphs of transformers 5 reshape a projection [batch, sequence, width] to [batch, sequence, -1, head size]. ONNX
    Runtime's fusion would take the number of heads from the model's config, and a pruned layer has fewer heads.
    """
    import numpy as np

    for node in model.graph:
        concat = node.inputs[1].producer() if node.op_type == "Reshape" and node.inputs[1] else None
        if concat is None or concat.op_type != "Concat" or len(concat.inputs) != 4:
            continue
        width = projection_width(node.inputs[0])
        heads, head_size = (_integer(value) for value in concat.inputs[2:])
        if width and heads == -1 and head_size:
            heads = width // head_size
            concat.replace_input_with(2, constant(model, f"heads_{heads}", np.array([heads], np.int64)))


def _integer(value: ir.Value | None) -> int | None:
    """Returns the only element of a stored array, or None."""
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return int(value.const_value.numpy().item())


def _move_residual_last(model: ir.Model) -> None:
    """Makes the residual the second addend of each Add before a LayerNormalization.

    The residual is the addend with more readers. If both addends of the Add before a LayerNormalization are outputs of
    Add nodes, ONNX Runtime's fusion takes the first addend as the attention's result. In ALBERT's first layer, the
    first addend is the residual, which holds the projected embeddings. Without this function, the fusion would take
    these embeddings as the attention's result. The fusion would then not fuse the attention of that layer.
    """
    for norm in model.graph:
        add = norm.inputs[0].producer() if norm.op_type == "LayerNormalization" and norm.inputs[0] else None
        if add is None or add.op_type != "Add":
            continue
        first, second = add.inputs
        if first is None or second is None:
            continue
        # Addends from embedding look-ups keep their order: the fusion takes the first addend as word embeddings.
        producers = [value.producer() for value in (first, second)]
        if not all(node is not None and node.op_type == "Add" for node in producers):
            continue
        if len(first.consumers()) > len(second.consumers()):
            add.replace_input_with(0, second)
            add.replace_input_with(1, first)
