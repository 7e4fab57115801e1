"""Linear layers in int8: U8 activations scaled at run time × S8 weights scaled per output channel, bias inside.

x86 without VNNI adds two products of 8 bits in 16, which is too little for U8 × S8: it saturates, and the model answers
wrongly without a word. Weights of 7 bits fit (ONNX Runtime calls it reduce_range).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from toolchain.errors import GraphError

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from toolchain.passes import Context

LARGEST = 127  # symmetric: -128 is left out, so that a weight and its negative are equally exact
LARGEST_OF_7_BITS = 64  # two products with the largest activation, 2 × 255 × 64, are 16 bits
SATURATES = 32767
ACTIVATION = 255
ROLES = ("query", "key", "value")  # of the projections of attention, in the order they are fused in

# The model, a linear layer's input, its weight's name, the weight [inner, outer], and the bias → the nodes of the
# product, the last of which gives the layer's output.
Product = Callable[["ir.Model", Any, str, "np.ndarray", "ir.Value | None"], "list[ir.Node]"]


def quantize_linear(model: ir.Model, context: Context, product: Product, apart: bool = False) -> tuple[ir.Model, int]:
    """MatMul and Gemm with constant weights, and the projections of fused Attention → products by `product`.

    Products of two activations stay fp32: they hold no weights, so fewer bits would cost accuracy and bring nothing.
    The last layer, whose result is the logits, stays fp32 too: it is a few hundred weights. Query, key and value of a
    fused Attention are one product, or three where they are to be `apart`. Counts the layers quantised.
    """
    count = 0
    layer = partial(product, model)
    for node in linear_nodes(model):
        if layer_name(node) in context.keep:
            continue
        rewrite_one = partial(_attention, apart=apart) if node.op_type == "Attention" else _linear
        rewrite_one(model, node, layer)
        count += 1
    return model, count


def layers_of(model: ir.Model) -> list[str]:
    """Names of the layers that `quantize_linear` takes, in the graph's order."""
    return [layer_name(node) for node in linear_nodes(model)]


def layer_name(node: ir.Node) -> str:
    """Where the layer stood in PyTorch; of fused projections, which they are."""
    return (node.name or "").strip("/").removesuffix("/MatMul").removesuffix("/Gemm")


def weights_of(model: ir.Model) -> dict[str, np.ndarray]:
    """What the layers read, by its name → the weights [inner, outer] of all that read it, side by side."""
    import numpy as np

    found: dict[str, list[np.ndarray]] = {}
    for node in linear_nodes(model):
        array = stored(node.inputs[1])
        array = array.T if node.attributes.get_int("transB", 0) else array
        found.setdefault(str(node.inputs[0].name) if node.inputs[0] else "", []).append(array)
    return {name: np.concatenate(arrays, axis=1) for name, arrays in found.items()}


def sharing(model: ir.Model) -> set[str]:
    """Names of values that layers read whose weights other values are multiplied by as well."""
    readers: dict[str, set[str]] = {}
    for node in linear_nodes(model):
        readers.setdefault(str(node.inputs[1].name), set()).add(str(node.inputs[0].name))  # type: ignore[union-attr]
    return {name for names in readers.values() if len(names) > 1 for name in names}


def linear_nodes(model: ir.Model) -> list[ir.Node]:
    """The layers themselves, before they are quantised."""

    def taken(node: ir.Node) -> bool:
        if node.op_type == "Attention":
            return node.domain == "com.microsoft"
        return node.op_type in ("MatMul", "Gemm") and _is_linear(node) and not node.outputs[0].is_graph_output()

    return [node for node in model.graph if taken(node)]


