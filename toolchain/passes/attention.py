"""Replacements of a fused Attention by nodes with quantised projections.

A fused Attention becomes either one QAttention, or matrix products for query, key and value before a
MultiHeadAttention. QAttention computes the projections and the attention in one node. QAttention writes the projections
in the layout that its attention computation reads, so it needs no Split and no transposition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from toolchain.passes.graph import adder, array_of, constant
from toolchain.passes.int8 import LARGEST, Codes, weight_codes

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

DOMAIN = "com.microsoft"
ROLES = ("query", "key", "value")  # Order of the projections in the weight of a fused Attention.
SETTINGS = ("num_heads", "scale", "mask_filter_value")  # Attributes that Attention and QAttention share.

# A function of type `Product` returns the nodes that replace one linear layer. The last of these nodes computes the
# layer's output. The first argument of a `Product` function is the model. The other four arguments of a `Product`
# function describe the linear layer: its input, the name of its weight, its weight, and its bias. The weight is an
# array of shape [inner, outer]: `inner` is the width of the layer's input, and `outer` is the width of the layer's
# output. The bias is None for a layer without a bias.
Product = Callable[["ir.Model", Any, str, "np.ndarray", "ir.Value | None"], "list[ir.Node]"]
# A function of type `Attend` returns the nodes that replace one fused Attention, and the output of the last of these
# nodes. The arguments of an `Attend` function are the model, the fused Attention, and a function that replaces a linear
# layer. This third argument is a `Product` function whose first argument, the model, is already set.
Attend = Callable[["ir.Model", "ir.Node", "Callable[..., list[ir.Node]]"], "tuple[list[ir.Node], ir.Value]"]


def build_joint_products(
    model: ir.Model, node: ir.Node, layer: Callable[..., list[ir.Node]]
) -> tuple[list[ir.Node], ir.Value]:
    """Builds a joint product for query, key and value, then a Split and a MultiHeadAttention; implements `Attend`."""
    import numpy as np
    import onnx_ir as ir

    data, weight, bias, _ = node.inputs[:4]
    name = str(weight.name) if weight else ""
    new_nodes = layer(data, name, array_of(weight), bias)
    sizes = constant(model, f"{name}_split", np.array(widths(node), np.int64))
    split = ir.node(
        "Split", [new_nodes[-1].outputs[0], sizes], {"axis": -1}, num_outputs=len(ROLES), name=f"{name}/split"
    )
    for value, role in zip(split.outputs, ROLES, strict=True):
        value.name = f"{name}/{role}"
    heads = multi_head(model, node, split.outputs)
    return [*new_nodes, split, heads], heads.outputs[0]


def build_separate_products(
    model: ir.Model, node: ir.Node, layer: Callable[..., list[ir.Node]]
) -> tuple[list[ir.Node], ir.Value]:
    """Builds one product each for query, key and value, then a MultiHeadAttention; implements `Attend`."""
    import numpy as np

    data, weight, bias, _ = node.inputs[:4]
    array, name = array_of(weight), str(weight.name) if weight else ""
    new_nodes: list[ir.Node] = []
    parts = []
    for role, end, width in zip(ROLES, np.cumsum(widths(node)), widths(node), strict=True):
        columns = slice(end - width, end)
        role_bias = None if bias is None else constant(model, f"{name}_{role}_bias", array_of(bias)[columns])
        new_nodes += layer(data, f"{name}_{role}", array[:, columns], role_bias)
        parts.append(new_nodes[-1].outputs[0])
        parts[-1].name = f"{name}/{role}"
    heads = multi_head(model, node, parts)
    return [*new_nodes, heads], heads.outputs[0]


def build_qattention(
    model: ir.Model, node: ir.Node, layer: Callable[..., list[ir.Node]], *, codes: Codes, largest: int = LARGEST
) -> tuple[list[ir.Node], ir.Value]:
    """Builds one QAttention; implements `Attend`.

    QAttention needs query, key and value of equal width. If the widths of query, key and value differ, this function
    calls `build_joint_products`.

    Args:
        codes: Function that quantises the input of the Attention.
        largest: Largest absolute value of an int8 weight.
    """
    import onnx_ir as ir

    if len(set(widths(node))) > 1:
        return build_joint_products(model, node, layer)
    data, weight, bias, mask = node.inputs[:4]
    name = str(weight.name) if weight else ""
    new_nodes: list[ir.Node] = []
    uint8, scale, zero_point = codes(model, data, new_nodes)
    int8, weight_scale, weight_zero_point = weight_codes(model, name, array_of(weight), largest)
    inputs = [uint8, int8, bias, scale, weight_scale, mask, zero_point, weight_zero_point]
    new_nodes.append(ir.Node(DOMAIN, "QAttention", inputs, _copy_settings(node), name=f"{name}/attention"))
    return new_nodes, new_nodes[-1].outputs[0]


def widths(node: ir.Node) -> list[int]:
    """Returns the widths of query, key and value of a fused Attention."""
    array = array_of(node.inputs[1])
    return list(node.attributes.get_ints("qkv_hidden_sizes", [array.shape[1] // len(ROLES)] * len(ROLES)))


def multi_head(model: ir.Model, node: ir.Node, parts: Any, *, one_query: bool = False) -> ir.Node:
    """Builds a MultiHeadAttention with the mask, `num_heads` and `scale` of the fused Attention `node`.

    The mask of shape [batch, tokens] becomes an `attention_bias` of shape [batch, heads, queries, tokens]. The
    `attention_bias` is 0 for the tokens of a text, and the lowest float for padding. The function uses no
    `key_padding_mask`, although that mask would need fewer nodes than an `attention_bias`. ONNX Runtime up to 1.20
    misreads a `key_padding_mask` if there are fewer queries than keys, and the WebGPU provider supports no
    `key_padding_mask`. The attention bias has its full shape because ONNX Runtime 1.17 refuses to broadcast a bias, and
    1.20 broadcasts it wrongly.

    Args:
        parts: The graph values that hold query, key and value.
        one_query: Whether the query holds only one token.
    """
    import onnx_ir as ir

    name = str(node.inputs[1].name) if node.inputs[1] else ""
    mask = node.inputs[3]
    bias = None if mask is None else _attention_bias(model, mask, node.attributes["num_heads"].as_int(), one_query)
    settings = [node.attributes[key] for key in ("num_heads", "scale") if key in node.attributes]
    return ir.Node(DOMAIN, "MultiHeadAttention", [*parts, None, None, bias], settings, name=f"{name}/heads")


def _attention_bias(model: ir.Model, mask: ir.Value, heads: int, one_query: bool) -> ir.Value:
    """Returns the attention bias for `mask`; adds the nodes that compute the bias if the graph lacks them."""
    import numpy as np
    import onnx_ir as ir

    name = f"{mask.name}/bias"
    bias_name = f"{'one' if one_query else 'all'}_{heads}"
    values_by_name = {value.name: value for node in model.graph for value in node.outputs}
    if f"{name}/{bias_name}" in values_by_name:
        return values_by_name[f"{name}/{bias_name}"]
    new_nodes: list[ir.Node] = []
    add = adder(name, new_nodes)

    def number(suffix: str, value: Any, dtype: Any) -> ir.Value:
        return constant(model, f"{name}_{suffix}", np.array(value, dtype))

    row = values_by_name.get(f"{name}/row")
    anchor = mask.producer() if row is None else row.producer()
    if row is None:
        attended = add("Cast", [mask], "shown", to=ir.DataType.BOOL)
        zero, lowest = number("zero", 0, np.float32), number("lowest", np.finfo(np.float32).min, np.float32)
        row = add(
            "Unsqueeze", [add("Where", [attended, zero, lowest], "bias"), number("axes", [1, 2], np.int64)], "row"
        )
    if one_query:
        shape = number(bias_name, [1, heads, 1, 1], np.int64)
    else:
        tokens = add("Shape", [mask], f"{bias_name}_tokens", start=1)
        one = number("ones", [1], np.int64)
        shape = add("Concat", [one, number(bias_name, [heads], np.int64), tokens, one], f"{bias_name}_shape", axis=0)
    bias = add("Expand", [row, shape], bias_name)
    if anchor is None:  # the mask is an input of the graph
        model.graph.insert_before(model.graph[0], new_nodes)
    else:
        model.graph.insert_after(anchor, new_nodes)
    return bias


def _copy_settings(node: ir.Node) -> list[ir.Attr]:
    return [node.attributes[key] for key in SETTINGS if key in node.attributes]
