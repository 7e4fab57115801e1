"""Linear layers in int8: U8 activations scaled at run time × S8 weights scaled per output channel, bias inside."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from toolchain.passes.attention import Attend, Product, merged
from toolchain.passes.graph import adder, constant, replace, stored
from toolchain.passes.int8 import LARGEST, run_time_codes, weight_codes, weight_of

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from toolchain.passes import Context

SATURATES = 32767
ACTIVATION = 255


def quantize_linear(
    model: ir.Model, context: Context, product: Product, attend: Attend = merged
) -> tuple[ir.Model, int]:
    """MatMul and Gemm with constant weights, and the projections of fused Attention → products by `product`; what
    becomes of the Attention itself says `attend`.

    Products of two activations stay fp32: they hold no weights, so fewer bits would cost accuracy and bring nothing.
    The last layer, whose result is the logits, stays fp32 too: it is a few hundred weights. Counts the layers
    quantised.
    """
    count = 0
    layer = partial(product, model)
    for node in linear_nodes(model):
        if layer_name(node) in context.keep:
            continue
        if node.op_type == "Attention":
            made, result = attend(model, node, layer)
            replace(model, node, node, made, result)
        else:
            _linear(model, node, layer)
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
        reader, index = weight_of(node) or (None, 0)
        if reader is None:
            continue
        weight = stored(reader.inputs[index]).astype(np.int32)
        found = True
        for side in (np.maximum(weight, 0), np.maximum(-weight, 0)):
            pair = np.sort(side, axis=0)[-2:].sum(axis=0)
            worst = max(worst, int(pair.max()))
    return round(SATURATES / (ACTIVATION * max(worst, 1)), 3) if found else None


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
    replace(model, node, last, made, made[-1].outputs[0])


def fused(
    model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None, *, largest: int = LARGEST
) -> list[ir.Node]:
    """ONNX Runtime's one operator for all of it, DynamicQuantizeMatMul, with no weight over `largest`; a `Product`."""
    import onnx_ir as ir

    inputs = [data, *weight_codes(model, name, array, largest), *([bias] if bias is not None else [])]
    node = ir.node("DynamicQuantizeMatMul", inputs, domain="com.microsoft", name=f"{name}/product")
    node.outputs[0].name = f"{name}/product"
    return [node]


def standard(
    model: ir.Model, data: Any, name: str, array: np.ndarray, bias: ir.Value | None, *, largest: int = LARGEST
) -> list[ir.Node]:
    """Standard operators: DynamicQuantizeLinear, once for all that read the same, and MatMulInteger; a `Product`."""
    import numpy as np
    import onnx_ir as ir

    new: list[ir.Node] = []
    add = adder(name, new)

    uint8, its_scale, zero_point = run_time_codes(model, data, new)
    weight, scale, _ = weight_codes(model, name, array, largest)
    # Optional, but where ONNX Runtime makes the weights unsigned, releases up to 1.29 abort without it, and 1.32
    # refuses one that nodes share.
    its_zero_point = constant(model, f"{name}_zero", np.array(0, np.int8))
    integers = add("MatMulInteger", [uint8, weight, zero_point, its_zero_point], "sum")
    cast = add("Cast", [integers], "cast", to=ir.DataType.FLOAT)
    result = add("Mul", [cast, add("Mul", [its_scale, scale], "scales")], "product")
    if bias is not None:
        add("Add", [result, bias], "biased")
    return new