def quantize_weight(weight: np.ndarray, axis: int, most: int = LARGEST) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 of a 2-D array with one float32 scale per index of `axis`: weight ≈ int8 × scale, |int8| ≤
    `most`."""
    import numpy as np

    largest = np.abs(weight).max(axis=1 - axis, keepdims=True)
    scale = np.maximum(largest / most, np.finfo(np.float32).tiny).astype(np.float32)
    return np.clip(np.rint(weight / scale), -most, most).astype(np.int8), scale.reshape(-1)


def headroom(model: ir.Model) -> float | None:
    """How far the int8 products are from saturating 16 bits where a processor adds two of them there: the limit over
    the worst pair of weights with the largest activation. At least 1: they never do. None where there is no int8
    product.

    Any two weights of an output may meet; which do is the kernel's choice.
    """
    import numpy as np

    worst = 0
    found = False
    for node in model.graph:
        codes = _codes_of(node)
        if codes is None:
            continue
        weight = stored(codes).astype(np.int32)
        found = True
        for side in (np.maximum(weight, 0), np.maximum(-weight, 0)):
            pair = np.sort(side, axis=0)[-2:].sum(axis=0)
            worst = max(worst, int(pair.max()))
    return round(SATURATES / (ACTIVATION * max(worst, 1)), 3) if found else None


def _codes_of(node: ir.Node) -> ir.Value | None:
    """The int8 weights of a product that has such: given to it, or dequantised for it (QDQ)."""
    if node.op_type in ("DynamicQuantizeMatMul", "MatMulInteger", "MatMulIntegerToFloat"):
        return node.inputs[1]
    weight = node.inputs[1] if node.op_type == "MatMul" else None
    before = weight.producer() if weight is not None else None
    codes = before.inputs[0] if before is not None and before.op_type == "DequantizeLinear" else None
    return codes if codes is not None and codes.const_value is not None else None


def constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """An initializer of the graph: a new one, or that of this name where layers that share a weight want it again."""
    import numpy as np
    import onnx_ir as ir

    there = model.graph.initializers.get(name)
    if there is not None:
        found = stored(there)
        if found.dtype == array.dtype and np.array_equal(found, array):
            return there
        return constant(model, f"{name}_other", array)  # read both ways, upright and transposed
    tensor = ir.tensor(np.asarray(array, order="C"), name=name)
    value = ir.val(name, dtype=tensor.dtype, shape=array.shape, const_value=tensor)
    model.graph.register_initializer(value)
    return value


def stored(weight: ir.Value | None) -> np.ndarray:
    """The array of a weight; `GraphError` where there is none."""
    if weight is None or weight.const_value is None:
        raise GraphError("The weights of a layer are computed, not stored.", "Fold constants when exporting.")
    array: np.ndarray = weight.const_value.numpy()
    return array


def _is_linear(node: ir.Node) -> bool:
    weight = node.inputs[1]
    if weight is None or weight.const_value is None or weight.const_value.shape.rank() != 2:
        return False
    plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    return plain and node.attributes.get_int("transA", 0) == 0


def _linear(model: ir.Model, node: ir.Node, layer: Callable[..., list[ir.Node]]) -> None:
    """MatMul with the Add of its bias where it is the only reader, or Gemm."""
    data, weight = node.inputs[0], node.inputs[1]
    array = stored(weight)
    bias, last = (node.inputs[2] if len(node.inputs) > 2 else None), node
    if node.attributes.get_int("transB", 0):
        array = array.T
    readers = node.outputs[0].consumers()
    if node.op_type == "MatMul" and len(readers) == 1 and readers[0].op_type == "Add":
        vectors = [v for v in readers[0].inputs if v and v.const_value is not None and v.const_value.shape.rank() == 1]
        if vectors:
            bias, last = vectors[0], readers[0]
    made = layer(data, str(weight.name) if weight else "", array, bias)
    _replace(model, node, last, made, made[-1].outputs[0])


def _attention(model: ir.Model, node: ir.Node, layer: Callable[..., list[ir.Node]], apart: bool) -> None:
    """Attention → a product for query, key and value, split, or three; and MultiHeadAttention under the same mask."""
    import onnx_ir as ir

    data, weight, bias, mask = node.inputs[:4]
    array = stored(weight)
    name = str(weight.name) if weight else ""
    widths = node.attributes.get_ints("qkv_hidden_sizes", [array.shape[1] // 3] * 3)
    made, parts = (_three if apart else _one)(model, partial(layer, data), name, array, bias, widths)
    for value, role in zip(parts, ROLES, strict=True):
        value.name = f"{name}/{role}"
    settings: dict[str, Any] = {
        key: node.attributes[key] for key in ("num_heads", "scale", "mask_filter_value") if key in node.attributes
    }
    heads = ir.Node(
        "com.microsoft", "MultiHeadAttention", [*parts, None, mask], settings.values(), name=f"{name}/heads"
    )
    _replace(model, node, node, [*made, heads], heads.outputs[0])


def _one(
    model: ir.Model, layer: Callable[..., list[ir.Node]], name: str, array: np.ndarray, bias: Any, widths: Sequence[int]
) -> tuple[list[ir.Node], list[ir.Value]]:
    """One product, whose result is split into `widths`: its nodes and the parts."""
    import numpy as np
    import onnx_ir as ir

    made = layer(name, array, bias)
    sizes = constant(model, f"{name}_split", np.array(widths, np.int64))
    split = ir.node("Split", [made[-1].outputs[0], sizes], {"axis": -1}, num_outputs=len(ROLES), name=f"{name}/split")
    return [*made, split], list(split.outputs)


def _three(
    model: ir.Model, layer: Callable[..., list[ir.Node]], name: str, array: np.ndarray, bias: Any, widths: Sequence[int]
) -> tuple[list[ir.Node], list[ir.Value]]:
    """A product for each of `widths`: their nodes and results."""
    import numpy as np

    made: list[ir.Node] = []
    results = []
    for role, end, width in zip(ROLES, np.cumsum(widths), widths, strict=True):
        part = slice(end - width, end)
        its_bias = None if bias is None else constant(model, f"{name}_{role}_bias", stored(bias)[part])
        made += layer(f"{name}_{role}", array[:, part], its_bias)
        results.append(made[-1].outputs[0])
    return made, results


def fused(
    model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None, *, largest: int = LARGEST
) -> list[ir.Node]:
    """ONNX Runtime's one operator for all of it, DynamicQuantizeMatMul, with no weight over `largest`; a `Product`."""
    import numpy as np
    import onnx_ir as ir

    weight, scale = quantize_weight(array, 1, largest)
    inputs = [
        data,
        constant(model, f"{name}_int8", weight),
        constant(model, f"{name}_scale", scale),
        constant(model, f"{name}_zero_point", np.zeros(scale.shape, np.int8)),
        *([bias] if bias is not None else []),
    ]
    node = ir.node("DynamicQuantizeMatMul", inputs, domain="com.microsoft", name=f"{name}/product")
    node.outputs[0].name = f"{name}/product"
    return [node]


