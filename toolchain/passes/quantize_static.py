"""Quantises linear layers to int8.

Activations are U8 with fixed scales from calibration. Weights are S8 with one scale per channel.

All channels of an activation share one scale. If a few channels hold far larger values than the others, the others use
only a few of the 256 int8 codes. SmoothQuant (Xiao et al. 2022) divides each channel by a factor and multiplies the
weights of that channel by the same factor. The SmoothQuant paper folds the division of the channels into the preceding
LayerNormalization. This module leaves the LayerNormalization unchanged, because the residual addition also reads the
undivided output of the LayerNormalization. Instead, this module adds a `Mul` node that multiplies each channel by
1 / its SmoothQuant factor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from toolchain.errors import GraphError
from toolchain.passes.attention import Attend, build_qattention
from toolchain.passes.graph import adder, array_of, constant, reads_table, store_negative
from toolchain.passes.int8 import weight_codes
from toolchain.passes.quantize_linear import layer_name, linear_nodes, quantize_linear

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from toolchain.passes import Context

MAX_CODE = 255
SMOOTHED = "/smoothed"  # Suffix of the names of values that `smooth` has divided or multiplied.


@dataclass(frozen=True, eq=False)
class Activation:
    """Quantisation of an input of linear layers: value ≈ (code − `zero_point`) × `scale` × `smooth`.

    A code is an integer from 0 to 255. `smooth` is an array of shape [width] with one factor for each channel; None
    without SmoothQuant.
    """

    scale: float
    zero_point: int
    smooth: np.ndarray | None = None

    @classmethod
    def from_range(cls, low: float, high: float, smooth: np.ndarray | None = None) -> Activation:
        """Returns the quantisation whose codes cover both the range from `low` to `high` and the value 0.

        Because one code stands for the value 0, quantisation keeps zeros, such as padding and pruned values, exactly 0.
        """
        import numpy as np

        low, high = min(low, 0.0), max(high, 0.0)
        scale = float(np.float32(max((high - low) / MAX_CODE, float(np.finfo(np.float32).tiny))))
        return cls(scale, min(MAX_CODE, round(-low / scale)), smooth)

    def fake_quantize(self, values: np.ndarray) -> np.ndarray:
        """Quantises and dequantises values of shape […, width] that are already divided by `smooth`.

        The function does not multiply its result by `smooth`, so the returned values are still divided by `smooth`.
        """
        import numpy as np

        codes = np.clip(np.rint(values / self.scale) + self.zero_point, 0, MAX_CODE)
        result: np.ndarray = (codes - self.zero_point) * np.float32(self.scale)
        return result


Activations = Mapping[str, Activation]  # Name of a layer's input → quantisation of this input.
# A function of type `StaticProduct` returns the nodes that replace a linear layer. The first argument of the function
# holds the quantisation of every layer's input. The second argument is the model. The other arguments describe the
# linear layer: its input, the name of its weight, its weight, and its bias. See also `attention.Product`.
StaticProduct = Callable[[Activations, "ir.Model", Any, str, "np.ndarray", "ir.Value | None"], "list[ir.Node]"]


def smooth(model: ir.Model, context: Context) -> tuple[ir.Model, int]:
    """Divides layer inputs by the factors `smooth`, multiplies the layers' weights by `smooth`, and counts the inputs.

    The division is a `Mul` by 1 / `smooth` before the layers. Apart from rounding, the layers' outputs do not change.
    """
    import onnx_ir as ir

    count = 0
    for name, readers in _layers_by_input(model, context).items():
        factors = context.activations[name].smooth if name in context.activations else None
        if factors is None:
            continue
        inverse = constant(model, f"{name}/smoothing", (1 / factors).astype(factors.dtype))
        division = ir.node("Mul", [readers[0].inputs[0], inverse], name=f"{name}{SMOOTHED}")
        division.outputs[0].name = f"{name}{SMOOTHED}"
        model.graph.insert_before(readers[0], division)
        for node in readers:
            weight = node.inputs[1]
            assert weight is not None  # every linear layer has a weight
            array = array_of(weight)
            array = array * (factors if node.attributes.get_int("transB", 0) else factors[:, None])
            node.replace_input_with(0, division.outputs[0])
            node.replace_input_with(1, constant(model, f"{weight.name}{SMOOTHED}", array))
        count += 1
    return model, count


def quantize_static(
    model: ir.Model, context: Context, product: StaticProduct, attend: Attend | None = None
) -> tuple[ir.Model, int]:
    """Runs `quantize_linear` with the fixed scales of `context.activations`; counts the layers quantised.

    Args:
        attend: Function that builds the replacement of an Attention node; with None, one QAttention replaces the node.

    Raises:
        GraphError: The input of a layer has no calibrated scale.
    """
    uncalibrated_inputs = sorted(set(_layers_by_input(model, context)) - _calibrated_names(context.activations))
    if uncalibrated_inputs:
        raise GraphError(
            f"{uncalibrated_inputs[0]} has no calibrated scale.", "Calibrate on the same graph that you quantise."
        )
    attend = attend or partial(build_qattention, codes=partial(fixed_codes, context.activations))
    return quantize_linear(model, context, partial(product, context.activations), attend)


def _calibrated_names(activations: Activations) -> set[str]:
    return set(activations) | {f"{name}{SMOOTHED}" for name in activations}


def _layers_by_input(model: ir.Model, context: Context) -> dict[str, list[ir.Node]]:
    """Returns the linear layers by the name of their input, without the layers that stay fp32."""
    layers: dict[str, list[ir.Node]] = {}
    for node in linear_nodes(model):
        if layer_name(node) not in context.keep and node.inputs[0] is not None and not reads_table(node):
            layers.setdefault(str(node.inputs[0].name), []).append(node)
    return layers


def fixed_codes(activations: Activations, model: ir.Model, data: Any, new_nodes: list[ir.Node]) -> list[ir.Value]:
    """Quantises the value `data` with its calibrated scale; one QuantizeLinear node serves all readers of the value.

    To get a function of the type `int8.Codes`, bind the argument `activations` with `functools.partial`. A function of
    the type `int8.Codes` adds nodes that quantise a value, and returns the quantised value, scale and zero point.
    """
    import numpy as np
    import onnx_ir as ir

    node: ir.Node | None = next((node for node in data.consumers() if node.op_type == "QuantizeLinear"), None)
    if node is None:
        activation = activations[data.name.removesuffix(SMOOTHED)]
        scale = constant(model, f"{data.name}/scale", np.array(activation.scale, np.float32))
        zero_point = constant(model, f"{data.name}/zero_point", np.array(activation.zero_point, np.uint8))
        node = ir.node("QuantizeLinear", [data, scale, zero_point], name=f"{data.name}/codes")
        node.outputs[0].name = f"{data.name}/codes"
        new_nodes.append(node)
    outputs: list[Any] = [node.outputs[0], *node.inputs[1:]]
    return outputs


def build_fused_static_product(
    activations: Activations,
    model: ir.Model,
    data: Any,
    name: str,
    array: np.ndarray,
    bias: ir.Value | None,
) -> list[ir.Node]:
    """Builds ONNX Runtime's MatMulIntegerToFloat, which also adds the bias; implements `StaticProduct`."""
    import onnx_ir as ir

    new_nodes: list[ir.Node] = []
    codes, scale, zero_point = fixed_codes(activations, model, data, new_nodes)
    weight, weight_scale, weight_zero_point = weight_codes(model, name, array)
    inputs = [codes, weight, scale, weight_scale, zero_point, weight_zero_point, *([bias] if bias is not None else [])]
    node = ir.node("MatMulIntegerToFloat", inputs, domain="com.microsoft", name=f"{name}/product")
    node.outputs[0].name = f"{name}/product"
    return [*new_nodes, node]


def build_standard_static_product(
    activations: Activations,
    model: ir.Model,
    data: Any,
    name: str,
    array: np.ndarray,
    bias: ir.Value | None,
) -> list[ir.Node]:
    """Builds a MatMul of dequantised values (QDQ), which runtimes run in int8; implements `StaticProduct`.

    To add the bias, a `Sub` node subtracts the negated bias. With an `Add` and two-dimensional inputs, ONNX Runtime
    would fuse MatMul and Add into a Gemm. ONNX Runtime runs a Gemm of dequantised values in fp32, and dequantises the
    weights at every inference.
    """
    new_nodes: list[ir.Node] = []
    add = adder(name, new_nodes)

    activation = add("DequantizeLinear", fixed_codes(activations, model, data, new_nodes), "activation")
    weight = add("DequantizeLinear", weight_codes(model, name, array), "weight", axis=1)
    result = add("MatMul", [activation, weight], "product")
    if bias is not None:
        add("Sub", [result, store_negative(model, bias)], "biased")
    return new_nodes
