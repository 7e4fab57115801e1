"""Rewrites the residual addition before a LayerNormalization, so that ONNX Runtime does not fuse these two nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.passes.graph import store_negative

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.passes import Context


def residual_sum(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Turns the Add before a LayerNormalization into a Sub if possible, else into a Sum; counts the rewritten nodes.

    The pass rewrites an Add only if neither addend is an initializer. To turn an Add into a Sub, the pass negates the
    weights that compute one addend; the negation is exact. If the pass can negate the weights of neither addend, it
    turns the Add into a Sum.

    With default options, ONNX Runtime fuses Add + LayerNormalization into SkipLayerNormalization when it loads a model.
    ONNX Runtime fuses Add + LayerNormalization only if it knows the shapes of both addends, for example because an app
    fixes the input dimensions. On the CPU provider, the SkipLayerNormalization kernel is several times slower than the
    two kernels that it replaces. ONNX Runtime fuses neither Sub nor Sum with LayerNormalization. Sum runs on one
    thread; Sub runs on all threads, as Add does.
    """
    count = 0
    for node in list(model.graph):
        if node.op_type != "LayerNormalization" or node.inputs[0] is None:
            continue
        add = node.inputs[0].producer()
        if add is None or add.op_type != "Add" or any(v is None or v.is_initializer() for v in add.inputs):
            continue
        first, second = add.inputs
        for minuend, subtrahend in ((first, second), (second, first)):
            assert subtrahend is not None  # checked above
            negatable = _negatable_inputs(subtrahend)
            if negatable:
                for linear, index in negatable:
                    linear.replace_input_with(index, store_negative(model, linear.inputs[index]))
                add.replace_input_with(0, minuend)
                add.replace_input_with(1, subtrahend)
                add.op_type = "Sub"
                break
        else:
            add.op_type = "Sum"
        count += 1
    return model, count


def _negatable_inputs(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Finds the initializers to negate so that `value` changes its sign.

    The negation affects only the nodes that compute `value` and the one node that reads `value`.

    Returns:
        For each initializer to negate, the node that reads the initializer and the index of the node's input. The list
        is empty if the function finds no way to change the sign of `value` with initializers.
    """
    node = value.producer()
    if node is None or node.domain != "" or len(value.uses()) != 1 or value.is_graph_output():
        return []
    stored_indices = [
        index for index, operand in enumerate(node.inputs) if operand is not None and operand.const_value is not None
    ]
    if node.op_type == "MatMul":
        return [(node, 1)] if stored_indices == [1] else []
    if node.op_type == "Gemm":
        return [(node, index) for index in stored_indices] if stored_indices == list(range(1, len(node.inputs))) else []
    if node.op_type == "Gather":
        return [(node, 0)] if stored_indices == [0] else []
    if node.op_type == "Add" and len(stored_indices) == 1:
        other_addend = node.inputs[1 - stored_indices[0]]
        inputs_before = _negatable_inputs(other_addend) if other_addend is not None else []
        return [(node, stored_indices[0]), *inputs_before] if inputs_before else []
    return []