def standard(
    model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None, *, largest: int = LARGEST
) -> list[ir.Node]:
    """Standard operators: DynamicQuantizeLinear, once for all that read the same, and MatMulInteger; a `Product`."""
    import onnx_ir as ir

    weight, scale = quantize_weight(array, 1, largest)
    new: list[ir.Node] = []

    def add(kind: str, inputs: list[Any], what: str, **attributes: Any) -> ir.Value:
        node = ir.node(kind, inputs, attributes, name=f"{name}/{what}")
        node.outputs[0].name = f"{name}/{what}"
        new.append(node)
        return node.outputs[0]

    activation = next((node for node in data.consumers() if node.op_type == "DynamicQuantizeLinear"), None)
    if activation is None:
        activation = ir.node("DynamicQuantizeLinear", [data], num_outputs=3, name=f"{name}/activation")
        for value, role in zip(activation.outputs, ("int8", "scale", "zero_point"), strict=True):
            value.name = f"{name}/activation_{role}"
        new.append(activation)
    uint8, its_scale, zero_point = activation.outputs
    summed = add("MatMulInteger", [uint8, constant(model, f"{name}_int8", weight), zero_point], "sum")
    cast = add("Cast", [summed], "cast", to=ir.DataType.FLOAT)
    scales = add("Mul", [its_scale, constant(model, f"{name}_scale", scale)], "scales")
    result = add("Mul", [cast, scales], "product")
    if bias is not None:
        add("Add", [result, bias], "biased")
    return new


def _replace(model: ir.Model, first: ir.Node, last: ir.Node, new: list[ir.Node], result: ir.Value) -> None:
    """Puts `new` after `last`; readers of `last` read `result`; `first` to `last` go."""
    old = last.outputs[0]
    name = old.name
    model.graph.insert_after(last, new)
    old.replace_all_uses_with(result, replace_graph_outputs=True)
    model.graph.remove([last, first] if last is not first else [first], safe=True)
    result.name = name
