"""Linear layers in int8: products of U8 activations, scaled at run time, and S8 weights with one scale per channel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from toolchain.passes.attention import Attend, Product, build_joint_products
from toolchain.passes.graph import adder, array_of, constant, reads_table, replace_nodes
from toolchain.passes.int8 import LARGEST, run_time_codes, weight_codes, weight_of

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from toolchain.passes import Context

INT16_LIMIT = 32767
LARGEST_ACTIVATION = 255


def quantize_linear(
    model: ir.Model,
    context: Context,
    product: Product,
    attend: Attend = build_joint_products,
    *,
    shares_scale: bool = True,
) -> tuple[ir.Model, int]:
    """Replaces linear layers by products that `product` builds; counts the layers quantised.

    Linear layers are MatMul and Gemm with constant weights, and the projections of a fused Attention. `attend` builds
    the replacement of a fused Attention. Products of two activations stay fp32: they hold no weights, so fewer bits
    would cost accuracy and save nothing. The last layer, whose result is the logits, stays fp32 because it has few
    weights. Layers whose names are in `context.keep` stay fp32.

    With `shares_scale`, the linear layer of word embeddings of low rank stays fp32 as well. No LayerNormalization
    limits the range of its input. A rare token could exceed a fixed scale. A padding token could change a scale that is
    computed at run time, because the pass `padding` replaces padding tokens only later in the graph.

    Args:
        product: Function that builds the product of a linear layer.
        attend: Function that builds the replacement of a fused Attention.
        shares_scale: Whether the products have one activation scale for all tokens of a batch.
    """
    count = 0
    layer = partial(product, model)
    for node in linear_nodes(model):
        if layer_name(node) in context.keep or (shares_scale and reads_table(node)):
            continue
        if node.op_type == "Attention":
            new_nodes, result = attend(model, node, layer)
            replace_nodes(model, node, node, new_nodes, result)
        else:
            _quantize_layer(model, node, layer)
        count += 1
    return model, count


def layers_of(model: ir.Model) -> list[str]:
    """Returns the names of the layers that `quantize_linear` can quantise, in the graph's order."""
    return [layer_name(node) for node in linear_nodes(model)]


def layer_name(node: ir.Node) -> str:
    """Returns a linear layer's module path in PyTorch; for fused projections, the name of the Attention node."""
    return (node.name or "").strip("/").removesuffix("/MatMul").removesuffix("/Gemm")


def weights_of(model: ir.Model) -> dict[str, np.ndarray]:
    """Returns the weights of the linear layers, by the name of the input that the layers read.

    Returns:
        A mapping from each input's name to the weights of all layers that read this input. The weights are concatenated
        along `outer` into one array of shape [inner, outer].
    """
    import numpy as np

    arrays_by_input: dict[str, list[np.ndarray]] = {}
    for node in linear_nodes(model):
        array = array_of(node.inputs[1])
        array = array.T if node.attributes.get_int("transB", 0) else array
        arrays_by_input.setdefault(str(node.inputs[0].name) if node.inputs[0] else "", []).append(array)
    return {name: np.concatenate(arrays, axis=1) for name, arrays in arrays_by_input.items()}


def inputs_with_shared_weights(model: ir.Model) -> set[str]:
    """If layers with different inputs share a weight, returns the names of these inputs."""
    readers: dict[str, set[str]] = {}
    for node in linear_nodes(model):
        readers.setdefault(str(node.inputs[1].name), set()).add(str(node.inputs[0].name))  # type: ignore[union-attr]
    return {name for names in readers.values() if len(names) > 1 for name in names}


def linear_nodes(model: ir.Model) -> list[ir.Node]:
    """Returns the linear layers that `quantize_linear` can quantise, in the graph's order."""

    def can_quantize(node: ir.Node) -> bool:
        if node.op_type == "Attention":
            return node.domain == "com.microsoft"
        return node.op_type in ("MatMul", "Gemm") and _is_linear(node) and not _gives_logits(node)

    return [node for node in model.graph if can_quantize(node)]


