"""What a fused Attention becomes where its projections are quantised.

A product for query, key and value and MultiHeadAttention, or one QAttention, which is both: it writes the projections
where its own products read them, and needs neither a Split nor a transposition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from toolchain.passes.graph import adder, constant, stored
from toolchain.passes.int8 import LARGEST, Codes, weight_codes

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

DOMAIN = "com.microsoft"
ROLES = ("query", "key", "value")  # of the projections, in the order they are fused in
SETTINGS = ("num_heads", "scale", "mask_filter_value")  # that all attentions have

# The model, a linear layer's input, its weight's name, the weight [inner, outer], and the bias → the nodes of the
# product, the last of which gives the layer's output.
Product = Callable[["ir.Model", Any, str, "np.ndarray", "ir.Value | None"], "list[ir.Node]"]
# The model, the Attention, and a `Product` of this model → the nodes in the Attention's place and its result.
Attend = Callable[["ir.Model", "ir.Node", "Callable[..., list[ir.Node]]"], "tuple[list[ir.Node], ir.Value]"]


def merged(model: ir.Model, node: ir.Node, layer: Callable[..., list[ir.Node]]) -> tuple[list[ir.Node], ir.Value]:
    """One product for query, key and value, split, and MultiHeadAttention; an `Attend`."""
    import numpy as np
    import onnx_ir as ir

    data, weight, bias, _ = node.inputs[:4]
    name = str(weight.name) if weight else ""
    made = layer(data, name, stored(weight), bias)
    sizes = constant(model, f"{name}_split", np.array(widths(node), np.int64))
    split = ir.node("Split", [made[-1].outputs[0], sizes], {"axis": -1}, num_outputs=len(ROLES), name=f"{name}/split")
    for value, role in zip(split.outputs, ROLES, strict=True):
        value.name = f"{name}/{role}"
    heads = multi_head(model, node, split.outputs)
    return [*made, split, *heads], heads[-1].outputs[0]


def apart(model: ir.Model, node: ir.Node, layer: Callable[..., list[ir.Node]]) -> tuple[list[ir.Node], ir.Value]:
    """A product each for query, key and value, and MultiHeadAttention; an `Attend`."""
    import numpy as np

    data, weight, bias, _ = node.inputs[:4]
    array, name = stored(weight), str(weight.name) if weight else ""
    made: list[ir.Node] = []
    parts = []
    for role, end, width in zip(ROLES, np.cumsum(widths(node)), widths(node), strict=True):
        part = slice(end - width, end)
        its_bias = None if bias is None else constant(model, f"{name}_{role}_bias", stored(bias)[part])
        made += layer(data, f"{name}_{role}", array[:, part], its_bias)
        parts.append(made[-1].outputs[0])
        parts[-1].name = f"{name}/{role}"
    heads = multi_head(model, node, parts)
    return [*made, *heads], heads[-1].outputs[0]


def whole(
    model: ir.Model, node: ir.Node, layer: Callable[..., list[ir.Node]], *, codes: Codes, largest: int = LARGEST
) -> tuple[list[ir.Node], ir.Value]:
    """QAttention of what `codes` makes of its input, with no weight over `largest`; an `Attend`. It takes query, key
    and value of one width; others are `merged`."""
    import onnx_ir as ir

    if len(set(widths(node))) > 1:
        return merged(model, node, layer)
    data, weight, bias, mask = node.inputs[:4]
    name = str(weight.name) if weight else ""
    new: list[ir.Node] = []
    uint8, scale, zero_point = codes(model, data, new)
    int8, its_scale, its_zero_point = weight_codes(model, name, stored(weight), largest)
    inputs = [uint8, int8, bias, scale, its_scale, mask, zero_point, its_zero_point]
    new.append(ir.Node(DOMAIN, "QAttention", inputs, _settings(node), name=f"{name}/attention"))
    return new, new[-1].outputs[0]


def widths(node: ir.Node) -> list[int]:
    """Of query, key and value of a fused Attention."""
    array = stored(node.inputs[1])
    return list(node.attributes.get_ints("qkv_hidden_sizes", [array.shape[1] // len(ROLES)] * len(ROLES)))


def multi_head(model: ir.Model, node: ir.Node, parts: Any, *, one_query: bool = False) -> list[ir.Node]:
    """MultiHeadAttention of query, key and value, otherwise as the fused Attention `node`; the last node is it.

    `one_query`: the query is one token. The mask [batch, tokens] becomes an `attention_bias` [batch, heads, queries,
    tokens], 0 or the lowest float. A `key_padding_mask` would be shorter, but ONNX Runtime up to 1.20 reads it by the
    number of queries, and its WebGPU provider has none. The bias is expanded because 1.17 refuses to broadcast it and
    1.20 broadcasts it wrongly.
    """
    import onnx_ir as ir

    name = str(node.inputs[1].name) if node.inputs[1] else ""
    new: list[ir.Node] = []
    bias = None if node.inputs[3] is None else _attention_bias(model, node.inputs[3], _heads(node), one_query, new)
    settings = [node.attributes[key] for key in ("num_heads", "scale") if key in node.attributes]
    heads = ir.Node(DOMAIN, "MultiHeadAttention", [*parts, None, None, bias], settings, name=f"{name}/heads")
    return [*new, heads]


def _heads(node: ir.Node) -> int:
    return int(node.attributes["num_heads"].as_int())


def _attention_bias(model: ir.Model, mask: ir.Value, heads: int, one_query: bool, new: list[ir.Node]) -> ir.Value:
    """The bias of a mask [batch, tokens]; what other attentions have made of the mask already is used again."""
    import numpy as np
    import onnx_ir as ir

    name = f"{mask.name}/bias"
    made = {value.name: value for node in model.graph for value in node.outputs}
    add = adder(name, new)

    def number(what: str, value: Any, kind: Any) -> ir.Value:
        return constant(model, f"{name}_{what}", np.array(value, kind))

    row = made.get(f"{name}/row")
    if row is None:
        hidden = add("Sub", [number("one", 1, np.float32), add("Cast", [mask], "cast", to=ir.DataType.FLOAT)], "hidden")
        lowest = number("lowest", np.finfo(np.float32).min, np.float32)
        row = add("Unsqueeze", [add("Mul", [hidden, lowest], "bias"), number("axes", [1, 2], np.int64)], "row")
    which = f"{'one' if one_query else 'all'}_{heads}"
    if f"{name}/{which}" in made:
        return made[f"{name}/{which}"]
    if one_query:
        shape = number(which, [1, heads, 1, 1], np.int64)
    else:
        tokens = add("Shape", [mask], f"{which}_tokens", start=1)
        one = number("ones", [1], np.int64)
        shape = add("Concat", [one, number(which, [heads], np.int64), tokens, one], f"{which}_shape", axis=0)
    return add("Expand", [row, shape], which)


def _settings(node: ir.Node) -> list[ir.Attr]:
    return [node.attributes[key] for key in SETTINGS if key in node.attributes]
