"""Takes fused attention apart into standard operators, which WebGPU computes correctly."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from toolchain.passes.attention import DOMAIN, build_joint_products
from toolchain.passes.graph import adder, array_of, constant, projection_width, replace_nodes

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from toolchain.passes import Context

MOST_INPUTS = 4  # Data, weight, bias and mask. A node with more inputs also has an attention bias or earlier keys.


def split_attention(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Rewrites each fused Attention and MultiHeadAttention to matrix products and a Softmax; counts these nodes.

    The WebGPU provider has no kernel of Attention with a mask. Its kernel of MultiHeadAttention refuses a
    `key_padding_mask`, and returns wrong results from about 32 tokens on (onnxruntime-web 1.30.0). The pass adds the
    mask to the scores of all heads and queries by broadcasting, so the mask needs no shape arithmetic. An Attention
    with more than `MOST_INPUTS` inputs stays unchanged.
    """
    for node in [node for node in model.graph if node.op_type == "Attention" and node.domain == DOMAIN]:
        if all(value is None for value in node.inputs[MOST_INPUTS:]):
            new_nodes, result = build_joint_products(model, node, partial(_build_product, model))
            replace_nodes(model, node, node, new_nodes, result)
    fused = [node for node in model.graph if node.op_type == "MultiHeadAttention" and node.domain == DOMAIN]
    for node in fused:
        new_nodes = _build_heads(model, node)
        replace_nodes(model, node, node, new_nodes, new_nodes[-1].outputs[0])
    for node in [node for node in model.graph if node.op_type == "Where"]:
        _look_up_bias(model, node)
    return model, len(fused)


def _build_product(model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None) -> list[ir.Node]:
    """Builds a MatMul, and an Add if the layer has a bias; implements `attention.Product`."""
    new_nodes: list[ir.Node] = []
    add = adder(name, new_nodes)
    product = add("MatMul", [data, constant(model, name, array)], "product")
    if bias is not None:
        add("Add", [product, bias], "biased")
    return new_nodes


def _build_heads(model: ir.Model, node: ir.Node) -> list[ir.Node]:
    """Builds the nodes of a MultiHeadAttention that `attention.multi_head` built; the last node returns its output."""
    import numpy as np
    import onnx_ir as ir

    heads = node.attributes["num_heads"].as_int()
    query, key, value = node.inputs[:3]
    scale = node.attributes.get_float("scale", (_width(query) // heads) ** -0.5)
    new_nodes: list[ir.Node] = []
    add = adder(node.name or "heads", new_nodes)
    split = constant(model, f"heads_{heads}", np.array([0, 0, heads, -1], np.int64))
    join = constant(model, "joined_heads", np.array([0, 0, -1], np.int64))

    def transpose(value: ir.Value, role: str, order: tuple[int, ...]) -> ir.Value:
        new_nodes.append(ir.node("Transpose", [value], {"perm": order}, name=f"{node.name}/{role}"))
        new_nodes[-1].outputs[0].name = f"{node.name}/{role}"
        return new_nodes[-1].outputs[0]

    def by_head(part: ir.Value | None, role: str, order: tuple[int, ...]) -> ir.Value:
        return transpose(add("Reshape", [part, split], f"{role}_split"), role, order)

    factor = constant(model, f"scale_{scale:.9g}", np.array(scale, np.float32))
    scaled = add("Mul", [by_head(query, "query", (0, 2, 1, 3)), factor], "scaled")
    scores = add("MatMul", [scaled, by_head(key, "key", (0, 2, 3, 1))], "scores")
    if len(node.inputs) > 5 and (bias := node.inputs[5]) is not None:
        expand = bias.producer()
        row = expand.inputs[0] if expand is not None and expand.op_type == "Expand" else bias
        scores = add("Add", [scores, row], "masked")
    shares = add("Softmax", [scores], "shares", axis=-1)
    mixed = add("MatMul", [shares, by_head(value, "value", (0, 2, 1, 3))], "mixed")
    add("Reshape", [transpose(mixed, "tokens", (0, 2, 1, 3)), join], "joined")
    return new_nodes


def _width(value: ir.Value | None) -> int:
    """Returns the width of a part of a projection: an output of a Split, or of a dense layer."""
    producer = value.producer() if value is not None else None
    if value is not None and producer is not None and producer.op_type == "Split":
        return int(array_of(producer.inputs[1])[producer.outputs.index(value)])
    width = projection_width(value)
    assert width is not None  # `first_query` and `build_joint_products` create only these two forms
    return width


def _look_up_bias(model: ir.Model, choice: ir.Node) -> None:
    """Replaces a choice between two stored numbers by a look-up with the mask, an int64 input of the graph.

    WebGPU has no Cast from int64, but it has a Gather with int64 indices. The values of the mask are 0 and 1.
    """
    import numpy as np

    mask = choice.inputs[0]
    while mask is not None and (cast := mask.producer()) is not None and cast.op_type == "Cast":
        mask = cast.inputs[0]
    numbers = [value.const_value for value in choice.inputs[1:] if value is not None]
    if mask is None or not mask.is_graph_input() or any(each is None or each.size != 1 for each in numbers):
        return
    shown, hidden = (each.numpy().reshape(()) for each in numbers if each is not None)
    new_nodes: list[ir.Node] = []
    table = constant(model, f"{mask.name}/bias_values", np.stack([hidden, shown]))
    bias = adder(f"{mask.name}/bias", new_nodes)("Gather", [table, mask], "looked_up", axis=0)
    replace_nodes(model, choice, choice, new_nodes, bias)