def headroom(model: ir.Model) -> float | None:
    """Returns the headroom of the int8 products before 16-bit saturation; None if the graph has no int8 product.

    Some processors add two int8 products in 16 bits. The headroom is the 16-bit limit divided by the largest possible
    sum of two products. A kernel may add any two products of one output, so the function assumes the pair with the
    largest sum. In this pair, both activations have the value `LARGEST_ACTIVATION`, and both weights have the same
    sign. The largest possible sum is `LARGEST_ACTIVATION` × the sum of the absolute values of these two weights. If the
    headroom is at least 1, products never saturate.
    """
    import numpy as np

    worst_sum = 0
    has_product = False
    for node in model.graph.all_nodes():
        reader, index = weight_of(node) or (None, 0)
        if reader is None:
            continue
        weight = array_of(reader.inputs[index]).astype(np.int32)
        has_product = True
        for side in (np.maximum(weight, 0), np.maximum(-weight, 0)):
            pair = np.sort(side, axis=0)[-2:].sum(axis=0)
            worst_sum = max(worst_sum, int(pair.max()))
    return round(INT16_LIMIT / (LARGEST_ACTIVATION * max(worst_sum, 1)), 3) if has_product else None


def _gives_logits(node: ir.Node) -> bool:
    """Returns whether the result of a layer is an output of the graph, with or without an Add of a bias."""
    result = node.outputs[0]
    readers = result.consumers()
    if len(readers) == 1 and readers[0].op_type == "Add":  # the head of a token classifier is a MatMul with an Add
        other_terms = [value for value in readers[0].inputs if value is not result]
        if all(value is not None and value.const_value is not None for value in other_terms):
            result = readers[0].outputs[0]
    return node.outputs[0].is_graph_output() or result.is_graph_output()


def _is_linear(node: ir.Node) -> bool:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or weight.const_value.shape.rank() != 2:
        return False
    has_unit_factors = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return has_unit_factors and node.attributes.get_int("transA", 0) == 0


def _quantize_layer(model: ir.Model, node: ir.Node, layer: Callable[..., list[ir.Node]]) -> None:
    """Quantises one linear layer: a Gemm or a MatMul.

    If an Add of a constant bias is the only node that reads the MatMul's output, the int8 product also replaces this
    Add.
    """
    data, weight = node.inputs[0], node.inputs[1]
    array = array_of(weight)
    bias, last_node = (node.inputs[2] if len(node.inputs) > 2 else None), node
    if node.attributes.get_int("transB", 0):
        array = array.T
    readers = node.outputs[0].consumers()
    if node.op_type == "MatMul" and len(readers) == 1 and readers[0].op_type == "Add":
        vectors = [v for v in readers[0].inputs if v and v.const_value is not None and v.const_value.shape.rank() == 1]
        if vectors:
            bias, last_node = vectors[0], readers[0]
    new_nodes = layer(data, str(weight.name) if weight else "", array, bias)
    replace_nodes(model, node, last_node, new_nodes, new_nodes[-1].outputs[0])


def build_fused_product(
    model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None, *, largest: int = LARGEST
) -> list[ir.Node]:
    """Builds ONNX Runtime's DynamicQuantizeMatMul, which also adds the bias; implements `Product`.

    Args:
        largest: Largest absolute value of an int8 weight.
    """
    import onnx_ir as ir

    inputs = [data, *weight_codes(model, name, array, largest), *([bias] if bias is not None else [])]
    node = ir.node("DynamicQuantizeMatMul", inputs, domain="com.microsoft", name=f"{name}/product")
    node.outputs[0].name = f"{name}/product"
    return [node]


def build_standard_product(
    model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None, *, largest: int = LARGEST
) -> list[ir.Node]:
    """Builds an int8 product from the standard DynamicQuantizeLinear and MatMulInteger; implements `Product`.

    Layers that read the same value share one DynamicQuantizeLinear.

    Args:
        largest: Largest absolute value of an int8 weight.
    """
    import numpy as np
    import onnx_ir as ir

    new_nodes: list[ir.Node] = []
    add = adder(name, new_nodes)

    uint8, activation_scale, zero_point = run_time_codes(model, data, new_nodes)
    weight, weight_scale, _ = weight_codes(model, name, array, largest)
    # In ONNX, the zero point of the weight is optional. ONNX Runtime can convert int8 weights to unsigned integers. If
    # int8 weights have no zero point, ONNX Runtime up to 1.29 aborts during this conversion. ONNX Runtime 1.32 refuses
    # a zero point that several nodes share.
    weight_zero_point = constant(model, f"{name}_zero", np.array(0, np.int8))
    integers = add("MatMulInteger", [uint8, weight, zero_point, weight_zero_point], "sum")
    cast = add("Cast", [integers], "cast", to=ir.DataType.FLOAT)
    result = add("Mul", [cast, add("Mul", [activation_scale, weight_scale], "scales")], "product")
    if bias is not None:
        add("Add", [result, bias], "biased")
    return new_nodes
